"""Training on this machine: the result does not depend on processes, preemptions or stops.

Starting torch in a process takes longer than each training, so one training tests several claims.
"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rsb_cluster.config.catalog import find
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.runs.lookup import list_runs
from rsb_cluster.runs.metrics import MetricsRow
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from tests.command import RsbCluster
from tests.commands_of import as_printed
from tests.equality import rows_of, samples_of
from tests.faults.victim import on_this_machine
from tests.servers.daemons import GUARD_S, poll

IMAGES, VAL_IMAGES, STEPS = 2560, 1003, 20  # of an epoch; the number of validation images has no divisor among ours
# So each of the first 20 steps has the recipe's own learning rate: they are the start of its 234 warm-up steps.
FASHION = (
    "--recipe", "fashion-mnist", "--job", "local", "--set", f"data.train_samples={IMAGES}",
    "--set", f"data.val_samples={VAL_IMAGES}", "--set", "train.global_batch=128", "--set", "schedule.epochs=2",
    "--set", f"optimizer.lr={8e-3 * 20 / 234}", "--set", "job.log_every_steps=1", "--set", "job.log_samples=true",
    "--set", 'job.trackers=["tensorboard"]',
)  # fmt: skip

SHORT = {"epochs": 1, "warmup_epochs": 0, "name": '"test_resnet"'}


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory, fashion: Path) -> Path:
    """Some of FashionMNIST's images."""
    folder = tmp_path_factory.mktemp("few-images")
    sources = open_set("FashionMNIST", root=fashion)
    sizes = {"train": IMAGES, "val": VAL_IMAGES}
    make_set({n: dataclasses.replace(s, entries=s.entries[: sizes[n]]) for n, s in sources.items()}, Store(folder))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, few_images: Path) -> Run:
    """An uninterrupted run on one process."""
    rsb = RsbCluster(tmp_path_factory.mktemp("alone"), {})
    run_id = rsb("submit", *FASHION, "--set", "job.tasks_per_node=1", "--data", str(few_images), "--wait").split()[-1]
    return Run.at(rsb.cwd / "runs", run_id)


def rows(run: Run, kind: str) -> list[MetricsRow]:
    return [row for row in rows_of(run) if row["kind"] == kind]


def test_one_two_and_four_processes_have_the_same_result_whatever_stops_them(
    rsb: RsbCluster, few_images: Path, alone: Run
) -> None:
    """The same run on two processes, preempted there, stopped, and finished on four: each image counts once.

    The same samples, pixels and λ in each micro-batch, and losses that are equal to rounding; a tracker has each step
    once.
    """
    rsb.hold()
    submit = ("submit", *FASHION, "--data", str(few_images))
    run = Run.at(rsb.cwd / "runs", rsb(*submit, "--set", "job.tasks_per_node=2").split()[-1])
    victim = on_this_machine(rsb, run)
    victim.wait_for_steps(1, 7)
    rsb("preempt", run.run_id)
    victim.wait_for_steps(2, 5)
    rsb("cancel", run.run_id)
    victim.wait_for_state("stopped")
    rsb.allow()
    rsb(*submit, "--set", "job.tasks_per_node=4", "--wait")

    attempts = run.attempts()
    assert [(a.cause, a.world_size) for a in attempts] == [("preempted", 2), ("stopped", 2), ("finished", 4)]
    assert 7 <= attempts[0].end_step == attempts[1].start_step < attempts[1].end_step == attempts[2].start_step < STEPS
    result = run.result()
    assert result is not None and result["preemptions"] == 1 and len(run.submissions()) == 2
    for one in (run, alone):
        counted = [(row["step"], row["samples"], row["bad"]) for row in rows(one, "eval")]
        assert counted == [(STEPS, VAL_IMAGES, 0), (2 * STEPS, VAL_IMAGES, 0)]
        assert [row["step"] for row in rows(one, "train")] == list(range(1, 2 * STEPS + 1))
    held = samples_of(alone)
    assert len(held) == 2 * STEPS * 4 and samples_of(run) == held
    losses = {one.url: [row["loss"] for row in rows(one, "train")][:STEPS] for one in (run, alone)}
    assert losses[alone.url][-1] < losses[alone.url][0]
    assert losses[run.url] == pytest.approx(losses[alone.url], abs=1e-4)
    events = EventAccumulator(f"{run.url}/tensorboard")
    events.Reload()
    tracked = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert tracked == [(row["step"], pytest.approx(row["loss"])) for row in rows(run, "train")]


def test_the_first_commands_of_the_readme_train_preempt_and_finish(rsb: RsbCluster) -> None:
    """As printed there, with a shorter recipe of that name, which makes its own data."""
    text = find("recipes", "digits").read_text()
    for name, value in (("epochs", "25"), ("warmup_epochs", "2"), ("name", '"resnet10t"')):
        assert len(re.findall(f"(?m)^{name} = {value} ", text)) == 1, name
        text = re.sub(f"(?m)^{name} = {value} ", f"{name} = {SHORT[name]} ", text)
    (rsb.cwd / "recipes").mkdir()
    (rsb.cwd / "recipes" / "digits.toml").write_text(text)
    rsb.hold(3)
    command = [sys.executable, "-m", "rsb_cluster", *as_printed("rsb-cluster submit --recipe digits --wait")]
    with subprocess.Popen(command, cwd=rsb.cwd, env=rsb.env, stdout=subprocess.PIPE, text=True) as submit:
        poll(lambda: list((rsb.cwd / "runs").glob("digits-*/recipe.json")) or None, GUARD_S)
        (run,) = list_runs(str(rsb.cwd / "runs"))
        assert poll(lambda: (beat := run.heartbeat(1)) is not None and beat.step == 3, GUARD_S)
        rsb(*as_printed("rsb-cluster preempt digits"))
        poll(lambda: run.attempt_numbers() == [1, 2] or None, GUARD_S)
        rsb.allow()
        said, _ = submit.communicate(timeout=GUARD_S)
    assert (submit.returncode, said) == (0, f"{run.run_id}\n")
    assert [(a.cause, a.world_size) for a in run.attempts()] == [("preempted", 2), ("finished", 2)]


def test_an_evaluation_has_the_result_of_the_training(rsb: RsbCluster, few_images: Path, alone: Run) -> None:
    """By the command, in two processes; and collect shows it."""
    result = alone.result()
    assert result is not None
    rsb("shards", "verify", str(few_images), "--decode")
    options = ("--data", str(few_images), "--procs", "2", "--runs", alone.runs_url, "--json")
    (found,) = rsb.json("evaluate", alone.run_id, *options)
    assert (found["run_id"], found["step"], found["processes"]) == (alone.run_id, result["steps"], 2)
    assert (found["samples"], found["scored"], found["bad"]) == (VAL_IMAGES, VAL_IMAGES, 0)
    assert found["values"]["top1"] == pytest.approx(result["top1"])
    shown = rsb.json("collect", "--runs", alone.runs_url, "--format", "json")
    (line,) = shown["evaluations"]
    assert [row["values"]["top1"] for row in line["evaluations"]] == [found["values"]["top1"]]


def test_two_processes_start_from_a_runs_weights_and_the_dry_run_names_them(
    rsb: RsbCluster, few_images: Path, alone: Run
) -> None:
    short = ("schedule.epochs=1", "schedule.warmup_epochs=0", "optimizer.lr=1e-6", "eval.every_epochs=1")
    changed = [word for assignment in short for word in ("--set", assignment)]
    asked = (*FASHION, "--data", str(few_images), "--init", alone.url, *changed)
    plan = rsb.json("submit", *asked, "--dry-run", "--json")
    run = Run.at(rsb.cwd / "runs", rsb("submit", *asked, "--wait").split()[-1])
    assert plan["runs"][0]["run_id"] == run.run_id
    init = run.spec().init
    assert init is not None and (init.source, init.sha256) == tuple(plan["init"].values())
    assert init.source.startswith(f"{alone.url}/checkpoints/step-")
    started, ended = alone.result(), run.result()
    assert started is not None and ended is not None
    # With such a small rate little is learned and nothing lost; random weights are right in a tenth of the cases.
    assert started["top1"] > 25 and ended["top1"] > started["top1"] - 3
    refused = rsb.error("submit", *asked, "--model", "resnet18")
    assert "is a resnet10t, model.name is 'resnet18'" in refused
