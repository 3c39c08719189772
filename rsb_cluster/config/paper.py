"""The paper's tables (``paper.toml``): what a procedure sets for a model, and the results to compare runs with."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

TABLE3_PROCEDURES = ("A1", "A2", "A3")

# Images of a step under A1 to A3, Table 2.
GLOBAL_BATCH = 2048
# Of models that are not in Table 3: the median of its 25 models, 256 images each at the paper's batch of 2048.
OTHER_VIRTUAL_RANKS = 8


@dataclass(frozen=True)
class Setup:
    """What Table 3 says of a model under a procedure, besides results.

    Attributes:
        gpus: Number of GPUs, and so of virtual ranks: each had its own BatchNorm statistics and its own λ of Mixup.
        train_px: Side of the training crop.
        test_px: Side of the test crop.
    """

    gpus: int
    train_px: int
    test_px: int


@cache
def tables() -> dict[str, Any]:
    """Return the content of ``paper.toml``."""
    return tomllib.loads((files("rsb_cluster.config") / "paper.toml").read_text(encoding="utf-8"))


@cache
def _setups() -> dict[tuple[str, str], Setup]:
    found: dict[tuple[str, str], Setup] = {}
    for model, row in tables()["table3"].items():
        for procedure in TABLE3_PROCEDURES:
            setup = Setup(row[procedure]["gpus"], *row[procedure]["px"])
            found |= {(procedure, name): setup for name in (model, row.get("same_as", model))}
    return found


def setup_of(procedure: str, model: str) -> Setup | None:
    """Return the row of Table 3 of a model, by its timm name with or without a tag; None if there is none."""
    return _setups().get((procedure, model.partition(".")[0]))


def is_papers_batch(procedure: str, model: str, virtual_ranks: int, global_batch: int) -> bool:
    """Whether the paper trained a model under a procedure with this global batch on as many GPUs as virtual ranks."""
    setup = setup_of(procedure, model)
    return setup is not None and (setup.gpus, GLOBAL_BATCH) == (virtual_ranks, global_batch)
