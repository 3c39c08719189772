"""The numbers that runs are compared with: the paper's, DeiT's, and timm's for the released weights.

``paper.toml`` and ``timm.toml`` hold them, each with its source; also some that runs are not compared with yet.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Reference:
    """A published top-1, on ImageNet-1k validation or on the data set of a fine-tuning procedure.

    Attributes:
        top1: Percent; the mean where there are several seeds.
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
class Known:
    """What is published about one model under one procedure.

    Attributes:
        references: The first is the one to compare with.
        px: Side of the training and of the test crop.
        doubt: Why none of it should be compared with; empty where that is not so.
        v100_hours: GPU-hours that the paper spent on a run; None where it does not say.
    """

    references: tuple[Reference, ...]
    px: tuple[int, int]
    doubt: str = ""
    v100_hours: float | None = None


# Table 5 by the procedure that stands for a row of it.
FINE_TUNED = {
    "FT-CIFAR10": "cifar10",
    "FT-CIFAR100": "cifar100",
    "FT-Flowers102": "flowers102",
    "FT-Cars": "stanford_cars",
    "FT-iNat2019": "inaturalist2019",
}


def lookup(procedure: str, model: str, start: str = "") -> Known | None:
    """Return what is published about a model under a procedure.

    Args:
        procedure: ``paper`` of a recipe, such as ``A1``.
        model: Its timm name.
        start: Of fine-tuning: the procedure that the weights come from, ``A1``, ``A2``, ``A3`` or ``pytorch``.
    """
    if procedure in FINE_TUNED:
        row = _read("paper.toml")["table5"][FINE_TUNED[procedure]]
        if model != "resnet50" or not isinstance(row.get(start), float):
            return None
        return Known((Reference(row[start], f"Table 5, from {start}"),), (224, 224))
    return _known().get((procedure, model))


@cache
def _known() -> dict[tuple[str, str], Known]:
    paper, timm = _read("paper.toml"), _read("timm.toml")
    measured = timm["a1_a2_a3"] | timm["deit"]

    def timms(procedure: str, model: str) -> list[Reference]:
        top1 = measured.get(model, {}).get(procedure)
        return [] if top1 is None else [Reference(top1, "timm's evaluation of the released weights", released=True)]

    known: dict[tuple[str, str], Known] = {}
    aliases = {model: row["same_as"] for model, row in paper["table3"].items() if "same_as" in row}
    for model, row in paper["table3"].items():
        for procedure in ("A1", "A2", "A3"):
            seeds = [paper[part].get(model, {}).get(procedure) for part in ("seeds", "more_seeds")]
            several = [Reference(s["mean"], s["source"], s["n"], s["std"]) for s in seeds if s]
            one = Reference(row[procedure]["top1"], "Table 3")
            references = (*several, one, *timms(procedure, model))
            hours = row[procedure]["hours"] * row[procedure]["gpus"]
            known[procedure, model] = Known(references, _px(row[procedure]), row.get("doubt", ""), hours)
    for model, row in paper["deit"].items():
        also = [paper["deit_repository"][model]] if model in paper["deit_repository"] else []
        published = [Reference(r["top1"], r["source"]) for r in (row, *also)]
        known["DeiT", model] = Known((*published, *timms("DeiT", model)), _px(row))
    for procedure, rows in paper["reconstructed"].items():
        for model, row in rows.items():
            known[procedure, model] = Known((Reference(row["top1"], row["source"]),), _px(row))
    for model, top1 in timm["a1h"].items():
        source = "timm's evaluation of the released weights"
        known["A1h", model] = Known((Reference(top1["A1h"], source, released=True),), (224, 224))
    return known | {(p, aliases[model]): value for (p, model), value in known.items() if model in aliases}


def _px(row: dict[str, Any]) -> tuple[int, int]:
    train, test = row["px"]
    return train, test


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((files(__name__) / name).read_text(encoding="utf-8"))
