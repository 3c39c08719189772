"""The options of a submit, as typed, and what they change in recipes and jobs."""

from __future__ import annotations

from dataclasses import dataclass, field

from rsb_cluster.config.schema import SEEDS, Override
from rsb_cluster.errors import ConfigError
from rsb_cluster.submission.site import Site


@dataclass(frozen=True)
class Request:
    """The options of a submit besides recipes and models, as typed; they apply to all runs.

    Attributes:
        nodes: Minimum and maximum number of nodes; 0: the job's.
        exclude_failed_hosts: Exclude the nodes on which ranks of these runs failed.
        resubmit: Cancel the queued jobs of these runs, and submit them anew.
        stats: Measure mean and standard deviation of the training images, in place of the recipes' own.
    """

    job: str = ""
    nodes: tuple[int, int] = (0, 0)
    gpus_per_node: int | None = None
    site: Site = field(default_factory=Site)
    exclude_failed_hosts: bool = False
    parallel: int = 0
    max_gpu_hours: float | None = None
    seeds: tuple[int, ...] = ()
    data: str = ""
    runs: str = ""
    share: str | None = None
    init: str = ""
    virtual_ranks: int = 0
    cache_dir: str = ""
    resubmit: bool = False
    stats: bool = False
    overrides: tuple[Override, ...] = ()

    @property
    def job_overrides(self) -> list[Override]:
        """The overrides of fields of the job."""
        found = [(path.removeprefix("job."), value) for path, value in self.overrides if path.startswith("job.")]
        if self.nodes[1]:
            found += [("min_nodes", self.nodes[0]), ("nodes", self.nodes[1])]
        if self.gpus_per_node is not None:
            ranks = [("tasks_per_node", 0)] if self.gpus_per_node else []  # one for each GPU, unless --set says more
            found = [*ranks, *found, ("gpus_per_node", self.gpus_per_node)]
        found += self.site.job_overrides
        if self.parallel:
            found.append(("array_parallelism", self.parallel))
        if self.max_gpu_hours is not None:
            found.append(("max_gpu_hours", self.max_gpu_hours))
        if self.cache_dir:
            found.append(("cache_dir", self.cache_dir))
        if self.share:
            found.append(("share", self.share))
        return found

    @property
    def recipe_overrides(self) -> list[Override]:
        """The overrides of fields of the recipes."""
        found = [(path, value) for path, value in self.overrides if not path.startswith("job.")]
        if self.init:
            found.append(("init.weights", self.init))
        if self.virtual_ranks:
            found.append(("train.virtual_ranks", self.virtual_ranks))
        return found


def check_seeds(seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Return the seeds. Raises ConfigError if one is too large."""
    if max(seeds, default=0) >= SEEDS:
        raise ConfigError(f"the seed {max(seeds)} is too large: seeds of {SEEDS} and more share draws with small ones.")
    return seeds
