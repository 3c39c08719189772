"""The checks of ``doctor`` for a cloud job: what the nodes will get, SkyPilot, its clouds, and the network."""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from rsb_cluster.backends.base import Check, Finding
from rsb_cluster.backends.skypilot import engine, wheel
from rsb_cluster.config.job import Job

# SkyPilot's jobs controller probes the first, then the second, before it concludes that a machine is gone
# (sky/backends/backend_utils.py in 0.14); without an answer it never restarts a job.
PROBES = ("https://8.8.8.8", "https://1.1.1.1")
PACKAGES = "https://pypi.org/simple/uv/"
TIMEOUT_S = 10.0


def _python(job: Job) -> str:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{version}; uv installs the same version on each node, from its image or from GitHub"


def _code(job: Job) -> str:
    built = wheel.build()
    return f"{built.filename}, {len(built.content) / 1e6:.1f} MB, {len(wheel.pins())} packages pinned"


def _secrets(job: Job) -> str:
    engine.secret_values(job.cloud.secrets)
    return (
        ", ".join(job.cloud.secrets)
        or "none passed: the machines' role, or the credentials that SkyPilot copies, must give access to runs and data"
    )


def _skypilot(job: Job) -> str:
    engine.check_installed()
    return engine.version()


def _server(job: Job) -> Finding | str:
    server = engine.server()
    if server.is_local:
        return f"{server.url}, on this machine: while it sleeps, jobs are not restarted, unless a controller VM is used"
    return f"{server.url}, version {server.version}"


def _clouds(job: Job) -> Finding | str:
    enabled = engine.enabled_clouds()
    wanted = {"kubernetes" if where in ("k8s", "kubernetes") else where for where in _clouds_of(job)}
    if missing := sorted(wanted - set(enabled)) or (["any"] if not enabled else []):
        return Finding(
            "clouds",
            f"enabled: {', '.join(enabled) or 'none'}; missing: {', '.join(missing)}",
            "Run 'sky check', which shows why.",
        )
    return ", ".join(enabled)


def _clouds_of(job: Job) -> set[str]:
    return {where.split("/")[0].lower() for where in job.cloud.infra}


def _bounds(job: Job) -> str:
    return (
        f"at most {job.cloud.max_restarts} after failures of our own set-up (cloud.max_restarts); launches that fail "
        "before it (no capacity, nodes that SkyPilot cannot set up) have none: 'status' counts them, 'cancel' ends them"
    )


def _egress(job: Job) -> Finding | str:
    if not any(map(_answers, PROBES)):
        return Finding(
            "network",
            f"neither {' nor '.join(PROBES)} answers on this machine",
            "SkyPilot's jobs controller must reach one of them: else it never restarts a preempted job.",
        )
    if not _answers(PACKAGES):
        return Finding(
            "network", f"{PACKAGES} does not answer on this machine", "Nodes need a package index: set UV_INDEX_URL."
        )
    return f"{PROBES[0]} or {PROBES[1]} answers; so does {urlsplit(PACKAGES).hostname}, which the nodes need"


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


CHECKS: dict[str, Check] = {
    "Python": _python,
    "code": _code,
    "secrets": _secrets,
    "SkyPilot": _skypilot,
    "API server": _server,
    "clouds": _clouds,
    "restarts": _bounds,
    "network": _egress,
}
