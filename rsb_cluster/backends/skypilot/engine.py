"""SkyPilot: the only place that imports it. A managed job is known by its name, which is our submission's id.

So it is found again whatever number the engine gave it, and a job of that number on another API server is never meant.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.storage.redact import redact

NAME_PREFIX = "rsb-"

# Of the engine's answer; without them it sends each job's whole task.
_FIELDS = ("job_id", "job_name", "status", "recovery_count", "failure_reason", "submitted_at")


@dataclass(frozen=True)
class EngineJob:
    """A managed job as SkyPilot sees it.

    Attributes:
        number: SkyPilot's own id.
        state: SkyPilot's own word: PENDING, STARTING, RUNNING, RECOVERING, SUCCEEDED ...
        recoveries: How often it was started again.
        reason: Why it failed, or empty.
    """

    number: int
    state: str
    recoveries: int
    reason: str


def check_installed() -> None:
    """Refuse where SkyPilot is missing."""
    if importlib.util.find_spec("sky") is None:
        raise SubmitError("SkyPilot is not installed here. Use pip install 'rsb-cluster[cloud]', then 'sky check'.")


@dataclass(frozen=True)
class Server:
    """SkyPilot's API server."""

    url: str
    version: str
    is_local: bool


def version() -> str:
    """Return the version of the library."""
    return importlib.metadata.version("skypilot")


def server() -> Server:
    """Ask the API server how it is; one on this machine is started where none runs."""
    with _sky() as sky:
        from sky.server import common

        common.check_server_healthy_or_start_fn()
        health = sky.api_info()
        url = common.get_server_url()
        return Server(url, str(health.version), bool(common.is_api_server_local(url)))


def enabled_clouds() -> list[str]:
    """Return the clouds for which SkyPilot has found credentials, as ``infra`` names them."""
    with _sky() as sky:
        from sky.client import sdk

        return sorted(str(cloud).lower() for cloud in sky.get(sdk.enabled_clouds()))


def secret_values(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the variables of this shell that SkyPilot is to hand over to the nodes. Raises ConfigError."""
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ConfigError(f"cloud.secrets: {', '.join(missing)} is not set in this shell. Use export, or leave it out.")
    return [(name, os.environ[name]) for name in names]


def launch(tasks: Sequence[dict[str, Any]], *, pool: str) -> None:
    """Hand tasks over as managed jobs; return when SkyPilot has accepted all.

    Raises:
        SubmitError: It refused one; those before it are queued.
    """
    with _sky() as sky:
        requests = []
        for task in tasks:
            secrets = secret_values(list(task.get("secrets", {})))
            made = sky.Task.from_yaml_config(dict(task), secrets_overrides=secrets)
            requests.append(sky.jobs.launch(made, name=task["name"], pool=pool or None))
        for request in requests:
            sky.get(request)


def jobs() -> dict[str, EngineJob]:
    """Return our managed jobs by name, those that have ended as well; one query."""
    with _sky() as sky:
        try:
            request = sky.jobs.queue_v2(refresh=False, name_match=NAME_PREFIX, fields=_FIELDS)
            records = sky.get(request)[0]
        except sky.exceptions.ClusterNotUpError:
            return {}  # no controller, no jobs
        return {
            record.job_name: EngineJob(
                record.job_id, record.status.value, record.recovery_count or 0, redact(record.failure_reason or "")
            )
            for record in records
        }


def cancel(names: Sequence[str]) -> None:
    """End managed jobs and give their machines back, if they are not over."""
    numbers = [job.number for name, job in jobs().items() if name in names]
    if numbers:
        with _sky() as sky:
            sky.get(sky.jobs.cancel(job_ids=numbers))


@contextlib.contextmanager
def _sky() -> Iterator[Any]:
    """Give the library; what it prints goes to standard error, what it raises becomes ours."""
    check_installed()
    with contextlib.redirect_stdout(sys.stderr):
        import sky
        import sky.exceptions
        import sky.jobs

        try:
            yield sky
        except Exception as error:
            if not _is_engines(error):
                raise
            text = redact(" ".join(str(error).split())) or type(error).__name__
            raise SubmitError(f"SkyPilot: {text}. 'sky check' says which clouds can be used.") from error


def _is_engines(error: Exception) -> bool:
    """Whether an error comes from SkyPilot or from the way to its API server; a bug of ours keeps its traceback."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "sky":
            return True
        frame = frame.tb_next
    return False
