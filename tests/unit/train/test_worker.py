"""An attempt: from initial weights, where it uses the run's copy, and what it records."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import timm
import torch

from rsb_cluster.config.job import Job
from rsb_cluster.data.make import make_set
from rsb_cluster.data.order import DRAWS
from rsb_cluster.data.sources import open_set
from rsb_cluster.monitor.status import read_status
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.node.stopping import StopFlag
from rsb_cluster.results.collect import collect
from rsb_cluster.results.report.history import read_history
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.submit import create_runs
from rsb_cluster.train import worker
from rsb_cluster.train.logfile import logging_to
from tests.equality import assert_bit_equal, final_state
from tests.faults.lab import StopAfter
from tests.unit.fine_tuning import SHORT, from_, plan_short, write_weights


def train(run: Run, job: Job, flag: StopFlag | None = None, data: str = "") -> float:
    """Do one attempt in this process; return the top-1, percent."""
    torch.set_num_threads(1)
    ranks = Ranks(rank=0, local_rank=0, world_size=1, job_id="test", restart=len(run.attempts()), allocated=1)
    with logging_to(run.store, ranks) as log_file:
        worker._Attempt(run, job, ranks, flag or StopFlag(), log_file, data).run()
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
    [one] = plan_short("fashion-mnist", folder / "data", folder / "runs", *short)
    create_runs([one])
    assert train(one.run, one.point.job) > 60
    return one.run


def test_fine_tuning_beats_training_from_scratch_at_equal_steps(tmp_path: Path, digits: Path, pretrained: Run) -> None:
    """One epoch of the digits (22 steps) by the same recipe, three seeds each; found: 51 to 69 % against 13 to 28 %."""
    scratch = plan_short("digits", digits, tmp_path, *SHORT, seeds=3)
    tuned = plan_short("digits", digits, tmp_path, *SHORT, from_(pretrained.url), "init.head=replace", seeds=3)
    create_runs([*scratch, *tuned])
    without, with_ = ([train(p.run, p.point.job) for p in runs] for runs in (scratch, tuned))
    assert min(with_) > max(without) + 5, (with_, without)


def test_an_attempt_from_step_0_starts_from_the_copy_of_the_weights(tmp_path: Path, digits: Path) -> None:
    """Although the source is gone; and what is new is the same, too: the classifier."""
    source = tmp_path / "w.safetensors"
    write_weights(source)
    [unbroken] = plan_short("digits", digits, tmp_path / "a", *SHORT, from_(source), "init.head=replace")
    [broken] = plan_short("digits", digits, tmp_path / "b", *SHORT, from_(source), "init.head=replace")
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
    [one] = plan_short("digits", digits, tmp_path / "runs", *SHORT, *still, from_(tmp_path / "w.safetensors"))
    create_runs([one])
    train(one.run, one.point.job, StopAfter(2))
    found = final_state(one.run)
    learned = {name for name, _ in timm.create_model("test_resnet", num_classes=10).named_parameters()}
    for kind in ("model", "ema"):
        for name in learned:
            torch.testing.assert_close(found[kind][name], state[name], rtol=0, atol=1e-20)


def test_a_damaged_copy_ends_the_run_with_a_message(tmp_path: Path, digits: Path) -> None:
    write_weights(tmp_path / "w.safetensors")
    [one] = plan_short("digits", digits, tmp_path / "runs", *SHORT, from_(tmp_path / "w.safetensors"))
    create_runs([one])
    copy = Path(one.run.init.locate("w.safetensors"))
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    train(one.run, one.point.job)
    [attempt] = one.run.attempts()
    assert attempt.cause == "failed" and "does not match its SHA-256" in attempt.message


def test_an_attempt_finds_the_data_where_they_are_now(tmp_path: Path, digits: Path) -> None:
    """Its job says so; the spec says where they were at the first submit."""
    shutil.copytree(digits, tmp_path / "data")
    [one] = plan_short("digits", tmp_path / "data", tmp_path / "runs", *SHORT)
    create_runs([one])
    assert train(one.run, one.point.job, StopAfter(5)) == -1
    (tmp_path / "data").rename(tmp_path / "moved")
    assert train(one.run, one.point.job, data=str(tmp_path / "moved")) > 0
    assert [attempt.cause for attempt in one.run.attempts()] == ["preempted", "finished"]


def test_an_attempt_that_does_not_find_its_data_says_how_to_name_them(tmp_path: Path, digits: Path) -> None:
    [one] = plan_short("digits", digits, tmp_path / "runs", *SHORT)
    create_runs([one])
    assert train(one.run, one.point.job, data=str(tmp_path / "gone")) == -1
    [attempt] = one.run.attempts()
    assert attempt.cause == "failed"
    assert f"{tmp_path}/gone/train" in attempt.message and "submit the run again with --data" in attempt.message


def test_draws_of_a_newer_version_are_refused_before_any_data_are_read(tmp_path: Path, digits: Path) -> None:
    """For good: this version would train with other samples, and another start of it would not help."""
    [one] = plan_short("digits", digits, tmp_path / "runs", *SHORT)
    create_runs([one])
    assert one.run.spec().draws == DRAWS
    newer = one.run.spec().model_copy(update={"draws": DRAWS + 1, "data": "/nowhere"})
    one.run.store.write_json("spec.json", newer.model_dump(mode="json"))
    ranks = Ranks(rank=0, local_rank=0, world_size=1, job_id="test", restart=0, allocated=1)
    with logging_to(one.run.store, ranks) as log_file:
        assert worker._Attempt(one.run, one.point.job, ranks, StopFlag(), log_file).run() == "failed"
    assert not one.run.attempts()
    [report] = [name for name in one.run.store.files("attempts") if "start" in name]
    message = one.run.store.read_json(report)["message"]
    assert f"spec.json was written by a newer version of rsb-cluster: 'draws = {DRAWS + 1}' in it" in message


def test_each_attempt_records_its_environment_and_a_change_is_told(tmp_path: Path, digits: Path) -> None:
    [one] = plan_short("digits", digits, tmp_path / "runs", *SHORT)
    create_runs([one])
    assert train(one.run, one.point.job, StopAfter(5)) == -1
    [first] = one.run.attempts()
    recorded = first.environment
    assert recorded["torch"] == torch.__version__ and recorded["timm"] == timm.__version__
    assert {"version", "python", "torchvision", "numpy", "pillow", "simplejpeg"} <= recorded.keys()
    one.run.write_attempt(first.model_copy(update={"environment": recorded | {"torch": "1.0"}}))
    train(one.run, one.point.job)
    change = f"torch: 1.0 in attempt 1, {torch.__version__} in attempt 2"
    assert f"the environment has changed: {change}" in one.run.store.read_bytes("logs/0002-rank00000.log").decode()
    result = one.run.result()
    assert result is not None and result["environment_changes"] == [change]
    assert read_status([one.run])[0].changes == (change,)
    [group] = collect([one.run]).groups
    assert f"seed 0: {change}" in group.notes
    assert read_history(one.run, one.recipe, "finished", points=10).changes == (change,)
