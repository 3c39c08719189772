"""Runs and sweeps as a submit leaves them."""

from rsb_cluster.config import catalog
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.runs.run import Run, Spec
from rsb_cluster.runs.sweep import Member, Sweep, sweep_id, write_sweep

IDS = ("a1-resnet50-s0-00000000", "a1-resnet50-s1-11111111", "a2-resnet50-s0-22222222")


def make(runs, run_id, *assignments):
    """Make the folder of a run of a1."""
    run = Run.at(runs, run_id)
    spec = Spec(
        run_id=run_id, seed=3, virtual_ranks=4, data="s3://b/d", train_digest="t", val_digest="v",
        modified={"optimizer.lr": (5e-3, 4e-3), "loss.name": ("bce", "ce")},
        code={"version": "1"}, packages={"torch": "2"}, created=12.5,
    )  # fmt: skip
    run.create(catalog.load_recipe("a1", overrides=parse_overrides(assignments)).recipe, spec)
    return run, spec


def add_sweep(runs, name, *run_ids):
    """Write a sweep of these runs."""
    members = tuple(Member(run_id=i, recipe=i.split("-")[0], model="resnet50", seed=0) for i in run_ids)
    sweep = Sweep(sweep_id=sweep_id(name, run_ids), file="", created=1.5, members=members)
    write_sweep(str(runs), sweep)
    return sweep
