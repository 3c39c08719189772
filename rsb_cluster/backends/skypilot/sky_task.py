"""The SkyPilot task of a submission, as a pure function of its spec: a dry run shows it, and tests compare it."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from typing import Any

from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import read_record
from rsb_cluster.errors import ConfigError
from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_RESTART, EXIT_STOPPED
from rsb_cluster.node.node_spec import SPEC_SHA256, SPEC_URL, NodeSpec, digest
from rsb_cluster.storage.redact import redact
from rsb_cluster.storage.s3_settings import ANONYMOUS, REQUESTER_PAYS

# When a node exits, SkyPilot kills the others, and may report their exit code first: 128 + SIGTERM.
_RESTART_CODES = [EXIT_RESTART, 143]

# SkyPilot restarts a job after any exit code but 0, up to max_restarts_on_errors times. A run that failed permanently,
# was stopped, or exceeded its GPU-hour budget would each time cost new machines only to fail again. So its job exits
# with 0; the run's folder holds the reason.
_RUN = f"""\
code=0
"{{python}}" -P -m rsb_cluster.node || code=$?
case "$code" in
  {EXIT_FAILED}|{EXIT_STOPPED}) echo "the run ended permanently, exit code $code; see its folder"; exit 0 ;;
esac
exit "$code"
"""

# How the object store is reached; the nodes use their own credentials.
STORE_VARIABLES = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION", ANONYMOUS, REQUESTER_PAYS,
)  # fmt: skip

# Runs on a node before this package is installed.
_FETCH = """\
import fsspec, hashlib, sys
url, sha256, path = sys.argv[1:]
with fsspec.open(url) as file:
    content = file.read()
if hashlib.sha256(content).hexdigest() != sha256:
    sys.exit(url + " is not the code that was submitted")
with open(path, "wb") as file:
    file.write(content)"""


def sky_task(spec: NodeSpec, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return the task of a submission, with the keys of SkyPilot's YAML.

    Args:
        spec: What the nodes will do.
        environment: Environment of the submitting shell; only the address of the object store is taken from it.

    Raises:
        ConfigError: The address contains a password.
    """
    job = read_record(Job, spec.job, "the submitted job")
    store = {name: environment[name] for name in STORE_VARIABLES if environment.get(name)}
    for name, value in store.items():
        if redact(value) != value:
            raise ConfigError(
                f"${name} contains a password, which would be written into the task. Remove it from the URL."
            )
    venv = f"$HOME/.rsb-cluster/{_environment_digest(spec, job)}"
    task: dict[str, Any] = {
        "name": spec.submission_id,
        "num_nodes": job.nodes,
        "resources": _resources(job),
        "envs": {
            **store,
            **job.cloud.envs,
            SPEC_URL: f"{spec.run_url}/{spec.path}",
            SPEC_SHA256: digest(spec.encode()),
        },
        "setup": _setup(spec, job, venv),
        "run": _RUN.format(python=f"{venv}/bin/python"),
    }
    if job.cloud.pool:  # a pool runs setup only when it is created, and not for each job
        task["run"] = f"{task.pop('setup')}set +e\n{task['run']}"
    if job.cloud.secrets:
        task["secrets"] = dict.fromkeys(job.cloud.secrets)
    return task


def as_yaml(task: dict[str, Any]) -> str:
    """Return a task as YAML for ``sky jobs launch``."""
    import yaml

    dumper = type("_Dumper", (yaml.SafeDumper,), {})

    def represent(dumper: Any, text: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    dumper.add_representer(str, represent)  # type: ignore[attr-defined]
    content: str = yaml.dump(task, Dumper=dumper, sort_keys=False, width=1000)
    return content


def _resources(job: Job) -> dict[str, Any]:
    cloud = job.cloud
    resources: dict[str, Any] = {
        "use_spot": cloud.spot,
        "disk_size": cloud.disk_gb,
        "job_recovery": {
            "strategy": cloud.recovery,
            "max_restarts_on_errors": cloud.max_restarts,
            "recover_on_exit_codes": _RESTART_CODES,
        },
    }
    if cloud.accelerators:
        resources["accelerators"] = f"{cloud.accelerators.partition(':')[0]}:{cloud.gpus}"
    if cloud.instance_type:
        resources["instance_type"] = cloud.instance_type
    else:
        resources["cpus"] = f"{job.ranks_per_node * job.cpus_per_task}+"
        resources |= {"memory": f"{job.mem_gb:g}+"} if job.mem_gb else {}
    if cloud.image:
        resources["image_id"] = cloud.image
    if len(cloud.infra) == 1:
        resources["infra"] = cloud.infra[0]
    elif cloud.infra:
        resources["any_of"] = [{"infra": where} for where in cloud.infra]
    return resources


def _environment_digest(spec: NodeSpec, job: Job) -> str:
    """Return a name for a node's virtual environment: the next attempt on the node reuses an equal one."""
    parts = [spec.python, spec.code.sha256, *spec.pins, *job.trackers]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _setup(spec: NodeSpec, job: Job, venv: str) -> str:
    """Return the shell lines that make the virtual environment, under a lock, as nodes may share the home folder."""
    wheel = spec.code.url.rpartition("/")[2]
    extras = f"[{','.join(job.trackers)}]" if job.trackers else ""
    install = 'uv pip install --quiet --python "$venv/bin/python" --constraint "$venv/pins.txt"'
    return "\n".join(
        [
            "set -e",
            *job.setup,
            'export PATH="$HOME/.local/bin:$PATH"  # where SkyPilot puts uv',
            f'venv="{venv}"',
            'mkdir -p "$HOME/.rsb-cluster"',
            'exec 9>"$HOME/.rsb-cluster/lock"',
            "flock 9",
            'if [ ! -e "$venv/ready" ]; then',
            f'  uv venv --quiet --clear --python {spec.python} "$venv"',
            "  cat >\"$venv/pins.txt\" <<'END'",
            *spec.pins,
            "END",
            f"  {install} s3fs",
            f'  "$venv/bin/python" -P -c {shlex.quote(_FETCH)} {shlex.quote(spec.code.url)} {spec.code.sha256} '
            f'"$venv/"{shlex.quote(wheel)}',
            f'  {install} "$venv/"{shlex.quote(wheel + extras)}',
            '  touch "$venv/ready"',
            "fi",
            "exec 9>&-",
            "",
        ]
    )
