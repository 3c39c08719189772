"""Checks of what a job needs, before it costs anything. Each finding says what was found and what to do about it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from rsb_cluster.backends import Finding, at_site, backend_of, default_job
from rsb_cluster.config import catalog
from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import Override
from rsb_cluster.errors import RsbError, StorageError
from rsb_cluster.runs.lookup import runs_folder
from rsb_cluster.storage.location import is_s3
from rsb_cluster.storage.s3_settings import endpoint_url
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.data_location import find_data


def run_checks(
    job_name: str, *, overrides: Sequence[Override] = (), runs: str = "", data: str = ""
) -> Iterator[Finding]:
    """Run all checks of a job and yield their findings; a failed check does not stop the others.

    Args:
        job_name: Name or path of the job; empty: the default of ``submit``.
        overrides: Fields of the job, such as ``("nodes", 2)``.
        runs: Folder of runs, as for ``submit``.
        data: Folder of a data set; empty: not checked.

    Raises:
        ConfigError: The job does not exist or is invalid.
    """
    job, path = catalog.load_job(job_name or default_job(1), overrides=overrides)
    job = at_site(job)
    backend = backend_of(job)
    backend.check_job(job)
    yield Finding("job", f"{path}: {job.shape}, back end {job.backend}")
    store = Store(runs_folder(runs, job.runs))
    yield _run_check(f"runs in {store.url}", lambda: _check_store(store, job))
    if data:
        yield _run_check("data", lambda: _check_data(data, job))
    for what, check in backend.doctor_checks().items():
        yield _run_check(what, lambda check=check: check(job))  # type: ignore[misc]


def _run_check(what: str, check: Callable[[], Finding | str]) -> Finding:
    """Return the finding of a check; an RsbError is a finding, too."""
    try:
        found = check()
    except RsbError as error:
        message, _, advice = str(error).rpartition(". ")
        return Finding(what, message or str(error), advice or "see the message")
    return found if isinstance(found, Finding) else Finding(what, found)


def _check_store(store: Store, job: Job) -> Finding | str:
    what = f"runs in {store.url}"
    if backend_of(job).needs_object_store and not is_s3(store.url):
        return Finding(what, "cloud machines cannot reach this folder", "Use --runs s3://bucket/runs.")
    name = f"probe-{uuid.uuid4().hex}"
    try:
        first, second = store.create_bytes(name, b"first"), store.create_bytes(name, b"second")
        if store.read_bytes(name) != b"first" or not first or second:
            return Finding(
                what,
                "writable, but exclusive creation does not work (the server ignores If-None-Match)",
                "Never submit a run again while it is running, or use another server.",
            )
    finally:
        store.delete(name)
    host = urlsplit(endpoint_url() or "").hostname or ""
    if backend_of(job).needs_object_store and (host == "localhost" or host.startswith("127.")):
        return Finding(
            what,
            f"writable, but only from this machine: the endpoint is {host}",
            "Use an address that the nodes can reach.",
        )
    return "files can be written, read, deleted and created exclusively"


def _check_data(url: str, job: Job) -> str:
    found = find_data(Path(url).name, url, job)
    if not found.is_found:
        raise StorageError(found.problem)
    assert found.train is not None and found.val is not None
    return f"{found.url}: {found.train.num_samples:,} training images, {found.val.num_samples:,} validation images"
