"""Memory that does not suffice is found before an attempt counts; here a network says how much it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.node.ranks import Ranks
from rsb_cluster.storage.store import Store
from rsb_cluster.train import rehearsal
from rsb_cluster.train.distributed import ProcessGroup
from rsb_cluster.train.rehearsal import TooLargeError, fit_micro_batch


class Hungry(nn.Module):
    """A network for which a device has room for some images."""

    def __init__(self, room: int, norm: nn.Module) -> None:
        super().__init__()
        self._room, self.sizes = room, list[int]()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    def forward(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        assert self.training and images.is_contiguous(memory_format=torch.channels_last)
        if len(images) > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nAnd much else.")
        logits: Tensor = self.layers(images)
        return logits


@pytest.fixture
def group(tmp_path: Path) -> Iterator[ProcessGroup]:
    group = ProcessGroup(Ranks(0, 0, 1, "memory", 0, 1), Store(tmp_path), wait_s=60, collective_s=60)
    yield group
    group.close()


def recipe(*more: str) -> Recipe:
    return load_recipe("digits", overrides=parse_overrides(["train.channels_last=true", *more])).recipe


@pytest.mark.parametrize(("room", "sizes"), [(12, [12]), (11, [12, 6]), (5, [12, 6, 4]), (1, [12, 6, 4, 3, 2, 1])])
def test_without_batchnorm_a_micro_batch_is_computed_in_equal_parts(
    group: ProcessGroup, monkeypatch: pytest.MonkeyPatch, room: int, sizes: list[int]
) -> None:
    network = Hungry(room, nn.GroupNorm(1, 4))
    monkeypatch.setattr(rehearsal, "build_model", lambda recipe: network)
    assert fit_micro_batch(recipe(), 12, group) == 12 // sizes[-1]
    assert network.sizes == sizes
    assert all(p.grad is None for p in network.parameters())


def test_what_is_compiled_is_not_computed_in_parts(group: ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part draws for the whole micro-batch, which the compiler does not follow."""
    network = Hungry(11, nn.GroupNorm(1, 4))
    monkeypatch.setattr(rehearsal, "build_model", lambda recipe: network)
    with pytest.raises(TooLargeError, match=r"torch\.compile needs it whole"):
        fit_micro_batch(recipe("train.compile=true"), 12, group)
    assert network.sizes == [12]


@pytest.mark.parametrize(
    ("room", "norm", "why", "sizes"),
    [(11, nn.BatchNorm2d(4), "BatchNorm needs it whole", [12]), (0, nn.GroupNorm(1, 4), "nor does one image", None)],
)
def test_what_does_not_fit_names_the_choices(
    group: ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    norm: nn.Module,
    why: str,
    sizes: list[int] | None,
) -> None:
    network = Hungry(room, norm)
    monkeypatch.setattr(rehearsal, "build_model", lambda recipe: network)
    with pytest.raises(TooLargeError) as raised:
        fit_micro_batch(recipe(), 12, group)
    message = str(raised.value)
    for part in (
        why,
        "12 images",
        f"rank 0 on {group.host}",
        "20.00 GiB",
        "--nodes",
        "checkpointing",
        "--virtual-ranks",
    ):
        assert part in message
    assert "much else" not in message
    assert sizes is None or network.sizes == sizes
