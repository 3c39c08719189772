"""Results: finished runs as a table against the paper's numbers, and all other runs by name.

Runs that differ in nothing but the seed form a group. A run counts if it has a result.json that is its own, evaluated
as many images as its recipe says, and trained all its steps. Any other is named with the reason, and is in no mean; a
run found twice counts once. What was changed against the paper's procedure makes a group of its own, except for a
resolution that the paper itself changes for that model (Table 3).

The verdict compares a group's mean top-1 with the first published value there is: the mean over the paper's seeds
(ResNet-50), else its headline, which is one seed. The difference may be at most

- **one seed**: 0.3 points;
- **n seeds**: 2 standard errors of the difference, ``2·sqrt(s²/n + S²/N)``, with S and N of the paper's seeds and s of
  ours, but s no less than S (few seeds are alike by luck), and the whole no more than 0.3 (a wide spread is no excuse).
  Where the paper ran one seed, N is 1 and S is 0.1, the spread of ResNet-50 with A2 over 100 seeds (Figure 1).

So: ``reproduced``, ``above``, ``below``; ``no reference`` where nothing is published, or not at these resolutions;
``modified`` where the recipe was changed, whatever the difference; ``reconstruction`` where the procedure's values are
not public and the recipe's are our guess, so that even an equal number reproduces nothing; ``not counted`` where none
of the results counts; ``no result`` where there is none yet.
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
