"""The training loop in this process: resuming at any step leaves no trace, with every option that has state."""

import dataclasses
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from rsb_cluster.config.catalog import load_job
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs import checkpoint, lease
from rsb_cluster.runs.checkpoint import CheckpointId
from rsb_cluster.runs.metrics import MetricsRow, read_rows
from rsb_cluster.runs.run import Attempt, Cause, Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.exchange import StepExchange, StepReport
from rsb_cluster.train.input.loader import Batch
from rsb_cluster.train.input.to_device import OnDevice
from rsb_cluster.train.state import from_files
from rsb_cluster.train.trainer import DivergedError, Trainer
from rsb_cluster.train.watchdog import Watchdog
from tests.command import ROOT
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

    def trainer(self, flag: StopFlag | None = None, parts: int = 1) -> Trainer:
        """The trainer of a new attempt."""
        torch.set_num_threads(1)  # as many as the job's cpus_per_task
        ranks = Ranks(0, 0, 1, "test", 0, 1)
        group = ProcessGroup(ranks, self.run.store, wait_s=10, collective_s=10)
        draft = Attempt(number=0, job_id="test", world_size=1, hosts=(), started=time.time(), start_step=0)
        self.claimed = lease.acquire(self.run, draft)
        watchdog = Watchdog(
            group, stalled_s=0, peer_timeout_s=0, report=lambda cause, suspects: None, exit_rank=lambda cause: None
        )
        return Trainer(
            self.run, self.spec, self.recipe, self.job, group, flag or StopFlag(), watchdog, self.claimed, parts=parts
        )

    def attempt(self, flag: StopFlag | None = None) -> Cause:
        """Train until finished or stopped."""
        trainer = self.trainer(flag)
        start = trainer.progress.step
        cause = trainer.train()
        update = {"start_step": start, "end_step": trainer.progress.step, "cause": cause}
        trainer.group.close()
        self.run.write_attempt(self.claimed.record.model_copy(update=update))
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


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Threads that draw from Python's global generator, as S3 clients do for the pause before they try again."""
    stopped = threading.Event()

    def draw() -> None:
        while not stopped.wait(0.0005):
            random.random()

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    stopped.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("pipeline", ["fast", "timm"])
def test_what_other_threads_draw_changes_no_step(
    tmp_path: Path, digits: Path, pipeline: str, request: pytest.FixtureRequest
) -> None:
    options = (f"data.pipeline={pipeline}", "augment.erase_prob=0.5", "augment.rand_augment=rand-m7-mstd0.5-inc1",
               "augment.cutmix=1.0", "schedule.epochs=1", "schedule.warmup_epochs=0")  # fmt: skip
    alone, disturbed = Lab(tmp_path / "alone", digits, *options), Lab(tmp_path / "disturbed", digits, *options)
    alone.attempt()
    request.getfixturevalue("busy_threads")
    disturbed.attempt()
    assert_bit_equal(disturbed.state(), alone.state())
    assert disturbed.rows() == alone.rows()


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


def test_the_time_of_training_is_that_of_the_device(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the process only queues a step; it waits for the device where it reads the reports of earlier ones."""
    take, now, waited = StepExchange.take, [0.0], []

    def as_on_a_gpu(self: StepExchange, *, all_: bool = False) -> list[StepReport]:
        now[0] += 5.0
        waited.append(5.0)
        return take(self, all_=all_)

    monkeypatch.setattr(StepExchange, "take", as_on_a_gpu)
    monkeypatch.setattr("rsb_cluster.train.trainer.time.monotonic", lambda: now[0])
    lab = Lab(tmp_path / "run", digits, "schedule.epochs=1", "schedule.warmup_epochs=0")
    assert lab.attempt() == "finished"
    found = checkpoint.read_latest(lab.run.store.child("checkpoints"), {})
    assert found is not None
    progress, _ = from_files(found)
    assert len(waited) > STEPS and progress.train_s == pytest.approx(sum(waited))


def test_a_loss_that_is_no_number_ends_the_run_at_once(tmp_path: Path, digits: Path) -> None:
    lab = Lab(tmp_path / "run", digits, "optimizer.name=sgd", "optimizer.lr=1e30", "schedule.warmup_epochs=0")
    lab.job, _ = load_job("local", overrides=parse_overrides(["log_every_steps=1", "checkpoint.every_steps=1"]))
    with pytest.raises(DivergedError) as diverged:
        lab.attempt()
    found = re.match(r"the loss of step (\d+) is (nan|inf) \(epoch 0\.\d+, learning rate \S+\)\.", str(diverged.value))
    assert found is not None, str(diverged.value)
    step = int(found[1])
    assert re.search(rf"Last good checkpoint: (none|of step [1-{step - 1}] \(step-\S+\))\.$", str(diverged.value))
    written = lab.run.store.read_json(f"divergence/step-{step:08d}-rank00000.json")
    micro_batches = written["micro_batches"]
    assert {part["step"] for part in micro_batches} == {n for n in (step - 2, step - 1, step) if n > 0}
    assert len(micro_batches) == 4 * min(3, step) and all(len(part["images"]) == 16 for part in micro_batches)
    assert any(part["loss"] in ("nan", "inf") for part in micro_batches if part["step"] == step)


def test_a_profile_and_gradient_checkpointing_change_no_bit(tmp_path: Path, digits: Path) -> None:
    options = ("schedule.epochs=1", "schedule.warmup_epochs=0", "model.drop_path_rate=0.2", "train.ema_decay=0.9")
    plain, watched = Lab(tmp_path / "plain", digits, *options), Lab(tmp_path / "watched", digits, *options)
    job = ["log_every_steps=1", "profile_steps=3-4", "gradient_checkpointing=true"]
    watched.job, _ = load_job("local", overrides=parse_overrides(job))
    assert plain.attempt() == watched.attempt() == "finished"
    assert_bit_equal(watched.state(), plain.state())
    assert watched.rows() == plain.rows()
    assert watched.run.store.files("profiles") == ["profiles/steps-3-4-rank00000.json.gz"]
    train = [row for row in read_rows(watched.run) if row["kind"] == "train"]
    assert all(0 < row["step_s_p50"] <= row["step_s_p99"] for row in train)
    assert not any(name.startswith(("gpu_", "slowest_")) for row in train for name in row)  # one rank, on a CPU


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


def test_a_micro_batch_in_parts_has_the_gradients_of_the_whole(tmp_path: Path, digits: Path) -> None:
    """With Mixup and CutMix, which pair images of different parts, and with what is dropped of each image.

    Without BatchNorm, which would see the parts.
    """
    options = ("model.name=test_vit", "model.drop_rate=0.3", "model.drop_path_rate=0.3",
               "augment.resolution=64", "eval.resolution=64", "augment.mixup=0.2",
               "augment.cutmix=1.0", "data.train_samples=64", "data.val_samples=1", "schedule.epochs=1",
               "schedule.warmup_epochs=0", "optimizer.name=sgd", "optimizer.lr=0.05")  # fmt: skip
    whole, parts = Lab(tmp_path / "whole", digits, *options), Lab(tmp_path / "parts", digits, *options)
    gradients = []
    for lab, count in ((whole, 1), (parts, 4)):
        trainer = lab.trainer(parts=count)
        batch = Batch(
            images=torch.randint(0, 256, (16, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte(),
            labels=torch.arange(16) % 10, samples=torch.arange(16), good=torch.ones(16, dtype=torch.bool),
        )  # fmt: skip
        moved = OnDevice(batch, trainer.replica.normalise(batch.images), batch.labels)
        loss = trainer._micro_batch(moved, 0, 0, last=True)
        gradients.append([loss, *(p.grad for p in trainer.replica.model.parameters())])
        trainer.group.close()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_network_is_compiled_once(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rehearsal, which sees what the steps see; without a compiler, so that it takes no time."""
    counter, compile_ = CompileCounter(), torch.compile
    modes = []

    def count(network: Any, *, mode: str, dynamic: bool) -> Any:
        modes.append(mode)
        return compile_(network, backend=counter, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", count)
    torch._dynamo.reset()
    lab = Lab(
        tmp_path / "run", digits, "train.compile=default", "schedule.epochs=1", "schedule.warmup_epochs=0",
        "train.channels_last=true",
    )  # fmt: skip
    trainer = lab.trainer()
    rehearsed = counter.frame_count
    assert rehearsed
    trainer.train()
    trainer.group.close()
    assert counter.frame_count == rehearsed, "no step compiled again"
    assert modes == ["default"]


RANKS = """
import os, sys, time
from pathlib import Path
import torch
from rsb_cluster.config.catalog import load_job
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs import lease
from rsb_cluster.runs.run import Attempt, Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.input.decoder_process import DecoderServer
from rsb_cluster.train.trainer import Trainer
from rsb_cluster.train.watchdog import Watchdog
from tests.faults.lab import StopAfter

def train(folder, rank, beside):
    decoders = DecoderServer.start() if beside else None
    torch.set_num_threads(1)
    run, is_demo = Run(Store(folder), Path(folder).name), "demo" in Path(folder).name
    job, _ = load_job("local", overrides=parse_overrides(["log_every_steps=1", "loader_workers=1"]))
    group = ProcessGroup(Ranks(rank, rank, 2, "test", 0, 2), run.store, wait_s=60, collective_s=60, gpus=0)
    draft = Attempt(number=0, job_id="test", world_size=2, hosts=(), started=time.time(), start_step=0)
    claimed = lease.acquire(run, draft) if rank == 0 else None
    quiet = {"report": lambda cause, suspects: None, "exit_rank": lambda cause: None}
    watchdog = Watchdog(group, stalled_s=0, peer_timeout_s=0, **quiet)
    flag = StopAfter(3) if is_demo else StopFlag()
    trainer = Trainer(run, run.spec(), run.recipe(), job, group, flag, watchdog, claimed, decoders)
    assert (trainer.data.neighbours is not None) == (beside and not is_demo)
    assert trainer.train() == ("preempted" if is_demo else "finished")
    group.exit_together()

children = []
for number, folder in enumerate(sys.argv[1:]):
    for rank in range(2):
        if (child := os.fork()) == 0:
            try:
                train(folder, rank, beside=number % 2 == 0)
            except BaseException:
                import traceback
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
sys.exit(max(os.waitpid(child, 0)[1] for child in children) and 1)
"""


def test_ranks_with_decoding_processes_train_to_the_bits_of_ranks_without(tmp_path: Path, digits: Path) -> None:
    """In real processes: the recipe of the demo as it is; and where two ranks share images, with half of the reading.

    They share those of a group of four virtual ranks, and those of one virtual rank.
    """
    options = (*SMALL, "schedule.epochs=1", "schedule.warmup_epochs=0")
    cases = {
        "group": (*options, "augment.repeats=3"), "rank": (*options, "train.virtual_ranks=1"), "demo": (),
    }  # fmt: skip
    pairs = [
        [new_run(tmp_path / f"{case}-{name}", digits, *more) for name in ("shared", "alone")]
        for case, more in cases.items()
    ]
    command = [sys.executable, "-c", RANKS, *(run.store.url for pair in pairs for run in pair)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    for pair in pairs:
        assert_bit_equal(final_state(pair[0]), final_state(pair[1]))
    for pair in pairs[:2]:
        shared, alone = ([row for row in read_rows(run) if row["kind"] == "train"][-1] for run in pair)
        assert shared["read_amplification"] < 0.75 * alone["read_amplification"]
