"""Several processes that share a virtual rank do the mathematics of one, whatever the network draws or averages."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from tests.equality import final_state, rows_of, samples_of
from tests.faults.lab import new_run
from tests.unit.train import shared_networks
from tests.unit.train.forked_ranks import attempt, train

# All that couples the images of a micro-batch, draws random numbers for it, or keeps state.
SMALL = (
    "augment.resolution=16", "eval.resolution=16", "data.train_samples=420", "data.val_samples=120",
    "data.shuffle_samples=90", "schedule.update=epoch", "loss.name=bce", "loss.targets=paper", "optimizer.name=lamb",
    "optimizer.lr=5e-3", "model.drop_rate=0.2", "model.drop_path_rate=0.2", "augment.mixup=0.2", "augment.cutmix=1",
    "augment.mix_switch_prob=0.5", "augment.mix_prob=0.9", "augment.erase_prob=0.25", "augment.repeats=3",
    "train.ema_decay=0.9", "schedule.warmup_epochs=0",
)  # fmt: skip
STEPS = 6  # of an epoch: 420 // 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few-digits")
    sizes = {"train": 420, "val": 120}
    sources = {name: dataclasses.replace(s, entries=s.entries[: sizes[name]]) for name, s in open_set("digits").items()}
    make_set(sources, Store(folder), shard_samples=50)
    return folder


def new(folder: Path, data: Path, *assignments: str) -> Run:
    return new_run(folder, data, *SMALL, *assignments)


def losses(run: Run) -> list[float]:
    return [row["loss"] for row in rows_of(run) if row["kind"] == "train"]


def largest_difference(one: Run, other: Run) -> float:
    """Of all losses, weights, states of the optimizer, BatchNorm statistics, averaged weights."""
    worst = max(abs(a - b) for a, b in zip(losses(one), losses(other), strict=True))
    return max(worst, _difference(final_state(one), final_state(other)))


def _difference(one: object, other: object) -> float:
    if isinstance(one, dict) and isinstance(other, dict):
        return max((_difference(one[key], other[key]) for key in one), default=0.0)
    if isinstance(one, list) and isinstance(other, list):
        return max((_difference(a, b) for a, b in zip(one, other, strict=True)), default=0.0)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    assert one == other
    return 0.0


WORLDS = (1, 2, 4, 8)  # processes of a run of four virtual ranks
MOVES = ((8, 4), (1, 15), (16, 3), (4, 9), (2, 0))  # processes, and steps; the last one goes to the end
FEW = ("model.name=test_resnet", "schedule.epochs=9", "eval.every_epochs=9")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Run]:
    """54 steps in double precision: on one process, on eight, and on one to sixteen in turn; three in single."""
    folder = tmp_path_factory.mktemp("runs")
    single = {f"single {w}": new(folder / f"single-{w}", data, *FEW) for w in WORLDS}
    found = {name: new(folder / name, data, *FEW) for name in ("one", "eight", "elastic")} | single
    moves = [attempt(found["elastic"], w, stop=n, double=True) for w, n in MOVES]
    cyclic = list("abababab")  # as Slurm may number ranks: neighbours are on different hosts
    train(
        attempt(found["one"], 1, double=True), attempt(found["eight"], 8, double=True, hosts=cyclic), *moves,
        *(attempt(found[f"single {w}"], w, stop=3) for w in WORLDS),
    )  # fmt: skip
    return found


def test_one_to_sixteen_processes_are_the_same_run_to_ten_digits(runs: dict[str, Run]) -> None:
    held = samples_of(runs["one"])
    assert sorted(held) == [(step, rank) for step in range(9 * STEPS) for rank in range(4)]
    assert [a.world_size for a in runs["elastic"].attempts()] == [w for w, _ in MOVES]
    for run in (runs["eight"], runs["elastic"]):
        assert samples_of(run) == held
        assert len(losses(run)) == 9 * STEPS
        assert largest_difference(run, runs["one"]) < 1e-10


def test_single_precision_agrees_for_three_steps(runs: dict[str, Run]) -> None:
    """Losses of 0.75, in units of their last place (6e-8), to sixteen of them; weights by the norm of all.

    Not one by one: LAMB moves a weight whose gradient is nothing but rounding as far as any other, to either side.
    """
    one = runs["single 1"]
    weights = _all_weights(one)
    for run in (runs[f"single {w}"] for w in WORLDS[1:]):
        assert samples_of(run) == samples_of(one)
        assert losses(run) == pytest.approx(losses(one), rel=0, abs=16 * 2**-24)
        assert (_all_weights(run) - weights).norm() < 1e-4 * weights.norm()


def _all_weights(run: Run) -> torch.Tensor:
    """Weights and BatchNorm statistics in single precision, shape (N,)."""
    model = final_state(run)["model"]
    return torch.cat([t.flatten() for _, t in sorted(model.items()) if t.dtype == torch.float32])


def test_the_papers_own_set_up_gives_the_same_losses_weights_and_statistics(
    tmp_path: Path, data: Path, runs: dict[str, Run]
) -> None:
    """Plain DDP with a process for each virtual rank and timm's parts, against one process and twice as many."""
    recipe, out = Path(runs["one"].url) / "recipe.json", tmp_path / "plain.pt"
    program = [
        sys.executable,
        "-m",
        "tests.unit.train.plain_ddp",
        str(recipe),
        str(data),
        "0",
        str(9 * STEPS),
        str(out),
    ]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    plain = torch.load(out, weights_only=True)
    for name in ("one", "eight"):
        assert losses(runs[name]) == pytest.approx(plain["losses"], rel=0, abs=1e-10)
        assert _difference(final_state(runs[name])["model"], plain["state"]) < 1e-10


@pytest.fixture(scope="module")
def failed() -> str:
    """The cases of the program that failed, and why."""
    program = [sys.executable, "-m", "tests.unit.train.shared_networks"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("case", shared_networks.CASES)
def test_a_network_computes_of_parts_what_it_computes_of_the_whole_or_is_refused(failed: str, case: str) -> None:
    assert "failed: " in failed and case not in failed.splitlines()[0], failed
