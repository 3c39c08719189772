"""Collections: groups of runs, evaluations, and runs without a result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rsb_cluster.evaluation.record import Evaluation
from rsb_cluster.results.collect.rows import Changes, FinishedRun, UnfinishedRun
from rsb_cluster.results.references import Reference

Verdict = Literal[
    "reproduced", "above", "below", "reconstruction", "no reference", "modified", "not counted", "no result"
]
EvaluationVerdict = Verdict | Literal["agrees", "differs", "not public"]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        virtual_ranks: Micro-batches of a step; 0: unknown, as all of the three.
        micro_batch: Images of each, over which BatchNorm's statistics are.
        is_papers_batch: Whether both are the paper's for the procedure and the model.
        rows: All finished runs, also those that do not count.
        unfinished: Runs without a result.
        n: Number of runs that count; mean, min and max are over these, in percent.
        std: Sample standard deviation; None unless n > 1.
        seed0: Top-1 of the run with seed 0, if it counts; the paper's headlines are of seed 0.
        references: The published values; ``delta`` is ``mean`` minus the first.
        tolerance: The largest ``delta`` that is called reproduced, in points.
        gpu_hours: Sum over all runs, finished or not, as are rank_hours, attempts, preemptions and steps_repeated.
        goodput: Time in steps that count / time in which an attempt ran, over the finished runs.
    """

    recipe: str
    procedure: str
    model: str
    verdict: Verdict
    changes: Changes = field(default_factory=dict)
    virtual_ranks: int = 0
    micro_batch: int = 0
    is_papers_batch: bool = False
    rows: tuple[FinishedRun, ...] = ()
    unfinished: tuple[UnfinishedRun, ...] = ()
    n: int = 0
    mean: float | None = None
    std: float | None = None
    min: float | None = None
    max: float | None = None
    seed0: float | None = None
    top5: float | None = None
    references: tuple[Reference, ...] = ()
    delta: float | None = None
    tolerance: float | None = None
    notes: tuple[str, ...] = ()
    gpu_hours: float = 0.0
    rank_hours: float = 0.0
    attempts: int = 0
    preemptions: int = 0
    steps_repeated: int = 0
    goodput: float | None = None

    @property
    def label(self) -> str:
        """The recipe, with the changes if these are few."""
        if not self.changes:
            return self.recipe
        if len(self.changes) > 2:
            return f"{self.recipe} with {len(self.changes)} changes"
        return f"{self.recipe} with " + ", ".join(f"{key}={here}" for key, (_, here) in sorted(self.changes.items()))


@dataclass(frozen=True)
class EvaluationRow:
    """A row of the table of evaluations.

    Attributes:
        name: Recipe, with its changes, or the name of the weights.
        rows: The newest evaluation of each run of the group, or that of the weights.
        counted: The evaluations that count; the mean is over these, in percent.
        std: Sample standard deviation; None unless there are several.
        references: The published values; ``delta`` is ``mean`` minus the first.
        notes: Remarks, such as why there is no reference.
    """

    name: str
    model: str
    rows: tuple[Evaluation, ...]
    counted: tuple[Evaluation, ...]
    mean: float | None
    std: float | None
    references: tuple[Reference, ...]
    delta: float | None
    verdict: EvaluationVerdict
    notes: tuple[str, ...] = ()

    @property
    def evaluation(self) -> Evaluation:
        """An evaluation of the row: all have the same data, labels, metric and preprocessing."""
        return self.rows[0]

    def to_json(self) -> dict[str, Any]:
        """Return all fields of the row."""
        values = {key: value for key, value in vars(self).items() if key not in ("rows", "counted", "references")}
        values["references"] = [asdict(reference) for reference in self.references]
        values["n"] = len(self.counted)
        return values | {"evaluations": [row.model_dump(mode="json") for row in self.rows]}


@dataclass(frozen=True)
class Collection:
    """The results of many runs.

    Attributes:
        groups: Groups of runs, in natural order.
        unfinished: All runs without a result, also those of the groups.
        evaluations: Results of 'evaluate', those of runs first.
        unreadable: Errors of evaluations that could not be read.
    """

    groups: tuple[Group, ...]
    unfinished: tuple[UnfinishedRun, ...]
    evaluations: tuple[EvaluationRow, ...] = ()
    unreadable: tuple[str, ...] = ()
