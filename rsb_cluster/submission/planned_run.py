"""One run of a plan: its recipe and job, its data, and whether it needs a new job."""

from __future__ import annotations

from dataclasses import dataclass

from rsb_cluster.config.paper import setup_of
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.sweep_file import Point
from rsb_cluster.data.host_memory import HostMemory, host_memory
from rsb_cluster.runs.run import Run, Submission
from rsb_cluster.submission.data_location import DataLocation
from rsb_cluster.weights.resolve import WeightsFile


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan.

    Attributes:
        point: The recipe and the job.
        init: The initial weights; None for random weights, or if a dry run could not find them.
        state: new, unfinished, already submitted, queued anew, finished, over budget, or not yours: its owner must
            submit it.
        replaces: The queued jobs that are cancelled before it is queued anew.
        older: Where earlier versions would have put the same run, with the same virtual ranks or others.
        parameters: Number of parameters of the model; 0 if it was not built, as it was when the run was created.
    """

    run: Run
    point: Point
    data: DataLocation
    seed: int
    virtual_ranks: int
    init: WeightsFile | None = None
    state: str = "new"
    replaces: tuple[Submission, ...] = ()
    older: tuple[Run, ...] = ()
    parameters: int = 0

    @property
    def recipe(self) -> Recipe:
        """What to train."""
        return self.point.resolved.recipe

    @property
    def has_papers_virtual_ranks(self) -> bool:
        """Whether the number of virtual ranks is the paper's number of GPUs for the model."""
        setup = setup_of(self.recipe.paper, self.recipe.model.name)
        return setup is not None and setup.gpus == self.virtual_ranks

    @property
    def should_submit(self) -> bool:
        """Whether the run needs a new job."""
        return self.state in ("new", "unfinished", "queued anew")

    @property
    def memory(self) -> HostMemory | None:
        """The memory that a node needs; None if there are no shards yet."""
        if self.data.train is None:
            return None
        return host_memory(self.recipe, self.point.job, self.data.train, self.virtual_ranks)
