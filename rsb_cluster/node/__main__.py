"""The program that SkyPilot runs on each node of a cloud run: starts one rank per GPU and reports their exit code.

The exit code is 0 if the run has finished, 75 if the job must be restarted (its state is saved, or a peer was lost),
and 76 if this start did not become an attempt, which SkyPilot retries only a few times. Any other code is a permanent
failure. The ranks log to the output of this process, so ``sky jobs logs`` shows their logs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import FrameType

from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import read_record
from rsb_cluster.errors import AccessError, ConfigError, MissingError, RsbError, StorageError
from rsb_cluster.node import processes
from rsb_cluster.node.addresses import LOOPBACK, find_interface
from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_NO_ATTEMPT, EXIT_RESTART, combine_exit_codes
from rsb_cluster.node.node_spec import COPY_LOGS, SPEC_SHA256, SPEC_URL, NodeSpec, decode
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.subprocesses.interpreter import interpreter

_FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def main(environment: Mapping[str, str]) -> int:
    """Run the ranks of this node until they exit, and return the exit code."""
    try:
        spec = _read_spec(environment)
        job = read_record(Job, spec.job, "the submitted job")
        shared = _rank_environment(environment, spec, job)
    except RsbError as error:
        sys.stderr.write(f"error: {error}\n")
        is_transient = isinstance(error, StorageError) and not isinstance(error, AccessError | MissingError)
        return EXIT_NO_ATTEMPT if is_transient else EXIT_FAILED
    first_rank = int(environment["SKYPILOT_NODE_RANK"]) * job.ranks_per_node
    task = json.dumps({"run_url": spec.run_url, "run_id": spec.run_id, "job": spec.job, "data": spec.data}).encode()
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        processes.send_signal(ranks, number)

    for number in _FORWARDED_SIGNALS:
        signal.signal(number, forward)
    for local_rank in range(job.ranks_per_node):
        numbers = {"RSB_RANK": str(first_rank + local_rank), "RSB_LOCAL_RANK": str(local_rank)}
        command = [*interpreter(), "-u", "-m", "rsb_cluster.node.rank"]
        ranks.append(subprocess.Popen(command, env=shared | numbers, stdin=subprocess.PIPE))
    for rank in ranks:
        assert rank.stdin is not None
        with contextlib.suppress(BrokenPipeError), rank.stdin:
            rank.stdin.write(task)
    code = combine_exit_codes(processes.wait_for_all(ranks))
    return EXIT_NO_ATTEMPT if code == EXIT_RESTART and not _became_attempt(spec, shared) else code


def _read_spec(environment: Mapping[str, str]) -> NodeSpec:
    try:
        url, sha256 = environment[SPEC_URL], environment[SPEC_SHA256]
    except KeyError as error:
        raise ConfigError(f"${error.args[0]} is not set; SkyPilot sets it on the nodes of a cloud run.") from error
    folder, _, name = url.rpartition("/")
    return decode(Store(folder).read_bytes(name), url, sha256)


def _became_attempt(spec: NodeSpec, shared: Mapping[str, str]) -> bool:
    """Whether this start has become an attempt; False if the run's folder cannot be read."""
    try:
        return _last_attempt(spec) > int(shared["RSB_LOCAL_RESTART"])
    except StorageError:
        return False


def _last_attempt(spec: NodeSpec) -> int:
    """Return the number of the run's last attempt, 0 before the first."""
    return next(reversed(Run(Store(spec.run_url), spec.run_id).attempt_numbers()), 0)


def _rank_environment(environment: Mapping[str, str], spec: NodeSpec, job: Job) -> dict[str, str]:
    """Return the environment variables that all ranks of this node share.

    SkyPilot does not say how often it has started the run, so the number of the last attempt stands for that: a new
    attempt is claimed only after the rendezvous of all ranks, so every node of one start reads the same number.
    """
    nodes = environment["SKYPILOT_NODE_IPS"].split()
    # SkyPilot lists private addresses; the ranks of a single node use the loopback.
    address = nodes[int(environment["SKYPILOT_NODE_RANK"])] if len(nodes) > 1 else LOOPBACK
    interface = find_interface(address)
    # Where SkyPilot's own cluster is a Slurm, its variables describe its task and not these ranks.
    inherited = {key: value for key, value in environment.items() if not key.startswith("SLURM_")}
    return {
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        **inherited,
        "SUBMITIT_EXECUTOR": "sky",
        "RSB_JOB_ID": spec.submission_id,
        "RSB_WORLD_SIZE": str(len(nodes) * job.ranks_per_node),
        "RSB_LOCAL_RESTART": str(_last_attempt(spec)),
        "RSB_ADDRESS": address,
        COPY_LOGS: "1",
    }


if __name__ == "__main__":
    sys.exit(main(os.environ))
