"""Finished runs as a table compared with published values, and all other runs with their states.

Runs that differ only in the seed form a group. A run counts if it has its own result.json, evaluated all images of its
recipe, and trained all its steps. Any other is listed with the reason, and excluded from the mean; a run that is found
twice counts once. Runs with changes to the paper's procedure form a group of their own, except for a resolution that
the paper itself changes for that model (Table 3).

The verdict compares a group's mean top-1 with the first published value: the mean over the paper's seeds (ResNet-50),
else its headline, which is one seed. The difference may be at most

- **one seed**: 0.3 points;
- **n seeds**: 2 standard errors of the difference, ``2·sqrt(s²/n + S²/N)``, with S and N of the paper's seeds and s of
  ours, but s at least S (a few seeds may agree by chance), and at most 0.3 (a wide spread is no excuse). If the paper
  ran one seed, N is 1 and S is 0.1, the spread of ResNet-50 with A2 over 100 seeds (Figure 1).

The verdicts are ``reproduced``, ``above`` and ``below``; ``no reference`` if nothing is published, or not at these
resolutions; ``modified`` if the recipe was changed, whatever the difference; ``reconstruction`` if the procedure's
values are not public and the recipe's are our guess, so that even an equal value reproduces nothing; ``not counted`` if
no result counts; ``no result`` if there is none yet.
"""

from rsb_cluster.results.collect.collection import Collection, EvaluationRow, Group
from rsb_cluster.results.collect.evaluations import collect
from rsb_cluster.results.collect.groups import judge
from rsb_cluster.results.collect.render import FORMATS, Format, render
from rsb_cluster.results.collect.rows import FinishedRun, Result, Science, UnfinishedRun

__all__ = [
    "FORMATS",
    "Collection",
    "EvaluationRow",
    "FinishedRun",
    "Format",
    "Group",
    "Result",
    "Science",
    "UnfinishedRun",
    "collect",
    "judge",
    "render",
]
