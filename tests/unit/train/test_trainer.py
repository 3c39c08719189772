"""The training loop in this process: resuming at any step leaves no trace, with every option that has state."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rsb_cluster.config.catalog import load_job
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs import checkpoint, lease
from rsb_cluster.runs.checkpoint import CheckpointId
from rsb_cluster.runs.metrics import MetricsRow
from rsb_cluster.runs.run import Attempt, Cause, Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.exchange import StepExchange, StepReport
from rsb_cluster.train.input.loader import Batch
from rsb_cluster.train.trainer import DivergedError, Trainer
from rsb_cluster.train.watchdog import Watchdog
from tests.equality import assert_bit_equal, final_state, rows_of
from tests.faults.lab import StopAfter, new_run

SMALL = (
    "model.name=test_resnet",
    "augment.resolution=16",
    "eval.resolution=16",
    "data.train_samples=420",
    "data.val_samples=120",
    "data.shuffle_samples=90",
    "schedule.epochs=3",
    "eval.every_epochs=1",
)
STEPS = 6  # of an epoch: 420 // 64
EVALUATION = 2  # batches: 120 images in batches of 64


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """420 of the digits to train on, 120 to evaluate: enough for the machinery."""
    folder = tmp_path_factory.mktemp("few-digits")
    sizes = {"train": 420, "val": 120}
    sources = {name: dataclasses.replace(s, entries=s.entries[: sizes[name]]) for name, s in open_set("digits").items()}
    make_set(sources, Store(folder), shard_samples=50)
    return folder


class Lab:
    """Runs attempts of one run in this process."""

    def __init__(self, folder: Path, data: Path, *assignments: str) -> None:
        self.run = new_run(folder, data, *SMALL, *assignments)
        self.recipe, self.spec = self.run.recipe(), self.run.spec()
        self.job, _ = load_job("local", overrides=parse_overrides(["log_every_steps=1"]))

    def attempt(self, flag: StopFlag | None = None) -> Cause:
        """Train until finished or stopped."""
        torch.set_num_threads(1)  # as many as the job's cpus_per_task
        ranks = Ranks(0, 0, 1, "test", 0, 1)
        group = ProcessGroup(ranks, self.run.store, wait_s=10, collective_s=10)
        draft = Attempt(number=0, job_id="test", world_size=1, hosts=(), started=time.time(), start_step=0)
        claimed = lease.acquire(self.run, draft)
        watchdog = Watchdog(
            group, stalled_s=0, peer_timeout_s=0, report=lambda cause, suspects: None, exit_rank=lambda cause: None
        )
        trainer = Trainer(self.run, self.spec, self.recipe, self.job, group, flag or StopFlag(), watchdog, claimed)
        start = trainer.progress.step
        cause = trainer.train()
        end = trainer.progress.step
        group.close()
        self.run.write_attempt(claimed.record.model_copy(update={"start_step": start, "end_step": end, "cause": cause}))
        return cause

    def state(self) -> dict[str, Any]:
        return final_state(self.run)

    def rows(self) -> list[MetricsRow]:
        return rows_of(self.run)


OPTIONS = {
    "plain": (),
    "ema": ("train.ema_decay=0.9",),
    "repeated augmentation and drop-path": ("augment.repeats=3", "model.drop_path_rate=0.2"),
    "fp16": ("train.amp=fp16",),
    "bf16, clipping, smoothing": (
        # Equal bits are promised in single precision; this network has them in bf16, too.
        "model.name=resnet10t", "augment.resolution=32", "eval.resolution=32",
        "train.amp=bf16", "optimizer.clip_grad_norm=0.5", "loss.smoothing=0.1",
    ),
    "adamw, erasing, randaugment": (
        "optimizer.name=adamw", "optimizer.lr=1e-3", "augment.erase_prob=0.5",
        "augment.rand_augment=rand-m7-mstd0.5-inc1",
    ),
    "sgd, cross-entropy": (
        "optimizer.name=sgd", "optimizer.lr=0.05", "loss.name=ce", "loss.targets=soft", "loss.smoothing=0.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_run_stopped_twice_is_bit_equal_to_an_unbroken_one(
    tmp_path: Path, digits: Path, options: tuple[str, ...]
) -> None:
    """Once in the middle of an epoch, once in the middle of an evaluation (which is then done anew)."""
    unbroken, broken = Lab(tmp_path / "unbroken", digits, *options), Lab(tmp_path / "broken", digits, *options)
    assert unbroken.attempt() == "finished"
    assert broken.attempt(StopAfter(4)) == "preempted"
    assert broken.attempt(StopAfter(STEPS - 4 + 1)) == "preempted"
    assert broken.attempt() == "finished"
    attempts = broken.run.attempts()
    assert [(a.start_step, a.end_step) for a in attempts] == [(0, 4), (4, STEPS), (STEPS, 3 * STEPS)]
    assert_bit_equal(broken.state(), unbroken.state())
    assert broken.rows() == unbroken.rows()
    assert [row["step"] for row in broken.rows() if row["kind"] == "eval"] == [STEPS, 2 * STEPS, 3 * STEPS]


def test_the_whole_state_is_in_a_checkpoint(tmp_path: Path, digits: Path) -> None:
    lab = Lab(tmp_path / "run", digits, "train.ema_decay=0.9", "train.amp=fp16", "schedule.warmup_epochs=0")
    lab.attempt(StopAfter(3))
    assert set(lab.state()) == {"model", "optimizer", "ema", "scaler"}


def test_all_ranks_leave_after_the_same_step_where_the_one_that_saves_learns_first(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a rank reads a step's reports one step later, but rank 0 before it saves; the others would wait."""
    take, step, steps = StepExchange.take, Trainer._step, []

    def one_step_later(self: StepExchange, *, all_: bool = False) -> list[StepReport]:
        late = [] if all_ else self._arrived[-1:]
        self._arrived = self._arrived[: len(self._arrived) - len(late)]
        taken = take(self, all_=True)
        self._arrived = late
        return taken

    def counted(self: Trainer, source: Iterator[Batch]) -> None:
        step(self, source)
        steps[-1] += 1

    monkeypatch.setattr(StepExchange, "take", one_step_later)
    monkeypatch.setattr(Trainer, "_step", counted)
    diverges = ("optimizer.name=sgd", "optimizer.lr=1e30", "schedule.warmup_epochs=0")
    for name, every_steps in (("saves", 1), ("another", 0)):
        lab = Lab(tmp_path / name, digits, *diverges)
        policy = lab.job.checkpoint.model_copy(update={"every_steps": every_steps, "every_min": 0.0})
        lab.job = lab.job.model_copy(update={"log_every_steps": 1000, "checkpoint": policy})
        steps.append(0)
        with pytest.raises(DivergedError):
            lab.attempt()
    assert steps[0] == steps[1] > 1
    saved = [s.step for s in checkpoint.list_checkpoints(Run.at(tmp_path, "saves").store.child("checkpoints"), {})]
    assert saved and max(saved) < steps[0] - 1, "the step that diverged is in no checkpoint"


def test_a_loss_that_is_no_number_ends_the_run_at_once(tmp_path: Path, digits: Path) -> None:
    lab = Lab(tmp_path / "run", digits, "optimizer.name=sgd", "optimizer.lr=1e30", "schedule.warmup_epochs=0")
    with pytest.raises(DivergedError, match=r"the loss became (nan|inf) near step"):
        lab.attempt()


def test_a_damaged_checkpoint_is_quarantined_and_the_previous_one_used(tmp_path: Path, digits: Path) -> None:
    lab, unbroken = Lab(tmp_path / "run", digits), Lab(tmp_path / "unbroken", digits)
    unbroken.attempt()
    lab.attempt(StopAfter(5))
    lab.attempt(StopAfter(1 + EVALUATION + 4))
    newest = tmp_path / "run" / "checkpoints" / CheckpointId(STEPS + 4, 2).folder / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert lab.attempt() == "finished"
    assert lab.run.attempts()[-1].start_step == STEPS  # saved as the best so far
    assert (tmp_path / "run" / "checkpoints" / f"damaged-{CheckpointId(STEPS + 4, 2).folder}").is_dir()
    assert_bit_equal(lab.state(), unbroken.state())
    steps = [row["step"] for row in lab.rows() if row["kind"] == "train"]
    assert steps == list(range(1, 3 * STEPS + 1))


def test_loader_workers_do_not_change_a_bit(tmp_path: Path, digits: Path) -> None:
    one, other = Lab(tmp_path / "none", digits), Lab(tmp_path / "two", digits)
    other.job = other.job.model_copy(update={"loader_workers": 2})
    for lab in (one, other):
        lab.recipe = lab.recipe.model_copy(
            update={"augment": lab.recipe.augment.model_copy(update={"rand_augment": "rand-m7-mstd0.5-inc1"})}
        )
        assert lab.attempt() == "finished"
    assert_bit_equal(one.state(), other.state())
