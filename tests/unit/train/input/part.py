"""What one process of a run sees of a data set, and whether two batches are the same."""

from pathlib import Path

import torch

from rsb_cluster.config.catalog import load_recipe
from rsb_cluster.config.recipe import Recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.data.index import ShardIndex, load_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.storage.store import Store
from rsb_cluster.train.input.loader import Batch, ThreadedBatches
from rsb_cluster.train.input.pixels.transforms import FastTrain
from rsb_cluster.train.input.sharing import Sharing
from rsb_cluster.train.input.streams import TrainStream

STEPS = 22  # of an epoch of the digits: 1,438 // 64


def recipe_of(*assignments: str) -> Recipe:
    """The recipe digits, shuffled in small blocks, with changes."""
    return load_recipe("digits", overrides=parse_overrides(["data.shuffle_samples=100", *assignments])).recipe


class Part:
    """What one process of a run sees of the digits."""

    def __init__(
        self,
        data: Path,
        recipe: Recipe,
        mine: tuple[int, ...] = (0, 1, 2, 3),
        virtual_ranks: int = 4,
        slots: tuple[int, ...] | None = None,
    ) -> None:
        self.index: ShardIndex = load_index(Store(data / "train"))
        self.reader = ShardReader(Store(data / "train"), self.index)
        self.recipe, self.mine, self.virtual_ranks, self.slots = recipe, mine, virtual_ranks, slots

    def stream(self, start: int = 0, stop: int = STEPS) -> TrainStream:
        return TrainStream(
            self.reader, self.recipe, self.index, seed=0, virtual_ranks=self.virtual_ranks,
            local_virtual_ranks=self.mine, start_step=start, stop_step=stop,
            sharing=Sharing((self.mine,), 0, (self.slots,)) if self.slots is not None else None,
        )  # fmt: skip

    def batches(self, threads: int, start: int = 0, stop: int = STEPS) -> ThreadedBatches:
        side = self.recipe.augment.resolution
        return ThreadedBatches(self.stream(start, stop), FastTrain(self.recipe), side=side, threads=threads, pin=False)


def assert_same(one: Batch, other: Batch) -> None:
    """Compare all of two batches."""
    for name in ("images", "labels", "samples", "good"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.bad == other.bad
