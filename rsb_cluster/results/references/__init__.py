"""Published values: the paper's, DeiT's, and timm's for the released weights.

``config/paper.toml``, ``timm.toml`` and ``other_data.toml`` hold them, each with its source. This module is for runs on
ImageNet-1k; `rsb_cluster.results.references.other_data` is for evaluations on any data set.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from rsb_cluster.config import paper

TIMM = "timm.toml"


@dataclass(frozen=True)
class Reference:
    """A published value.

    Attributes:
        top1: On the data set of the procedure, which is ImageNet-1k except for fine-tuning; percent, the mean of
            several seeds.
        source: Where it is published.
        n: Number of seeds.
        std: Sample standard deviation over the seeds; None for one seed.
        released: Whether timm measured it on the weights that the authors released.
    """

    top1: float
    source: str
    n: int = 1
    std: float | None = None
    released: bool = False


@dataclass(frozen=True)
class PublishedModel:
    """The published values of a model under a procedure.

    Attributes:
        references: The values; the first is the one to compare with.
        px: Sides of the training and of the test crop.
        doubt: Why a comparison would not be valid; empty if it is.
        v100_hours: GPU-hours of a run in the paper; None if unknown.
    """

    references: tuple[Reference, ...]
    px: tuple[int, int]
    doubt: str = ""
    v100_hours: float | None = None


# The data set of each row of Table 5, by procedure.
FINE_TUNED = {
    "FT-CIFAR10": "cifar10",
    "FT-CIFAR100": "cifar100",
    "FT-Flowers102": "flowers102",
    "FT-Cars": "stanford-cars",
    "FT-iNat2019": "inat2019",
}


def lookup(procedure: str, model: str, init_procedure: str = "") -> PublishedModel | None:
    """Return the published values of a model under a procedure.

    Args:
        procedure: ``paper`` of a recipe, such as ``A1``.
        model: Its timm name.
        init_procedure: For fine-tuning, the procedure of the initial weights: ``A1``, ``A2``, ``A3`` or ``pytorch``.
    """
    if procedure in FINE_TUNED:
        row = paper.tables()["table5"][FINE_TUNED[procedure]]
        if model != "resnet50" or not isinstance(row.get(init_procedure), float):
            return None
        return PublishedModel((Reference(row[init_procedure], f"Table 5, from {init_procedure}"),), (224, 224))
    return _known().get((procedure, model))


def known_models() -> list[str]:
    """Return timm's names of the models with published values, sorted."""
    return sorted({model for _, model in _known()})


@cache
def _known() -> dict[tuple[str, str], PublishedModel]:
    tables, timm = paper.tables(), load_table(TIMM)
    measured = timm["a1_a2_a3"] | timm["deit"]

    def by_timm(procedure: str, model: str) -> list[Reference]:
        top1 = measured.get(model, {}).get(procedure)
        return [] if top1 is None else [Reference(top1, "timm's evaluation of the released weights", released=True)]

    known: dict[tuple[str, str], PublishedModel] = {}
    aliases = {model: row["same_as"] for model, row in tables["table3"].items() if "same_as" in row}
    for model, row in tables["table3"].items():
        for procedure in ("A1", "A2", "A3"):
            seeds = [tables[part].get(model, {}).get(procedure) for part in ("seeds", "more_seeds")]
            several = [Reference(s["mean"], s["source"], s["n"], s["std"]) for s in seeds if s]
            one = Reference(row[procedure]["top1"], "Table 3")
            references = (*several, one, *by_timm(procedure, model))
            hours = row[procedure]["hours"] * row[procedure]["gpus"]
            known[procedure, model] = PublishedModel(references, _px(row[procedure]), row.get("doubt", ""), hours)
    for model, row in tables["deit"].items():
        also = [tables["deit_repository"][model]] if model in tables["deit_repository"] else []
        published = [Reference(r["top1"], r["source"]) for r in (row, *also)]
        known["DeiT", model] = PublishedModel((*published, *by_timm("DeiT", model)), _px(row))
    for procedure, rows in tables["reconstructed"].items():
        for model, row in rows.items():
            known[procedure, model] = PublishedModel((Reference(row["top1"], row["source"]),), _px(row))
    for model, top1 in timm["a1h"].items():
        source = "timm's evaluation of the released weights"
        known["A1h", model] = PublishedModel((Reference(top1["A1h"], source, released=True),), (224, 224))
    return known | {(p, aliases[model]): value for (p, model), value in known.items() if model in aliases}


def _px(row: dict[str, Any]) -> tuple[int, int]:
    train, test = row["px"]
    return train, test


@cache
def load_table(name: str) -> dict[str, Any]:
    """Return the content of a TOML file of this package."""
    return tomllib.loads((files(__name__) / name).read_text(encoding="utf-8"))
