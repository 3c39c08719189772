"""Stopped anywhere, any number of times, with any option that has state: the end is that of an unbroken run."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from rsb_cluster.config.job import CheckpointPolicy
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.metrics import MetricsRow
from rsb_cluster.train.lost_peer import LostPeerError
from tests.equality import assert_bit_equal, final_state, rows_of
from tests.faults.lab import STEPS, AtStep, Lab, StopAfter

# One of each: what keeps state, draws random numbers, or changes how gradients are added up.
CHOICES = {
    "optimizer": [(), ("optimizer.name=adamw", "optimizer.lr=1e-3"), ("optimizer.name=sgd", "optimizer.lr=0.05")],
    "average": [(), ("train.ema_decay=0.9",)],
    # bf16 is in tests/unit/train/test_trainer.py.
    "precision": [(), ("train.amp=fp16",), ("optimizer.clip_grad_norm=0.5",)],
    "repeats": [(), ("augment.repeats=3",)],
    "noise": [(), ("model.drop_rate=0.2",)],
    "pixels": [(), ("augment.erase_prob=0.5", "augment.rand_augment=rand-m7-mstd0.5-inc1"), ("augment.cutmix=1.0",)],
}
options = st.tuples(*map(st.sampled_from, CHOICES.values())).map(lambda chosen: sum(chosen, ()))
# So many questions to the stop flag until it is set: steps, and batches of the three evaluations.
stops = st.lists(st.integers(1, STEPS), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def unbroken(tiny_digits: Path):  # type: ignore[no-untyped-def]
    @cache
    def result(chosen: tuple[str, ...]) -> tuple[dict[str, Any], list[MetricsRow]]:
        with tempfile.TemporaryDirectory() as folder:
            lab = Lab(Path(folder, "run"), tiny_digits, *chosen)
            assert lab.attempt().cause == "finished"
            return final_state(lab.run), rows_of(lab.run)

    return result


def test_a_save_that_is_due_at_the_end_of_an_epoch_is_made(tmp_path: Path, tiny_digits: Path) -> None:
    """With and without an evaluation there; and not twice at the very end."""
    lab = Lab(tmp_path / "run", tiny_digits, "eval.every_epochs=3")
    lab.job = lab.job.model_copy(update={"checkpoint": CheckpointPolicy(every_steps=STEPS // 3, keep=9)})
    assert lab.attempt().cause == "finished"
    saved = checkpoint.list_checkpoints(lab.checkpoints, {})
    assert [s.step for s in saved] == [STEPS // 3, 2 * STEPS // 3, STEPS]
    assert "model.safetensors" in lab.checkpoints.names(saved[-1].folder), "its first and only save"


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow], phases=[Phase.explicit, Phase.generate])
@given(options, stops, st.sampled_from([0, 2]))
@example((), [1, 1, 1], 0)
def test_a_run_stopped_anywhere_ends_as_if_it_had_not_been(unbroken, tiny_digits, chosen, after, workers) -> None:  # type: ignore[no-untyped-def]
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(Path(folder, "run"), tiny_digits, *chosen)
        lab.job = lab.job.model_copy(update={"loader_workers": workers})
        for times in after:
            if lab.attempt(StopAfter(times)).cause == "finished":
                break
        if lab.run.result() is None:
            assert lab.attempt().cause == "finished"
        state, rows = unbroken(chosen)
        assert_bit_equal(final_state(lab.run), state)
        assert rows_of(lab.run) == rows
        starts = [(a.start_step, a.end_step) for a in lab.run.attempts()]
        assert [end for _, end in starts[:-1]] == [start for start, _ in starts[1:]], "no step is done twice"


def test_the_end_that_a_peer_has_recorded_stays(tmp_path: Path, tiny_digits: Path) -> None:
    """The peer of a suspended rank 0 presumed it dead; rank 0 wakes, and finds the peer lost."""
    lab = Lab(tmp_path / "run", tiny_digits)

    def wake_alone() -> None:
        lab.run.write_attempt(lab.run.attempt(1).model_copy(update={"cause": "stuck", "message": "rank 0", "ended": 1}))
        raise LostPeerError("lost a peer rank")

    ended = lab.attempt(AtStep({5: wake_alone}))
    assert (ended.cause, ended.message, ended.ended) == ("stuck", "rank 0", 1)
