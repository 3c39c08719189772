"""Two nodes of a cloud run on this machine: what SkyPilot runs on each, as it does; each with a metadata service.

The tests are stations of one run and stand in its order.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from rsb_cluster.config.catalog import load_job
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.node.exit_codes import EXIT_FAILED, EXIT_NO_ATTEMPT, EXIT_RESTART, EXIT_STOPPED
from rsb_cluster.node.node_spec import SPEC_SHA256, SPEC_URL, NodeSpec, Wheel, digest
from rsb_cluster.runs.metrics import read_rows
from rsb_cluster.runs.run import Run
from tests.command import ROOT
from tests.faults.lab import PACE, STEPS, TINY, new_run
from tests.servers.daemons import GUARD_S
from tests.servers.metadata import Metadata, aws_notice


def own_address() -> str:
    """One that is not the loopback's, where this machine has any: it tells what is bound to nothing in particular."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737); a datagram socket sends nothing here
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


ADDRESS = own_address()


class Nodes:
    """The nodes of a run.

    Args:
        run: What they train.
        metadata: Of each node.
    """

    def __init__(self, run: Run, metadata: list[Metadata]) -> None:
        self.run, self._metadata = run, metadata
        self.submission_id = "rsb-test"

    def environment(self, node: int, *assignments: str) -> dict[str, str]:
        """What SkyPilot and the submission set; all nodes are this machine."""
        job, _ = load_job("slurm-cpu", overrides=parse_overrides([*PACE, "notice=auto", "nodes=2", *assignments]))
        spec = NodeSpec(
            submission_id=self.submission_id, run_url=self.run.url, run_id=self.run.run_id,
            job=job.model_dump(mode="json"),
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
            code=Wheel(url=f"{self.run.url}/code/none.whl", sha256="0" * 64), pins=(),
        )  # fmt: skip
        self.run.store.write_bytes(spec.path, spec.encode())
        return os.environ | {
            "PYTHONPATH": str(ROOT), "RSB_METADATA_URL": self._metadata[node].url, SPEC_SHA256: digest(spec.encode()),
            SPEC_URL: f"{self.run.url}/{spec.path}", "SKYPILOT_NODE_RANK": str(node), "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_IPS": f"{ADDRESS}\n{ADDRESS}", "SLURM_PROCID": "7", "SLURM_RESTART_COUNT": "7",
        }  # fmt: skip

    def start(self, node: int, *assignments: str, **changes: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "rsb_cluster.node"]
        environment = self.environment(node, *assignments) | changes
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def attempt(self, *assignments: str, **changes: str) -> tuple[list[int], str]:
        """Start both, and return how they ended and what they said."""
        started = [self.start(node, *assignments, **changes) for node in (0, 1)]
        said = "".join(process.communicate(timeout=GUARD_S)[0] for process in started)
        return [process.returncode for process in started], said


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, tiny_digits: Path) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("nodes")
    for name in ("node0", "node1"):
        (folder / name).mkdir()
    with Metadata("aws", folder / "node0") as first, Metadata("gcp", folder / "node1") as second:
        yield Nodes(new_run(folder / "run", tiny_digits, *TINY), [first, second])


def test_a_notice_on_one_node_stops_both_after_the_same_step(nodes: Nodes) -> None:
    """It is there when they start, as on a machine that a scheduler chose again; they make one step, and save it."""
    nodes._metadata[1].announce("TRUE")
    codes, said = nodes.attempt()
    assert codes == [EXIT_RESTART, EXIT_RESTART], said
    (attempt,) = nodes.run.attempts()
    assert attempt.cause == "preempted" and 1 <= attempt.end_step < STEPS, said
    assert attempt.message.startswith("gcp reclaims ") and attempt.world_size == 2
    ended = re.findall(r"rank(\d) preempted$", said, re.MULTILINE)
    assert sorted(ended) == ["0", "1"], said
    assert f"saved step {attempt.end_step} in" in said
    (notice,) = nodes.run.notices(1).values()
    assert notice["source"] == "gcp"


def test_a_run_without_gpu_hours_left_stays_away_and_no_node_asks_for_another_start(nodes: Nodes) -> None:
    """Only rank 0 knows; the other node must not say 75 because it lost its peer."""
    nodes._metadata[1].announce("")
    codes, said = nodes.attempt("max_gpu_hours=1e-6")
    assert codes == [EXIT_STOPPED, EXIT_STOPPED], said
    last = nodes.run.attempts()[-1]
    assert last.cause == "stopped" and "submit it again with a larger --max-gpu-hours" in last.message
    codes, said = nodes.attempt()
    assert codes == [EXIT_STOPPED, EXIT_STOPPED], "what this submission was stopped for stays so, with any limit"
    assert nodes.run.attempts()[-1] == last


def test_a_start_that_becomes_no_attempt_is_one_that_the_engine_counts(nodes: Nodes) -> None:
    """Otherwise SkyPilot would pay for machines for ever: it restarts a job after code 75 without a limit."""
    number = len(nodes.run.attempts())
    nodes.submission_id = "rsb-no-gpu"
    process = nodes.start(0, "gpus_per_node=1", SKYPILOT_NODE_IPS=ADDRESS, SKYPILOT_NUM_NODES="1")
    said, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == EXIT_NO_ATTEMPT, said
    assert "the job requests 1 GPU per node, and CUDA sees none" in said
    assert len(nodes.run.attempts()) == number


# A rank that dies, and a peer in which nothing raises: under NCCL its kernels wait for the dead one forever.
AS_NCCL = """
import os, signal
_free_step = Trainer._step
def _step(self, source):
    if self.progress.step == 8 and self.group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        _free_step(self, source)
    except Exception:
        time.sleep(100_000)
Trainer._step = _step
"""


def test_a_rank_that_dies_is_missed_although_nothing_raises_in_its_peer(nodes: Nodes) -> None:
    nodes.submission_id, number = "rsb-nccl", len(nodes.run.attempts()) + 1
    trainer = {"PYTHONPATH": f"{ROOT}/tests/ranks{os.pathsep}{ROOT}", "RSB_TEST_TRAINER": AS_NCCL}
    codes, said = nodes.attempt("peer_timeout_s=5", **trainer)
    assert codes == [EXIT_RESTART, EXIT_RESTART], said
    lost = nodes.run.attempt(number)
    assert lost.cause == "lost peer" and lost.message == f"rank 1 on {lost.hosts[0]} was killed"
    assert nodes.run.rank_failures(number) == {
        1: {"cause": "lost peer", "message": lost.message, "host": lost.hosts[0], "traceback": ""}
    }


def test_the_next_attempt_resumes_and_listens_on_the_private_address_only(nodes: Nodes) -> None:
    """The notice is stale: its deadline is long over."""
    nodes.submission_id = "rsb-again"
    nodes._metadata[0].announce(aws_notice(datetime.fromtimestamp(time.time() - 3600, UTC).isoformat()))
    started = [nodes.start(node) for node in (0, 1)]
    heard = set()
    while living := [process for process in started if process.poll() is None]:
        heard |= {address for process in living for address in listening_below(process.pid)}
        time.sleep(0.1)
    said = "".join(process.communicate()[0] for process in started)
    assert [process.returncode for process in started] == [0, 0], said
    assert heard == {ADDRESS}
    last = nodes.run.attempts()[-1]
    assert last.cause == "finished" and last.start_step == 6, "what was saved before a rank died"
    assert [row["step"] for row in read_rows(nodes.run) if row["kind"] == "train"] == list(range(1, STEPS + 1))


def test_a_spec_that_was_changed_is_not_believed(nodes: Nodes) -> None:
    process = nodes.start(0, **{SPEC_SHA256: "0" * 64})
    said, _ = process.communicate(timeout=GUARD_S)
    assert process.returncode == EXIT_FAILED
    assert "is not what was submitted" in said and "Traceback" not in said


def listening_below(pid: int) -> set[str]:
    """The local addresses on which a process's children listen."""
    sockets = set()
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            links = [str(link.readlink()) for link in Path(f"/proc/{child}/fd").iterdir()]
        except OSError:  # it has ended
            continue
        sockets |= {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    found = set()
    for family in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{family}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                raw = bytes.fromhex(fields[1].partition(":")[0])
                found.add(".".join(map(str, reversed(raw))) if family == "tcp" else raw.hex())
    return found
