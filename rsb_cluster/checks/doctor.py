"""What a job needs, checked before it costs anything. Each check says what was found, and what to do about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rsb_cluster import backends
from rsb_cluster.backends import slurm
from rsb_cluster.backends.skypilot import engine, wheel
from rsb_cluster.config import catalog
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import Override
from rsb_cluster.errors import RsbError, StorageError
from rsb_cluster.runs.lookup import default_runs
from rsb_cluster.storage.s3 import endpoint_url
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.data_location import find_data

# SkyPilot's jobs controller asks the first, then the second, before it believes that a machine is gone
# (sky/backends/backend_utils.py in 0.14); without an answer it never starts a job again.
PROBES = ("https://8.8.8.8", "https://1.1.1.1")
PACKAGES = "https://pypi.org/simple/uv/"
ANSWER_S = 10.0


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        what: What was checked.
        found: What is so, or what is amiss.
        advice: What to do; empty where all is well.
    """

    what: str
    found: str
    advice: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether nothing is to be done."""
        return not self.advice


def examine(job_name: str, *, overrides: Sequence[Override] = (), runs: str = "", data: str = "") -> Iterator[Finding]:
    """Yield what is found of a job, one check after the other; one that fails does not end the others.

    Args:
        job_name: Name or path; empty: what ``submit`` takes.
        overrides: Fields of the job, such as ``("nodes", 2)``.
        runs: Folder of runs, as for ``submit``.
        data: A data set's folder; not looked for where it is empty.

    Raises:
        ConfigError: There is no such job, or it is wrong.
    """
    job, path = catalog.load_job(job_name or backends.default_backend_job(1), overrides=overrides)
    yield Finding("job", f"{path}: {job.shape}, back end {job.backend}")
    store = Store(runs or job.runs or os.environ.get("RSB_RUNS") or default_runs())
    yield from _run(f"runs in {store.url}", lambda: _store(store, job))
    if data:
        yield from _run("data", lambda: _data(data, job))
    checks = {"local": _LOCAL, "slurm": _SLURM, "cloud": _CLOUD}[job.backend]
    for what, check in checks.items():
        yield from _run(what, lambda check=check: check(job))  # type: ignore[misc]


def _run(what: str, check: Callable[[], Finding | str]) -> Iterator[Finding]:
    """Yield what a check returns; an error that a user can act on is a finding, too."""
    try:
        found = check()
    except RsbError as error:
        message, _, advice = str(error).rpartition(". ")
        found = Finding(what, message or str(error), advice or "see the message")
    yield found if isinstance(found, Finding) else Finding(what, found)


def _store(store: Store, job: Job) -> Finding | str:
    what = f"runs in {store.url}"
    if job.backend == "cloud" and not store.url.startswith(("s3://", "s3a://")):
        return Finding(what, "machines of a cloud cannot reach it", "Use --runs s3://bucket/runs.")
    name = f"probe-{uuid.uuid4().hex}"
    try:
        first, second = store.create_bytes(name, b"first"), store.create_bytes(name, b"second")
        if store.read_bytes(name) != b"first" or not first or second:
            return Finding(
                what,
                "writing works, but one file can be made twice (the server ignores If-None-Match)",
                "Never submit a run a second time while it is at work, or use another server.",
            )
    finally:
        store.delete(name)
    host = urlsplit(endpoint_url() or "").hostname or ""
    if job.backend == "cloud" and (host == "localhost" or host.startswith("127.")):
        return Finding(what, f"writable, but only here: the endpoint is {host}", "Use an address that the nodes reach.")
    return "can be written, read and deleted; of two that write a file at once, one wins"


def _data(url: str, job: Job) -> str:
    found = find_data(Path(url).name, url, job)
    if not found.is_found:
        raise StorageError(found.problem)
    assert found.train is not None and found.val is not None
    return f"{found.url}: {found.train.num_samples:,} training images, {found.val.num_samples:,} for validation"


def _gpus(job: Job) -> Finding | str:
    if not job.gpus_per_node:
        return "none asked for"
    if not shutil.which("nvidia-smi"):
        return Finding("GPUs", "there is no nvidia-smi here", "Use --gpus-per-node 0, or install NVIDIA's driver.")
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")
    if found < job.gpus_per_node:
        return Finding("GPUs", f"{found} of {job.gpus_per_node}", f"Use --gpus-per-node {found}.")
    return f"{found}"


def _sbatch(job: Job) -> str:
    slurm.check_available(job)
    return slurm.rehearse(job)


def _arrays(job: Job) -> str:
    return f"up to {slurm.max_runs():,} runs in a job array"


def _python(job: Job) -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{version} here; each node gets the same from uv, from its image or from GitHub"


def _code(job: Job) -> str:
    built = wheel.build()
    return f"{built.filename}, {len(built.content) / 1e6:.1f} MB, {len(wheel.pins())} packages pinned"


def _secrets(job: Job) -> str:
    engine.secret_values(job.cloud.secrets)
    return (
        ", ".join(job.cloud.secrets)
        or "none handed over: a role, or the files that SkyPilot copies, must reach runs and data"
    )


def _skypilot(job: Job) -> str:
    engine.check_installed()
    return engine.version()


def _server(job: Job) -> Finding | str:
    server = engine.server()
    if server.is_local:
        return f"{server.url}, on this machine: while it sleeps, nothing is started again, unless a controller VM runs"
    return f"{server.url}, version {server.version}"


def _clouds(job: Job) -> Finding | str:
    enabled = engine.enabled_clouds()
    wanted = {"kubernetes" if where in ("k8s", "kubernetes") else where for where in _clouds_of(job)}
    if missing := sorted(wanted - set(enabled)) or (["any"] if not enabled else []):
        have = ", ".join(enabled) or "none"
        return Finding("clouds", f"enabled: {have}; missing: {', '.join(missing)}", "Run 'sky check', which says why.")
    return ", ".join(enabled)


def _clouds_of(job: Job) -> set[str]:
    return {where.split("/")[0].lower() for where in job.cloud.infra}


def _egress(job: Job) -> Finding | str:
    if not any(map(_answers, PROBES)):
        return Finding(
            "network",
            f"neither {' nor '.join(PROBES)} answers here",
            "Where SkyPilot's jobs controller runs, one of them must: else it never starts a preempted job again.",
        )
    if not _answers(PACKAGES):
        return Finding("network", f"{PACKAGES} does not answer here", "Nodes need a package index: set UV_INDEX_URL.")
    return f"{PROBES[0]} or {PROBES[1]} answers, and so does {urlsplit(PACKAGES).hostname}; the nodes need the latter"


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


_Checks = dict[str, Callable[[Job], Finding | str]]
_LOCAL: _Checks = {"GPUs": _gpus}
_SLURM: _Checks = {"Slurm takes the job": _sbatch, "job arrays": _arrays}
_CLOUD: _Checks = {
    "Python": _python,
    "code": _code,
    "secrets": _secrets,
    "SkyPilot": _skypilot,
    "API server": _server,
    "clouds": _clouds,
    "network": _egress,
}
