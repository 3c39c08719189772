"""All calls of SkyPilot. A managed job is identified by its name, which is the submission's id.

SkyPilot's own job numbers are not used to identify jobs: another API server has other jobs of the same numbers.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.storage.redact import redact

NAME_PREFIX = "rsb-"

# The fields to query; by default SkyPilot sends the whole task of each job.
_FIELDS = ("job_id", "job_name", "status", "recovery_count", "failure_reason", "details", "submitted_at")

_LOG_LINES = 20_000  # of a controller's log, some hundreds for each launch


@dataclass(frozen=True)
class EngineJob:
    """A managed job as SkyPilot reports it.

    Attributes:
        number: SkyPilot's job id.
        state: SkyPilot's state: PENDING, STARTING, RUNNING, RECOVERING, SUCCEEDED ...
        recoveries: How often SkyPilot restarted it.
        reason: Why it failed, or empty.
        details: What SkyPilot says that it waits for, or empty.
    """

    number: int
    state: str
    recoveries: int
    reason: str
    details: str = ""


def check_installed() -> None:
    """Raise SubmitError if SkyPilot is not installed."""
    if importlib.util.find_spec("sky") is None:
        raise SubmitError("SkyPilot is not installed here. Use pip install 'rsb-cluster[cloud]', then 'sky check'.")


@dataclass(frozen=True)
class Server:
    """SkyPilot's API server."""

    url: str
    version: str
    is_local: bool


def version() -> str:
    """Return the version of the installed SkyPilot."""
    return importlib.metadata.version("skypilot")


def server() -> Server:
    """Return the API server; a local one is started if none is running."""
    with _sky() as sky:
        from sky.server import common

        common.check_server_healthy_or_start_fn()
        health = sky.api_info()
        url = common.get_server_url()
        return Server(url, str(health.version), bool(common.is_api_server_local(url)))


def enabled_clouds() -> list[str]:
    """Return the clouds for which SkyPilot has credentials, by their names in ``infra``."""
    with _sky() as sky:
        from sky.client import sdk

        return sorted(str(cloud).lower() for cloud in sky.get(sdk.enabled_clouds()))


def secret_values(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the secrets for the nodes from this shell's environment. Raises ConfigError if one is not set."""
    if missing := [name for name in names if not os.environ.get(name)]:
        raise ConfigError(f"cloud.secrets: {', '.join(missing)} is not set in this shell. Export it, or leave it out.")
    return [(name, os.environ[name]) for name in names]


def launch(tasks: Sequence[dict[str, Any]], *, pool: str) -> None:
    """Submit tasks as managed jobs; return when SkyPilot has accepted all.

    Raises:
        SubmitError: SkyPilot refused a task; those before it are queued.
    """
    with _sky() as sky:
        requests = []
        for task in tasks:
            secrets = secret_values(list(task.get("secrets", {})))
            sky_task = sky.Task.from_yaml_config(dict(task), secrets_overrides=secrets)
            requests.append(sky.jobs.launch(sky_task, name=task["name"], pool=pool or None))
        for request in requests:
            sky.get(request)


def jobs() -> dict[str, EngineJob]:
    """Return this package's managed jobs by name, including those that have ended; one query."""
    with _sky() as sky:
        try:
            request = sky.jobs.queue_v2(refresh=False, name_match=NAME_PREFIX, fields=_FIELDS)
            records = sky.get(request)[0]
        except sky.exceptions.ClusterNotUpError:
            return {}  # no controller, no jobs
        return {
            record.job_name: EngineJob(
                record.job_id,
                record.status.value,
                record.recovery_count or 0,
                redact(record.failure_reason or ""),
                redact(record.details or ""),
            )
            for record in records
        }


def controller_log(number: int) -> str:
    """Return the end of what SkyPilot's controller logged about a managed job: its launches, and why they failed."""
    with _sky() as sky:
        content = io.StringIO()
        sky.jobs.tail_logs(job_id=number, follow=False, controller=True, tail=_LOG_LINES, output_stream=content)
        return redact(content.getvalue())


def cancel(names: Sequence[str]) -> None:
    """Cancel managed jobs by name, and release their machines."""
    numbers = [job.number for name, job in jobs().items() if name in names]
    if numbers:
        with _sky() as sky:
            sky.get(sky.jobs.cancel(job_ids=numbers))


@contextlib.contextmanager
def _sky() -> Iterator[Any]:
    """Yield the library; its output goes to standard error, and its errors become SubmitError."""
    check_installed()
    with contextlib.redirect_stdout(sys.stderr):
        import sky
        import sky.exceptions
        import sky.jobs

        try:
            yield sky
        except Exception as error:
            if not _is_from_sky(error):
                raise
            text = redact(" ".join(str(error).split())) or type(error).__name__
            raise SubmitError(f"SkyPilot: {text}. 'sky check' shows which clouds can be used.") from error


def _is_from_sky(error: Exception) -> bool:
    """Whether an error was raised in or below SkyPilot's code; any other is a bug and keeps its traceback."""
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "sky":
            return True
        frame = frame.tb_next
    return False
