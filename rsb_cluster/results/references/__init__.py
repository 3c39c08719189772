"""The numbers that runs are compared with: the paper's, DeiT's, and timm's for the released weights.

``paper.toml``, ``timm.toml`` and ``other_data.toml`` hold them, each with its source. Here is what runs on ImageNet-1k
are compared with; `rsb_cluster.results.references.other_data` is for evaluations on anything.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

PAPER, TIMM = "paper.toml", "timm.toml"


@dataclass(frozen=True)
class Reference:
    """A published value.

    Attributes:
        top1: On the data set of the procedure, which is ImageNet-1k unless it is one of fine-tuning; percent, the mean
            where there are several seeds.
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


# The data set of Table 5 by the procedure that stands for its row.
FINE_TUNED = {
    "FT-CIFAR10": "cifar10",
    "FT-CIFAR100": "cifar100",
    "FT-Flowers102": "flowers102",
    "FT-Cars": "stanford-cars",
    "FT-iNat2019": "inat2019",
}


def lookup(procedure: str, model: str, start: str = "") -> PublishedModel | None:
    """Return what is published about a model under a procedure.

    Args:
        procedure: ``paper`` of a recipe, such as ``A1``.
        model: Its timm name.
        start: Of fine-tuning: the procedure that the weights come from, ``A1``, ``A2``, ``A3`` or ``pytorch``.
    """
    if procedure in FINE_TUNED:
        row = read(PAPER)["table5"][FINE_TUNED[procedure]]
        if model != "resnet50" or not isinstance(row.get(start), float):
            return None
        return PublishedModel((Reference(row[start], f"Table 5, from {start}"),), (224, 224))
    return _known().get((procedure, model))


@cache
def _known() -> dict[tuple[str, str], PublishedModel]:
    paper, timm = read(PAPER), read(TIMM)
    measured = timm["a1_a2_a3"] | timm["deit"]

    def timms(procedure: str, model: str) -> list[Reference]:
        top1 = measured.get(model, {}).get(procedure)
        return [] if top1 is None else [Reference(top1, "timm's evaluation of the released weights", released=True)]

    known: dict[tuple[str, str], PublishedModel] = {}
    aliases = {model: row["same_as"] for model, row in paper["table3"].items() if "same_as" in row}
    for model, row in paper["table3"].items():
        for procedure in ("A1", "A2", "A3"):
            seeds = [paper[part].get(model, {}).get(procedure) for part in ("seeds", "more_seeds")]
            several = [Reference(s["mean"], s["source"], s["n"], s["std"]) for s in seeds if s]
            one = Reference(row[procedure]["top1"], "Table 3")
            references = (*several, one, *timms(procedure, model))
            hours = row[procedure]["hours"] * row[procedure]["gpus"]
            known[procedure, model] = PublishedModel(references, _px(row[procedure]), row.get("doubt", ""), hours)
    for model, row in paper["deit"].items():
        also = [paper["deit_repository"][model]] if model in paper["deit_repository"] else []
        published = [Reference(r["top1"], r["source"]) for r in (row, *also)]
        known["DeiT", model] = PublishedModel((*published, *timms("DeiT", model)), _px(row))
    for procedure, rows in paper["reconstructed"].items():
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
def read(name: str) -> dict[str, Any]:
    """Return the content of one of the files."""
    return tomllib.loads((files(__name__) / name).read_text(encoding="utf-8"))
