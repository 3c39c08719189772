"""The main job on this machine: what it computes does not depend on processes, preemptions or stops."""

import dataclasses
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.metrics import Row, read_rows
from rsb_cluster.run import Run
from rsb_cluster.storage import Store
from tests.command import RsbCluster
from tests.equality import assert_bit_equal, final_state, rows_of, samples_of


def run_of(rsb: RsbCluster, printed: str, runs: str = "runs") -> Run:
    return Run.at(str(rsb.cwd / runs), printed.split()[-1])


SHORT_DIGITS = ("--recipe", "digits", "--job", "local", "--set", "schedule.epochs=4", "--set", "job.log_every_steps=1")


def wait_for_step(rsb: RsbCluster, run: Run, step: int) -> None:
    deadline = time.monotonic() + 120
    while max((row["step"] for row in read_rows(run)), default=0) < step:
        assert time.monotonic() < deadline, f"no step {step} yet{rsb.logs()}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Run:
    """A short run of the digits on two processes that nothing disturbs."""
    rsb = RsbCluster(tmp_path_factory.mktemp("unbroken"), {})
    printed = rsb("submit", *SHORT_DIGITS, "--data", str(digits), "--wait", "--json")
    return Run.at(rsb.cwd / "runs", next(line.split('"')[3] for line in printed.splitlines() if '"run_id"' in line))


def test_a_preempted_run_is_bit_equal_to_an_unbroken_one(rsb: RsbCluster, digits: Path, unbroken: Run) -> None:
    """Parameters, optimizer, BatchNorm and metric rows, on as many processes; a tracker has each step once."""
    run = run_of(rsb, rsb("submit", *SHORT_DIGITS, "--set", 'job.trackers=["tensorboard"]', "--data", str(digits)))
    wait_for_step(rsb, run, 10)
    rsb("preempt", run.run_id)
    wait_for_step(rsb, run, 45)
    rsb("preempt", run.run_id)
    rsb("submit", *SHORT_DIGITS, "--data", str(digits), "--wait")  # already submitted: only follows it
    attempts = run.attempts()
    assert [a.cause for a in attempts] == ["preempted", "preempted", "finished"]
    assert attempts[0].end_step == attempts[1].start_step >= 10
    assert attempts[1].end_step == attempts[2].start_step >= 45
    assert_bit_equal(final_state(run), final_state(unbroken))
    assert rows_of(run) == rows_of(unbroken)
    assert run.result() is not None and run.result()["preemptions"] == 2  # type: ignore[index]
    assert len(run.submissions()) == 1
    events = EventAccumulator(str(rsb.cwd / "runs" / run.run_id / "tensorboard"))
    events.Reload()
    tracked = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert tracked == [(r["step"], pytest.approx(r["loss"])) for r in rows_of(run) if r["kind"] == "train"]


def test_ctrl_c_saves_and_a_second_submit_goes_on_elsewhere(rsb: RsbCluster, digits: Path, unbroken: Run) -> None:
    """Stopped on two processes, finished on four: the same run, the same losses to rounding."""
    run = run_of(rsb, rsb("submit", *SHORT_DIGITS, "--data", str(digits)))
    wait_for_step(rsb, run, 30)
    rsb("cancel", run.run_id)
    deadline = time.monotonic() + 60
    while (state := rsb.json("status", run.run_id, "--json")[0]["state"]) != "stopped":
        assert time.monotonic() < deadline, state
        time.sleep(0.5)
    rsb("submit", *SHORT_DIGITS, "--data", str(digits), "--set", "job.tasks_per_node=4", "--wait")
    attempts = run.attempts()
    assert [(a.cause, a.world_size) for a in attempts] == [("stopped", 2), ("finished", 4)]
    assert attempts[0].end_step == attempts[1].start_step
    assert [row["step"] for row in rows_of(run)] == [row["step"] for row in rows_of(unbroken)]
    for mine, theirs in zip(rows_of(run), rows_of(unbroken), strict=True):
        # Four processes round sums otherwise than two, and training amplifies that with each step.
        tolerance = 1e-3 if mine["step"] <= attempts[0].end_step + 5 else 5e-2
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=tolerance), mine["step"]


def test_an_evaluation_finds_what_the_training_found(rsb: RsbCluster, digits: Path, unbroken: Run) -> None:
    """By the command, in two processes; and collect shows it."""
    result = unbroken.result()
    assert result is not None
    rsb("shards", "verify", str(digits), "--decode")
    options = ("--data", str(digits), "--procs", "2", "--runs", str(Path(unbroken.url).parent), "--json")
    (found,) = rsb.json("evaluate", unbroken.run_id, *options)
    assert (found["run_id"], found["step"], found["processes"]) == (unbroken.run_id, result["steps"], 2)
    assert (found["samples"], found["scored"], found["bad"]) == (359, 359, 0)
    assert found["values"]["top1"] == pytest.approx(result["top1"])
    shown = rsb.json("collect", "--runs", str(Path(unbroken.url).parent), "--format", "json")
    (line,) = shown["evaluations"]
    assert [row["values"]["top1"] for row in line["evaluations"]] == [found["values"]["top1"]]


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory: pytest.TempPathFactory, fashion_mnist: Path) -> Path:
    """FashionMNIST with its 10,000 validation images and 5,120 of its training images, 20 of the recipe's steps."""
    folder = tmp_path_factory.mktemp("twenty-steps")
    source = open_set("FashionMNIST", root=Path("/usr/share/datasets/fashion-mnist"), split="train")["train"]
    make_set({"train": dataclasses.replace(source, entries=source.entries[:5120])}, Store(folder))
    (folder / "val").symlink_to(fashion_mnist / "val")
    return folder


def test_one_two_and_four_processes_train_alike_and_count_each_image_once(rsb: RsbCluster, twenty_steps: Path) -> None:
    # So each of the first 20 steps has the recipe's own learning rate: they are the start of its 234 warm-up steps.
    peak = 8e-3 * 20 / 234
    found: dict[int, list[Row]] = {}
    held = {}
    for processes in (1, 2, 4):
        printed = rsb(
            "submit", "--recipe", "fashion-mnist", "--job", "local", "--data", str(twenty_steps), "--wait", "--json",
            "--runs", f"runs-{processes}", "--set", f"job.tasks_per_node={processes}", "--set", "job.log_every_steps=1",
            "--set", "data.train_samples=5120", "--set", "schedule.epochs=2", "--set", f"optimizer.lr={peak}",
            "--set", "job.log_samples=true",
        )  # fmt: skip
        run_id = next(line.split('"')[3] for line in printed.splitlines() if '"run_id"' in line)
        run = Run.at(rsb.cwd / f"runs-{processes}", run_id)
        found[processes], held[processes] = rows_of(run), samples_of(run)
        evaluations = [row for row in found[processes] if row["kind"] == "eval"]
        assert [(row["step"], row["samples"], row["bad"]) for row in evaluations] == [(20, 10_000, 0), (40, 10_000, 0)]
        assert run.attempts()[0].world_size == processes
    assert held[1] and held[1] == held[2] == held[4], "the same samples, pixels and λ in every micro-batch"
    losses = {p: [r["loss"] for r in rows if r["kind"] == "train"][:20] for p, rows in found.items()}
    assert len(losses[1]) == 20 and losses[1][-1] < losses[1][0]
    for processes in (2, 4):
        assert losses[processes] == pytest.approx(losses[1], abs=1e-4)


def test_both_pipelines_reach_the_same_accuracy(rsb: RsbCluster, tmp_path: Path, fashion_mnist: Path) -> None:
    """Ours on threads, and timm's own transforms on PIL: three epochs of 10,240 images, with RandAugment."""
    source = open_set("FashionMNIST", root=Path("/usr/share/datasets/fashion-mnist"), split="train")["train"]
    data = tmp_path / "data"
    make_set({"train": dataclasses.replace(source, entries=source.entries[:10_240])}, Store(data))
    (data / "val").symlink_to(fashion_mnist / "val")
    found = {}
    for pipeline in ("fast", "timm"):
        printed = rsb(
            "submit", "--recipe", "fashion-mnist", "--job", "local", "--data", str(data), "--wait", "--json",
            "--set", f"data.pipeline={pipeline}", "--set", "augment.rand_augment=rand-m7-mstd0.5-inc1",
            "--set", "data.train_samples=10240", "--set", "schedule.epochs=3", "--set", "eval.every_epochs=3",
        )  # fmt: skip
        run_id = next(line.split('"')[3] for line in printed.splitlines() if '"run_id"' in line)
        result = Run.at(rsb.cwd / "runs", run_id).result()
        assert result is not None
        found[pipeline] = result["top1"]
    assert found["fast"] > 75
    assert found["fast"] == pytest.approx(found["timm"], abs=2.0), found


def test_a_damaged_image_is_named_and_ends_the_run(rsb: RsbCluster, tmp_path: Path, digits: Path) -> None:
    """Also: within data.max_bad_samples it is counted, and the run goes on."""
    source = open_set("digits")
    broken = source["train"].sample(17)[0]

    def read(entry: int):  # type: ignore[no-untyped-def]
        key, image, extension, label = source["train"].read(entry)
        return key, image[:60] if key == broken else image, extension, label

    make_set({**source, "train": dataclasses.replace(source["train"], read=read)}, Store(tmp_path / "data"))
    common = ("submit", *SHORT_DIGITS, "--data", str(tmp_path / "data"), "--set", "schedule.epochs=3", "--wait")
    message = rsb.error(*common, code=1)
    assert "data.max_bad_samples allows 0" in message
    assert broken in rsb.logs()
    rsb(*common, "--set", "data.max_bad_samples=1")
    (finished,) = [r for r in rsb.json("status", "--json") if r["state"] == "finished"]
    rows = read_rows(Run.at(rsb.cwd / "runs", finished["run_id"]))
    assert max(row.get("bad_samples", 0) for row in rows) == 1


def test_two_processes_start_from_a_run_and_the_dry_run_says_so(rsb: RsbCluster, digits: Path, unbroken: Run) -> None:
    source = f"{unbroken.runs_url}/{unbroken.run_id}"
    short = ("schedule.epochs=1", "schedule.warmup_epochs=0", "optimizer.lr=1e-6")
    changed = [word for assignment in short for word in ("--set", assignment)]
    asked = ("--recipe", "digits", "--job", "local", "--data", str(digits), "--init", source, *changed)
    plan = rsb.json("submit", *asked, "--dry-run", "--json")
    run = run_of(rsb, rsb("submit", *asked, "--wait"))
    assert plan["runs"][0]["run_id"] == run.run_id
    init = run.spec().init
    assert init is not None and (init.source, init.sha256) == tuple(plan["init"].values())
    assert init.source.startswith(f"{source}/checkpoints/step-")
    started, ended = unbroken.result(), run.result()
    assert started is not None and ended is not None
    assert ended["top1"] == pytest.approx(started["top1"], abs=3)  # with such a small rate nothing is learned or lost
    refused = rsb.error("submit", *asked, "--model", "resnet18")
    assert "is a resnet10t, model.name is 'resnet18'" in refused
