"""What SkyPilot runs on each node of a cloud run: starts a rank per GPU, and speaks for them to the engine.

Its exit code is 0 where the run is finished, 75 where it is to be started again (state is saved, or a peer was lost),
and 76 where this start did not become an attempt, which the engine allows a few times only; anything else is an end
that another start would not mend. What the ranks log is its own output, so ``sky jobs logs`` has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from types import FrameType

from rsb_cluster.config.job import Job
from rsb_cluster.config.schema import read_record
from rsb_cluster.errors import AccessError, ConfigError, MissingError, RsbError, StorageError
from rsb_cluster.node import processes
from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_NO_ATTEMPT, EXIT_RESTART, combine_exit_codes
from rsb_cluster.node.node_spec import COPY_LOGS, SPEC_SHA256, SPEC_URL, NodeSpec, decode
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store

_SIOCGIFADDR = 0x8915  # linux/sockios.h

# What a node passes on to its ranks.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


def main(environment: Mapping[str, str]) -> int:
    """Run this node's ranks to their end, and return the exit code."""
    try:
        spec = _read_spec(environment)
        job = read_record(Job, spec.job, "the submitted job")
        shared = _environment_of_ranks(environment, spec, job)
    except RsbError as error:
        sys.stderr.write(f"error: {error}\n")
        is_passing = isinstance(error, StorageError) and not isinstance(error, AccessError | MissingError)
        return EXIT_NO_ATTEMPT if is_passing else EXIT_FAILED
    first = int(environment["SKYPILOT_NODE_RANK"]) * job.ranks_per_node
    task = json.dumps({"run_url": spec.run_url, "run_id": spec.run_id, "job": spec.job}).encode()
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        processes.send_signal(ranks, number)

    for number in _SIGNALS:
        signal.signal(number, pass_on)
    for local_rank in range(job.ranks_per_node):
        numbers = {"RSB_RANK": str(first + local_rank), "RSB_LOCAL_RANK": str(local_rank)}
        command = [sys.executable, "-u", "-m", "rsb_cluster.node.rank"]
        ranks.append(subprocess.Popen(command, env=shared | numbers, stdin=subprocess.PIPE))
    for rank in ranks:
        assert rank.stdin is not None
        with contextlib.suppress(BrokenPipeError), rank.stdin:
            rank.stdin.write(task)
    code = combine_exit_codes(processes.wait_for_all(ranks))
    return EXIT_NO_ATTEMPT if code == EXIT_RESTART and not _was_claimed(spec, shared) else code


def _read_spec(environment: Mapping[str, str]) -> NodeSpec:
    try:
        url, sha256 = environment[SPEC_URL], environment[SPEC_SHA256]
    except KeyError as error:
        raise ConfigError(f"${error.args[0]} is not set; SkyPilot sets it on the nodes of a cloud run.") from error
    folder, _, name = url.rpartition("/")
    return decode(Store(folder).read_bytes(name), url, sha256)


def _was_claimed(spec: NodeSpec, shared: Mapping[str, str]) -> bool:
    """Whether this start has become an attempt, as far as the run's folder can be read."""
    try:
        return _attempts_so_far(spec) > int(shared["RSB_LOCAL_RESTART"])
    except StorageError:
        return False


def _attempts_so_far(spec: NodeSpec) -> int:
    """Return the number of the run's last attempt, 0 before the first."""
    return next(reversed(Run(Store(spec.run_url), spec.run_id).attempt_numbers()), 0)


def _environment_of_ranks(environment: Mapping[str, str], spec: NodeSpec, job: Job) -> dict[str, str]:
    """Return what all ranks of this node find in their environment.

    The engine does not say how often it has started the run. The number of the last attempt does: a new one is claimed
    only when all ranks have met, so every node of one start reads the same.
    """
    nodes = environment["SKYPILOT_NODE_IPS"].split()
    # The private one, as the engine has it; a node that is alone talks to nobody.
    address = nodes[int(environment["SKYPILOT_NODE_RANK"])] if len(nodes) > 1 else "127.0.0.1"
    interface = _interface_of(address)
    # Of SkyPilot's own cluster, where that is a Slurm: the ranks are not its tasks.
    ours = {key: value for key, value in environment.items() if not key.startswith("SLURM_")}
    return {
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        **ours,
        "SUBMITIT_EXECUTOR": "sky",
        "RSB_JOB_ID": spec.submission_id,
        "RSB_WORLD_SIZE": str(len(nodes) * job.ranks_per_node),
        "RSB_LOCAL_RESTART": str(_attempts_so_far(spec)),
        "RSB_ADDRESS": address,
        COPY_LOGS: "1",
    }


def _interface_of(address: str) -> str:
    """Return the network interface that has an IPv4 address.

    Raises:
        ConfigError: None of this machine has it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    raise ConfigError(f"no network interface of this machine has the address {address} that SkyPilot gave it.")


if __name__ == "__main__":
    sys.exit(main(os.environ))
