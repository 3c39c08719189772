"""When the comparison of a preempted run with an uninterrupted one demands equal bits."""

from pathlib import Path

import pytest

from rsb_cluster.checks.selftest import compare
from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.checkpoint import CheckpointId
from rsb_cluster.runs.run import Attempt, Run, Spec
from rsb_cluster.storage.store import Store


def ended_run(folder: Path, weights: bytes, *, gpus: int, deterministic: bool, host: str) -> Run:
    recipe = load_recipe("digits", overrides=parse_overrides([f"train.deterministic={str(deterministic).lower()}"]))
    spec = Spec(run_id=folder.name, seed=0, virtual_ranks=1, data="data", train_digest="t", val_digest="v")
    run = Run(Store(folder), folder.name)
    run.create(recipe.recipe, spec)
    attempt = Attempt(number=1, job_id="1", world_size=1, hosts=(host,), gpus=gpus, started=0.0, start_step=0)
    run.write_attempt(attempt)
    checkpoints, saved = run.store.child("checkpoints"), CheckpointId(1, 1)
    checkpoint.write(checkpoints, saved, {"model.safetensors": memoryview(weights)}, before_manifest=lambda: None)
    return run


@pytest.mark.parametrize(
    ("gpus", "deterministic", "host", "demands"),
    [
        (0, False, "one", True),
        (1, True, "one", True),
        (1, False, "one", False),
        (1, True, "two", False),
        (0, False, "two", False),
    ],
)
def test_equal_bits_are_demanded_on_cpus_and_with_deterministic_kernels_of_one_host(
    tmp_path: Path, gpus: int, deterministic: bool, host: str, demands: bool
) -> None:
    runs = [
        ended_run(tmp_path / name, weights, gpus=gpus, deterministic=deterministic, host=where)
        for name, weights, where in (("unbroken", b"1", "one"), ("preempted", b"2", host))
    ]
    state = next(outcome for outcome in compare(*runs) if outcome.what.startswith("weights"))
    assert state.found.startswith("not bit-equal") and state.passed is not demands
    same = next(outcome for outcome in compare(runs[0], runs[0]) if outcome.what.startswith("weights"))
    assert same.found == "bit-equal" and same.passed
