"""The sample log puts the parts of a micro-batch together."""

import json
from pathlib import Path

import pytest

from rsb_cluster.errors import StorageError
from rsb_cluster.runs.run import Run
from rsb_cluster.runs.sample_log import MicroBatch, lines, micro_batches
from rsb_cluster.storage.store import Store


def write(run: Run, name: str, *rows: dict[str, object]) -> None:
    run.store.write_bytes(f"samples/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())


def row(step: int, samples: list[int], pixels: int, **more: object) -> dict[str, object]:
    return {"step": step, "virtual_rank": 0, "samples": samples, "pixels": pixels, "shares": 7} | more


def test_parts_of_several_processes_are_the_micro_batch_of_one(tmp_path: Path) -> None:
    run = Run(Store(tmp_path), "x")
    write(run, "0001-rank00000", row(3, [10, 13], 2**32 - 1, slots=[0, 3]), row(4, [1, 2, 3, 4], 9))
    write(run, "0001-rank00001", row(3, [11, 12], 6, slots=[1, 2]))
    write(run, "0002-rank00000", row(3, [10, 11, 12, 13], 5, shares=14))
    whole = MicroBatch(((0, 10), (1, 11), (2, 12), (3, 13)), 5, 14)
    assert micro_batches(run, 1) == {(3, 0): whole, (4, 0): MicroBatch(((0, 1), (1, 2), (2, 3), (3, 4)), 9, 7)}
    assert micro_batches(run, 2) == {(3, 0): whole}
    assert len(list(lines(run))) == 4


def test_a_part_that_was_computed_twice_is_an_error(tmp_path: Path) -> None:
    run = Run(Store(tmp_path), "x")
    write(run, "0001-rank00000", row(3, [10, 13], 1, slots=[0, 3]))
    write(run, "0001-rank00001", row(3, [11, 13], 1, slots=[1, 3]))
    with pytest.raises(StorageError, match=r"attempt 1 computed a part of micro-batch \(3, 0\) twice"):
        micro_batches(run, 1)
