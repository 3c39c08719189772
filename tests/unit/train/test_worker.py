"""Fine-tuning: what a run starts from, what of it changes the run's id, and whether it is worth it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.job import Job
from rsb_cluster.config.sweep_file import Grid, SweepFile, expand
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.errors import ConfigError, MissingError
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.plan import PlannedRun, plan_runs
from rsb_cluster.submission.submit import create_runs
from rsb_cluster.train import preflight, worker
from rsb_cluster.train.logfile import logging_to
from tests.equality import assert_bit_equal, final_state
from tests.faults.lab import StopAfter

# timm's smallest network, so that some hundred steps take seconds on one core.
SHORT = (
    "model.name=test_resnet", "train.global_batch=64", "train.virtual_ranks=1", "schedule.warmup_epochs=0",
    "job.tasks_per_node=1", "schedule.epochs=1",
)  # fmt: skip


def planned(recipe: str, data: Path, runs: Path, *assignments: str, seeds: int = 1) -> list[PlannedRun]:
    """Plan runs as submit does, but for the check of the model in a process of its own."""
    for_jobs = [a.removeprefix("job.") for a in assignments if a.startswith("job.")]
    for_recipes = [a for a in assignments if not a.startswith("job.")]
    file = SweepFile(name="test", grid=(Grid(recipes=(recipe,), seeds=tuple(range(seeds))),))
    points = expand(file, job="local", for_recipes=for_recipes, for_jobs=for_jobs)
    return plan_runs(points, str(runs), str(data), dry_run=False)[0]


def train(run: Run, job: Job, flag: StopFlag | None = None) -> float:
    """Do one attempt in this process; return the top-1, percent."""
    torch.set_num_threads(1)
    ranks = Ranks(rank=0, local_rank=0, world_size=1, job_id="test", restart=len(run.attempts()), held=1)
    with logging_to(run.store, ranks) as log_file:
        worker._Attempt(run, job, ranks, flag or StopFlag(), log_file).run()
    found = run.result()
    return -1.0 if found is None else float(found["top1"])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, fashion: Path) -> Run:
    """A run of the recipe fashion-mnist on 9,600 of its images: 150 steps."""
    folder = tmp_path_factory.mktemp("pretrained")
    sources = {
        name: dataclasses.replace(source, entries=source.entries[:size])
        for (name, source), size in zip(open_set("FashionMNIST", root=fashion).items(), (9600, 500), strict=True)
    }
    make_set(sources, Store(folder / "data"))
    short = (*SHORT, "data.train_samples=9600", "data.val_samples=500")
    [one] = planned("fashion-mnist", folder / "data", folder / "runs", *short)
    create_runs([one])
    assert train(one.run, one.point.job) > 60
    return one.run


def test_fine_tuning_beats_training_from_scratch_at_equal_steps(tmp_path: Path, digits: Path, pretrained: Run) -> None:
    """One epoch of the digits (22 steps) by the same recipe, three seeds each; found: 51 to 69 % against 13 to 28 %."""
    scratch = planned("digits", digits, tmp_path, *SHORT, seeds=3)
    tuned = planned("digits", digits, tmp_path, *SHORT, from_(pretrained.url), "init.head=replace", seeds=3)
    create_runs([*scratch, *tuned])
    without, with_ = ([train(p.run, p.point.job) for p in runs] for runs in (scratch, tuned))
    assert min(with_) > max(without) + 5, (with_, without)


# --- what a run starts from -----------------------------------------------------------------------------------------


def from_(source: str | Path) -> str:
    return f'init.weights="{source}"'


def write_weights(path: Path, **changes: Any) -> dict[str, torch.Tensor]:
    state = {**timm.create_model("test_resnet", num_classes=10).state_dict(), **changes}
    safetensors.torch.save_file(state, path)
    return state


def test_the_same_weights_elsewhere_are_the_same_run_and_others_another(tmp_path: Path, digits: Path) -> None:
    for name in ("one", "other"):
        write_weights(tmp_path / f"{name}.safetensors")
    shutil.copyfile(tmp_path / "one.safetensors", tmp_path / "copy.safetensors")
    ids = {
        name: planned("digits", digits, tmp_path / "runs", *SHORT, *how)[0].run.run_id
        for name, how in {
            "scratch": (),
            **{name: (from_(tmp_path / f"{name}.safetensors"),) for name in ("one", "copy", "other")},
            "new head": (from_(tmp_path / "one.safetensors"), "init.head=replace"),
        }.items()
    }
    assert ids["one"] == ids["copy"]
    assert len(set(ids.values())) == 4


def test_an_attempt_from_step_0_starts_from_the_copy_of_the_weights(tmp_path: Path, digits: Path) -> None:
    """Although the source is gone; and what is new is the same, too: the classifier."""
    source = tmp_path / "w.safetensors"
    write_weights(source)
    [unbroken] = planned("digits", digits, tmp_path / "a", *SHORT, from_(source), "init.head=replace")
    [broken] = planned("digits", digits, tmp_path / "b", *SHORT, from_(source), "init.head=replace")
    create_runs([unbroken, broken])
    source.unlink()
    train(unbroken.run, unbroken.point.job)
    assert train(broken.run, broken.point.job, StopAfter(5)) == -1
    broken.run.store.delete("checkpoints")
    train(broken.run, broken.point.job)
    assert broken.run.attempts()[-1].start_step == 0
    assert_bit_equal(final_state(broken.run), final_state(unbroken.run))
    assert Path(broken.run.url).stat().st_mode & 0o077 == 0


def test_a_run_starts_with_the_weights_it_was_given_and_so_does_their_average(tmp_path: Path, digits: Path) -> None:
    state = write_weights(tmp_path / "w.safetensors")
    still = (
        "optimizer.name=sgd",
        "optimizer.lr=1e-30",
        "train.ema_decay=0.5",
        "optimizer.weight_decay=0",
        "schedule.min_lr=0",
    )
    [one] = planned("digits", digits, tmp_path / "runs", *SHORT, *still, from_(tmp_path / "w.safetensors"))
    create_runs([one])
    train(one.run, one.point.job, StopAfter(2))
    found = final_state(one.run)
    learned = {name for name, _ in timm.create_model("test_resnet", num_classes=10).named_parameters()}
    for kind in ("model", "ema"):
        for name in learned:
            torch.testing.assert_close(found[kind][name], state[name], rtol=0, atol=1e-20)


def test_a_damaged_copy_ends_the_run_with_a_message(tmp_path: Path, digits: Path) -> None:
    write_weights(tmp_path / "w.safetensors")
    [one] = planned("digits", digits, tmp_path / "runs", *SHORT, from_(tmp_path / "w.safetensors"))
    create_runs([one])
    copy = Path(one.run.init.locate("w.safetensors"))
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    train(one.run, one.point.job)
    [attempt] = one.run.attempts()
    assert attempt.cause == "failed" and "does not match its SHA-256" in attempt.message


def test_weights_that_do_not_fit_are_refused_before_anything_is_queued(tmp_path: Path, digits: Path) -> None:
    write_weights(tmp_path / "w.safetensors", **{"fc.weight": torch.zeros(7, 96), "stranger": torch.zeros(1)})
    [one] = planned("digits", digits, tmp_path / "runs", *SHORT, from_(tmp_path / "w.safetensors"))
    with pytest.raises(ConfigError, match="does not fit test_resnet: stranger is not in the model"):
        preflight.check(one.recipe, one.init)


def test_a_dry_run_without_the_weights_says_so_and_goes_on(tmp_path: Path, digits: Path) -> None:
    points = expand(
        SweepFile(name="test", grid=(Grid(recipes=("digits",)),)), job="local", for_recipes=[from_(tmp_path / "no.pth")]
    )
    [one], notes = plan_runs(points, str(tmp_path), str(digits), dry_run=True)
    assert one.run.run_id.endswith("-unknown") and one.init is None
    assert any("there is nothing at" in note for note in notes)
    with pytest.raises(MissingError):
        plan_runs(points, str(tmp_path), str(digits), dry_run=False)


def test_a_procedure_from_other_weights_is_modified_unless_it_is_fine_tuning() -> None:
    assert load_recipe("a1", assignments=[from_("w.pth")]).modified == {"init.weights": ("", "w.pth")}
    assert load_recipe("ft-cars", assignments=[from_("w.pth")]).modified == {}
