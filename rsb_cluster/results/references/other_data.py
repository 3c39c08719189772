"""Published values of weights on any data set, at any resolution, for evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rsb_cluster.config import paper
from rsb_cluster.results.references import FINE_TUNED, TIMM, Reference, load_table, lookup

TABLE1_MODEL = "resnet50"

# The table of timm.toml for a data set and labels; those of the first are in the paper as well.
_PAPER_TOO = {("imagenet-1k", "real"): "real", ("imagenet-v2", ""): "v2"}
_TIMM_ONLY = {
    ("imagenet-1k", "a-classes"): "a_clean",
    ("imagenet-1k", "r-classes"): "r_clean",
    ("imagenet-a", "a-classes"): "a",
    ("imagenet-r", "r-classes"): "r",
    ("imagenet-sketch", ""): "sketch",
}

V2_DOUBT = "timm measures 0.1 to 0.4 less on V2 than the paper prints, for the same weights; why is not known"


@dataclass(frozen=True)
class PublishedValue:
    """A published value, and its preprocessing.

    Attributes:
        reference: The value; its ``top1`` is that of ``metric``.
        metric: As in `rsb_cluster.data.datasets`.
        px: Side of the crop; None if not public.
        crop: Crop ratio; None if not public.
        is_same: Whether a match is meaningful: the source's training and images are public.
    """

    reference: Reference
    metric: str = "top1"
    px: int | None = None
    crop: float | None = None
    is_same: bool = True


def published_on(
    data_set: str, labels: str, procedure: str, model: str, init_procedure: str = ""
) -> list[PublishedValue]:
    """Return the published values of a model on a data set, the preferred one first.

    Args:
        data_set: Name in datasets.toml.
        labels: ``real``, ``a-classes`` or ``r-classes``; empty for the set's own.
        procedure: As in `rsb_cluster.results.references.lookup`.
        model: timm's name, without a tag.
        init_procedure: As in `rsb_cluster.results.references.lookup`.
    """
    if data_set == "imagenet-1k" and not labels:
        found = _imagenet(procedure, model)
    elif (data_set, labels) in _PAPER_TOO:
        found = _elsewhere(_PAPER_TOO[data_set, labels], procedure, model)
    elif (data_set, labels) in _TIMM_ONLY:
        found = _by_timm(_TIMM_ONLY[data_set, labels], procedure, model)
    elif FINE_TUNED.get(procedure) == data_set:
        known = lookup(procedure, model, init_procedure)
        # The paper's fine-tuning procedure is not public.
        found = iter([PublishedValue(one, px=known.px[1], is_same=False) for one in known.references] if known else [])
    else:
        found = _others(data_set, model)
    return list(found)


def not_public(data_set: str) -> str:
    """Return why there is no value for a data set on which others cite the paper; empty for other data sets."""
    reason = str(load_table("other_data.toml").get(data_set, {}).get("not_public", ""))
    return not_public(reason.removeprefix("as ")) if reason.startswith("as ") else reason


def doubt(data_set: str, procedure: str, model: str) -> str:
    """Return why a comparison may not be valid; empty if it is."""
    known = lookup(procedure, model)
    return V2_DOUBT if data_set == "imagenet-v2" else (known.doubt if known else "")


def _imagenet(procedure: str, model: str) -> Iterator[PublishedValue]:
    known = lookup(procedure, model)
    if known is None:
        return
    px = known.px[1]
    for reference in known.references:
        yield PublishedValue(reference, px=px, crop=_crop(procedure, reference.released))
    other = load_table(TIMM)["other_px"].get(model, {}).get(procedure)
    if other is not None:
        other_px, crop = (160, 0.95) if procedure == "A3" else (288, 1.0)
        yield PublishedValue(_timm_reference(other), px=other_px, crop=crop)
    for ratio, values in paper.tables()["other_crops"].get(model, {}).items():
        if procedure in values:
            mean, std, _ = values[procedure]
            yield PublishedValue(Reference(mean, "Table 9, 10 seeds", 10, std), px=px, crop=float(ratio))


def _elsewhere(labels: str, procedure: str, model: str) -> Iterator[PublishedValue]:
    """Yield values on ReaL's labels, or on V2."""
    tables, known = paper.tables(), lookup(procedure, model)
    px = known.px[1] if known else 224
    seeds = tables["more_labels"].get(model, {}).get(labels) if procedure == "A2" else None
    if seeds:  # Figure 1
        yield PublishedValue(
            Reference(seeds["mean"], "Figure 1, 100 seeds", seeds["n"], seeds["std"]), px=px, crop=0.95
        )
    if model == TABLE1_MODEL and procedure in tables["table1"]:
        yield PublishedValue(Reference(tables["table1"][procedure][labels], "Table 1"), px=px, crop=0.95)
    elif procedure == "A1" and model in tables["table4"]:
        yield PublishedValue(Reference(tables["table4"][model][labels], "Table 4"), px=px, crop=0.95)
    yield from _by_timm(labels, procedure, model)


def _by_timm(table: str, procedure: str, model: str) -> Iterator[PublishedValue]:
    value = load_table(TIMM)[table].get(model, {}).get(procedure)
    if value is not None:
        yield PublishedValue(_timm_reference(value), px=224, crop=_crop(procedure, released=True))


def _others(data_set: str, model: str) -> Iterator[PublishedValue]:
    content = load_table("other_data.toml")
    source = content["sources"]["indl" if data_set.startswith("indl") else "nct"]
    for metric, value in content.get(data_set, {}).get(model, {}).items():
        yield PublishedValue(Reference(value, source), metric=metric, is_same=False)


def _timm_reference(value: float) -> Reference:
    return Reference(value, "timm's evaluation of the released weights", released=True)


def _crop(procedure: str, released: bool) -> float:
    if procedure != "DeiT":
        return 0.95
    return 0.9 if released else 0.875
