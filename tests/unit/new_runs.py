"""Runs that were never started."""

from pathlib import Path

from rsb_cluster.config import catalog
from rsb_cluster.runs.run import Run, Spec


def make_run(folder: Path, seed: int = 0, *, run_id: str = "") -> Run:
    """Make the folder of a run of the recipe digits."""
    run = Run.at(folder, run_id or f"digits-s{seed}")
    spec = Spec(run_id=run.run_id, seed=seed, virtual_ranks=4, data="/data", train_digest="t", val_digest="v")
    run.create(catalog.load_recipe("digits").recipe, spec)
    return run
