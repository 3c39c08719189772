"""From shards to batches: the same batches whoever decodes them, nothing read twice, nothing left behind."""

import dataclasses
import io
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from webdataset.tariterators import group_by_keys, tar_file_iterator

from rsb_cluster.catalog import load_recipe
from rsb_cluster.data.index import ShardIndex, load_index
from rsb_cluster.data.make import make_set
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.sources import open_set
from rsb_cluster.errors import DataError
from rsb_cluster.recipe import Recipe
from rsb_cluster.storage import Store
from rsb_cluster.train.augment import TrainTransform
from rsb_cluster.train.loader import Batch, ThreadedBatches, process_batches
from rsb_cluster.train.pixels.decode import Source
from rsb_cluster.train.pixels.transforms import FastTrain
from rsb_cluster.train.streams import EvalStream, TrainStream

STEPS = 22  # of an epoch of the digits: 1,438 // 64


def recipe_of(*assignments: str) -> Recipe:
    return load_recipe("digits", assignments=["data.shuffle_samples=100", *assignments]).recipe


class Part:
    """What one process of a run sees of the digits."""

    def __init__(self, data: Path, recipe: Recipe, mine: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        self.index: ShardIndex = load_index(Store(data / "train"))
        self.reader = ShardReader(Store(data / "train"), self.index)
        self.recipe, self.mine = recipe, mine

    def stream(self, start: int = 0, stop: int = STEPS) -> TrainStream:
        return TrainStream(
            self.reader, self.recipe, self.index, seed=0, virtual_ranks=4, mine=self.mine, start_step=start,
            stop_step=stop,
        )  # fmt: skip

    def batches(self, threads: int, start: int = 0, stop: int = STEPS) -> ThreadedBatches:
        side = self.recipe.augment.resolution
        return ThreadedBatches(self.stream(start, stop), FastTrain(self.recipe), side=side, threads=threads, pin=False)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 crops of two photographs, as JPEG and one as PNG."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]

    def read(i: int) -> tuple[str, bytes, str, int]:
        width, height = (int(side) for side in rng.integers(100, 200, 2))
        x, y = (int(at) for at in rng.integers(0, 200, 2))
        file, kind = io.BytesIO(), "PNG" if i == 7 else "JPEG"
        sources[i % 2].crop((x, y, x + width, y + height)).save(file, kind)
        return f"photo{i:03d}", file.getvalue(), kind.lower(), i % 10

    source = dataclasses.replace(open_set("digits", split="train")["train"], entries=range(60), read=read)
    make_set({"train": source}, Store(folder), shard_samples=20)
    return folder


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("images", "labels", "samples", "good"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.bad == other.bad


def loader_threads() -> set[str]:
    names = ("feeder", "decoder", "read-ahead")
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(names)}


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_number_of_threads_does_not_change_a_batch(digits: Path, repeats: int) -> None:
    recipe = recipe_of("augment.rand_augment=rand-m7-mstd0.5-inc1", f"augment.repeats={repeats}")
    inline = list(Part(digits, recipe).batches(0, 3, 9))
    assert len(inline) == 6 * 4
    for threads in (1, 3):
        for one, other in zip(inline, Part(digits, recipe).batches(threads, 3, 9), strict=True):
            assert_same(one, other)
    assert loader_threads() == set()


def test_copies_that_share_a_decode_are_those_that_do_not(photographs: Path) -> None:
    """A process with all virtual ranks decodes an image once; one with a single virtual rank, each copy for itself."""
    recipe = recipe_of(
        "augment.rand_augment=rand-m7-mstd0.5-inc1", "augment.repeats=3", "augment.resolution=64",
        "train.global_batch=20", "data.train_samples=60",
    )  # fmt: skip
    together = list(Part(photographs, recipe).batches(2, 0, 3))
    alone = [list(Part(photographs, recipe, (v,)).batches(2, 0, 3)) for v in range(4)]
    images: set[int] = set()
    for i, batch in enumerate(together):
        assert_same(batch, alone[i % 4][i // 4])
        images |= set(batch.samples.tolist())
    assert len(images) < sum(len(batch.samples) for batch in together) / 2


def test_an_image_is_decoded_once_for_its_copies(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []

    class Counted(Source):
        def __init__(self, encoded: bytes | memoryview) -> None:
            opened.append(encoded)
            super().__init__(encoded)

    monkeypatch.setattr("rsb_cluster.train.loader.Source", Counted)
    batches = list(Part(digits, recipe_of("augment.repeats=3")).batches(2, 0, 2))
    drawn = [set().union(*(batch.samples.tolist() for batch in batches[i : i + 4])) for i in (0, 4)]
    assert len(opened) == sum(map(len, drawn))


def test_batches_are_channels_last_without_a_copy(digits: Path) -> None:
    batch = next(iter(Part(digits, recipe_of()).batches(0)))
    assert batch.images.shape == (16, 3, 32, 32)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_the_fast_pipeline_and_timms_give_the_same_samples_and_nearly_the_same_pixels(digits: Path) -> None:
    recipe = recipe_of()
    fast = list(Part(digits, recipe).batches(2, 0, 4))
    stock = list(process_batches(Part(digits, recipe).stream(0, 4), TrainTransform(recipe), workers=0, pin=False))
    for one, other in zip(fast, stock, strict=True):
        assert torch.equal(one.samples, other.samples) and torch.equal(one.labels, other.labels)
        difference = (one.images.int() - other.images.int()).abs()
        assert difference.float().mean() < 0.5  # the same crops: others differ by tens


def test_the_processes_of_a_run_share_its_samples(digits: Path) -> None:
    """Two processes of two virtual ranks each draw together what one process of four draws."""
    recipe = recipe_of()
    whole = [batch.samples.tolist() for batch in Part(digits, recipe).batches(0, 5, 8)]
    halves = [iter(Part(digits, recipe, mine).batches(0, 5, 8)) for mine in ((0, 1), (2, 3))]
    together: list[list[int]] = []
    for _ in range(3):
        for half in halves:
            together += [next(half).samples.tolist() for _ in range(2)]
    assert together == whole


def test_a_resume_reads_only_what_is_still_to_come_and_its_own_block(digits: Path) -> None:
    recipe, stop = recipe_of(), STEPS
    straight = Part(digits, recipe)
    everything = list(straight.batches(0, 0, stop))
    late = Part(digits, recipe)
    resumed = list(late.batches(0, stop - 4, stop))
    for one, other in zip(everything[-16:], resumed, strict=True):
        assert_same(one, other)
    block_bytes = straight.reader.bytes_used / sum(len(b.samples) for b in everything) * 100
    still_to_come = 4 * 64 / (stop * 64) * straight.reader.bytes_used
    assert late.reader.bytes_used <= 1.1 * (still_to_come + 4 * block_bytes)  # four streams, a block each


def test_without_repeats_hardly_more_is_read_than_used(digits: Path) -> None:
    for mine in ((0, 1, 2, 3), (0,), (3,)):
        part = Part(digits, recipe_of(), mine)
        for _ in part.batches(0):
            pass
        sizes = part.index.image_sizes.sum() / (part.index.stops - part.index.offsets).sum()
        assert part.reader.bytes_used / part.reader.bytes_read > sizes * 0.9  # the rest is tar headers and labels


def test_webdataset_reads_the_same_keys_and_bytes(digits: Path) -> None:
    part = Part(digits, recipe_of())
    theirs: dict[str, bytes] = {}
    for shard in part.index.shards:
        # Not webdataset.WebDataset, which leaves its files open.
        with (digits / "train" / shard).open("rb") as file:
            members = ({**member, "__url__": shard} for member in tar_file_iterator(file))
            theirs |= {sample["__key__"]: sample["png"] for sample in group_by_keys(members)}
    ours = {s.key: bytes(s.image) for samples in itertools.chain.from_iterable(part.stream()) for s in samples}
    assert len(ours) == STEPS * 64
    assert all(theirs[key] == image for key, image in ours.items())


def test_evaluation_deals_each_image_once(digits: Path) -> None:
    index = load_index(Store(digits / "val"))
    for world_size in (1, 2, 3, 4, 7):
        streams = [
            EvalStream(ShardReader(Store(digits / "val"), index), index, rank=r, world_size=world_size, batch=20)
            for r in range(world_size)
        ]
        dealt = [list(itertools.chain.from_iterable(stream)) for stream in streams]
        numbers = [s.number for batches in dealt for samples in batches for s in samples]
        assert numbers == list(range(index.num_samples))
        assert max(len(batches) for batches in dealt) == streams[0].rounds
        assert all(s.label == index.labels[s.number] for batches in dealt for samples in batches for s in samples)


def test_threads_end_with_a_loader_that_is_left_early(digits: Path) -> None:
    source = iter(Part(digits, recipe_of()).batches(2))
    next(source)
    assert loader_threads()
    source.close()  # type: ignore[attr-defined]
    assert loader_threads() == set()


def test_an_error_while_decoding_names_the_sample(digits: Path) -> None:
    part = Part(digits, recipe_of())

    def broken(encoded: object, seed: int, out: object) -> None:
        raise ZeroDivisionError("a bug")

    for threads in (0, 2):
        batches = ThreadedBatches(part.stream(), broken, side=32, threads=threads, pin=False)
        with pytest.raises(RuntimeError, match=r"decoding sample '.+' failed: ZeroDivisionError") as caught:
            next(iter(batches))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert loader_threads() == set()


def test_an_error_while_reading_surfaces_at_its_place(tmp_path: Path) -> None:
    """The batches that were read before it are still given out."""
    source = open_set("digits", split="train")
    part = dataclasses.replace(source["train"], entries=source["train"].entries[:400])
    make_set({"train": part}, Store(tmp_path), shard_samples=100)
    part = Part(tmp_path, recipe_of("data.train_samples=400", "data.shuffle_samples=40"))
    shard = tmp_path / "train" / part.index.shards[0]
    shard.write_bytes(shard.read_bytes()[:20_000] + bytes(3000) + shard.read_bytes()[23_000:])
    for threads in (0, 2):
        with pytest.raises(DataError, match="shards verify"):
            for _ in part.batches(threads, 0, 6):
                pass
    assert loader_threads() == set()


@pytest.fixture
def with_a_bad_image(tmp_path: Path) -> tuple[Path, str]:
    """200 digits, one of them cut off; and its key."""
    source = open_set("digits", split="train")["train"]

    def read(entry: int):  # type: ignore[no-untyped-def]
        key, image, extension, label = source.read(entry)
        return key, image[:50] if entry == source.entries[7] else image, extension, label

    bad = dataclasses.replace(source, entries=source.entries[:200], read=read)
    make_set({"train": bad}, Store(tmp_path), shard_samples=50)
    return tmp_path, source.sample(7)[0]


@pytest.mark.parametrize("pipeline", ["fast", "timm"])
def test_a_bad_image_is_named_once_and_replaced_by_its_neighbour(
    with_a_bad_image: tuple[Path, str], pipeline: str
) -> None:
    data, key = with_a_bad_image
    recipe = recipe_of("data.train_samples=200", "augment.repeats=3")
    part = Part(data, recipe)

    def batches() -> Iterator[Batch]:
        if pipeline == "fast":
            return iter(part.batches(2, 0, 3))
        return iter(process_batches(part.stream(0, 3), TrainTransform(recipe), workers=0, pin=False))

    number = next(i for i in range(200) if part.index.key(i) == key)
    found = list(batches())
    drawn = sum(int((batch.samples == number).sum()) for batch in found)
    named = list(itertools.chain.from_iterable(batch.bad for batch in found))
    assert len(named) == (1 if drawn else 0) and all(name.startswith(f"{key}: ") for name in named)
    for batch in found:
        for i in np.flatnonzero(~batch.good.numpy()).tolist():
            j = (i + 1) % len(batch.good)
            assert batch.samples[i] == number
            assert torch.equal(batch.images[i], batch.images[j]) and batch.labels[i] == batch.labels[j]
    assert drawn == sum(int((~batch.good).sum()) for batch in found)
