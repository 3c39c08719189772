"""Too little disk, too little memory, and shards that are not those of the index. One process, in this one."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from rsb_cluster.data.make import make_set
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from tests.equality import assert_bit_equal, final_state, rows_of
from tests.faults.lab import STEPS, AtStep, Lab, few_digits, fill


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    small_disk: Path, tiny_digits: Path, tiny_unbroken: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    """Saves fail and are named; training goes on with the checkpoint before, and saves again when there is room."""
    lab = Lab(small_disk / "run", tiny_digits)
    attempt = lab.attempt(AtStep({4: lambda: fill(small_disk), 11: (small_disk / "filler").unlink}))
    assert attempt.cause == "finished"
    said = capfd.readouterr().err
    assert "No space left on device" in said and "Free some space, or choose another folder." in said
    assert rows_of(lab.run) == rows_of(tiny_unbroken)
    assert_bit_equal(final_state(lab.run), final_state(tiny_unbroken))


def test_a_disk_that_stays_full_ends_the_attempt_and_the_last_whole_checkpoint_is_used(
    small_disk: Path, tiny_digits: Path, tiny_unbroken: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(small_disk / "run", tiny_digits)
    lab.attempt(AtStep({4: lambda: fill(small_disk)}))
    said = capfd.readouterr().err
    assert "crashed: cannot use" in said and "No space left on device. Free some space" in said.replace("'", "")
    assert [saved.step for saved in checkpoint.list_checkpoints(lab.checkpoints, {})] == [3], (
        "none that is half written counts"
    )
    (small_disk / "filler").unlink()
    attempt = lab.attempt()
    assert (attempt.cause, attempt.start_step, attempt.end_step) == ("finished", 3, STEPS)
    assert rows_of(lab.run) == rows_of(tiny_unbroken)
    assert_bit_equal(final_state(lab.run), final_state(tiny_unbroken))


def test_too_little_memory_is_named(tmp_path: Path, tiny_digits: Path) -> None:
    """The process may not have more from its second step on, each of which needs a hundred megabytes."""
    lab = Lab(tmp_path / "run", tiny_digits, "augment.resolution=512")
    before = resource.getrlimit(resource.RLIMIT_AS)

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (32 << 20), before[1]))

    try:
        attempt = lab.attempt(AtStep({1: limit}))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert attempt.cause == "failed"
    assert attempt.message.startswith("out of memory: ")
    assert "--virtual-ranks" in attempt.message and "job.mem_gb" in attempt.message


CHANGES = {
    "truncated": (lambda shard: shard[: len(shard) // 2], "was replaced or damaged"),
    "replaced": (lambda shard: shard[5120:] + shard[:5120], "was replaced"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_shard_that_was_changed_after_indexing_ends_the_run(tmp_path: Path, kind: str) -> None:
    """Each way in which a shard can differ is in tests/unit/data/test_reader.py."""
    change, message = CHANGES[kind]
    data = tmp_path / "data"
    make_set(few_digits(), Store(data), shard_samples=20)
    lab = Lab(tmp_path / "run", data)
    for shard in (data / "train").glob("*.tar"):
        shard.write_bytes(change(shard.read_bytes()))
    attempt = lab.attempt()
    assert attempt.cause == "failed" and attempt.end_step == 0
    assert message in attempt.message and "shards verify" in attempt.message
