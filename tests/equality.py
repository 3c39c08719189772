"""Whether two runs are the same mathematics, to the last bit."""

from __future__ import annotations

from typing import Any

import torch

from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.metrics import MetricsRow, read_rows
from rsb_cluster.runs.run import Run
from rsb_cluster.runs.sample_log import MicroBatch, micro_batches
from rsb_cluster.train.state import from_files

# What two runs of the same mathematics may differ in: the clock, and who did it.
CLOCK = (
    "time", "images_per_s", "data_wait_s", "bytes_read", "read_amplification", "attempt", "step_s_p50", "step_s_p99",
    "slowest_rank", "slowest_host", "slowest_by", "gpu_memory_bytes", "gpu_utilization", "gpu_power_w", "gpu_energy_j",
)  # fmt: skip


def rows_of(run: Run) -> list[MetricsRow]:
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_rows(run)]


def final_state(run: Run) -> dict[str, Any]:
    """All tensors of the last checkpoint."""
    starts = {attempt.number: attempt.start_step for attempt in run.attempts()}
    found = checkpoint.read_latest(run.store.child("checkpoints"), starts)
    assert found is not None
    return from_files(found)[1]


def samples_of(run: Run) -> dict[tuple[int, int], MicroBatch]:
    """What each micro-batch held that became part of the run."""
    kept: dict[tuple[int, int], MicroBatch] = {}
    for attempt in run.attempts():
        kept = {key: held for key, held in kept.items() if key[0] < attempt.start_step}
        kept |= micro_batches(run, attempt.number)
    return kept


def assert_bit_equal(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_bit_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_bit_equal(a, b, f"{where}/{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def logits(model: torch.nn.Module, side: int = 16) -> torch.Tensor:
    """What a network says of four images of noise, always the same."""
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(images)
    return found
