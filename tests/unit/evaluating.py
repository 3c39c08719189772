"""An evaluation in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rsb_cluster.evaluation.record import Evaluation, EvaluationRequest
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.storage.store import Store
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.validation.evaluator import evaluate_sources


def evaluate(folder: Path, *sources: str | Path, data: str | Path, **asked: Any) -> list[Evaluation]:
    """Evaluate in this process."""
    torch.set_num_threads(1)
    request = EvaluationRequest(sources=tuple(map(str, sources)), runs=str(folder), data=str(data), **asked)
    group = ProcessGroup(Ranks(0, 0, 1, "test", 0, 1), Store(folder), wait_s=10, collective_s=10)
    try:
        return list(evaluate_sources(request, group))
    finally:
        group.close()
