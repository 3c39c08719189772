"""From shards to batches: the same batches whoever decodes them, nothing read twice, nothing left behind."""

import dataclasses
import io
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from rsb_cluster.data.global_batch import GlobalBatch
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import Store
from rsb_cluster.train.augment import TrainTransform
from rsb_cluster.train.input.loader import AHEAD, Batch, ThreadedBatches, process_batches
from rsb_cluster.train.input.pixels.decode import EncodedImage
from rsb_cluster.train.input.pixels.transforms import FastTrain
from rsb_cluster.train.input.streams import MicroBatch
from tests.unit.tars import pair, tar_of
from tests.unit.threads import threads_named
from tests.unit.train.input.part import Part, assert_same, recipe_of


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 crops of two photographs as JPEG, one of them really a PNG and one progressive."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    members = []
    for i in range(60):
        width, height, x, y = (int(n) for n in (*rng.integers(100, 200, 2), *rng.integers(0, 200, 2)))
        file = io.BytesIO()
        crop = sources[i % 2].crop((x, y, x + width, y + height))
        crop.save(file, "PNG" if i == 7 else "JPEG", progressive=i == 8)
        members += pair(f"photo{i:03d}", file.getvalue(), i % 10)
    store = Store(folder / "train")
    store.write_bytes("s.tar", tar_of(members))
    build_index(store)
    return folder


def loader_threads() -> list[str]:
    return threads_named("feeder", "decoder", "read-ahead")


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_number_of_threads_does_not_change_a_batch(digits: Path, repeats: int) -> None:
    recipe = recipe_of("augment.rand_augment=rand-m7-mstd0.5-inc1", f"augment.repeats={repeats}")
    inline = list(Part(digits, recipe).batches(0, 3, 9))
    assert len(inline) == 6 * 4
    for threads in (1, 3):
        for one, other in zip(inline, Part(digits, recipe).batches(threads, 3, 9), strict=True):
            assert_same(one, other)
    assert loader_threads() == []


def test_copies_that_share_a_decode_are_those_that_do_not(photographs: Path) -> None:
    """A process with all virtual ranks decodes an image once; one with a single virtual rank, each copy for itself."""
    recipe = recipe_of(
        "augment.rand_augment=rand-m7-mstd0.5-inc1", "augment.repeats=3", "augment.resolution=64",
        "train.global_batch=20", "data.train_samples=60", "augment.mixup=0",
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

    class Counted(EncodedImage):
        def __init__(self, encoded: bytes | memoryview) -> None:
            opened.append(encoded)
            super().__init__(encoded)

    monkeypatch.setattr("rsb_cluster.train.input.loader.EncodedImage", Counted)
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


@lru_cache(maxsize=64)
def dot(number: int) -> bytes:
    """A PNG of its own for each sample."""
    file = io.BytesIO()
    Image.new("RGB", (9, 9), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def make_dots(folder: Path, sizes: list[int]) -> None:
    """A set of shards with so many samples each."""
    store, number = Store(folder / "train"), 0
    for shard, size in enumerate(sizes):
        samples = range(number, number + size)
        store.write_bytes(f"s{shard}.tar", tar_of([m for i in samples for m in pair(f"k{i}", dot(i), i % 10)]))
        number += size
    build_index(store)


@given(st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_processes_threads_and_stops_train_on_the_same_batches(tmp_path: Path, data: st.DataObject) -> None:
    """Two epochs in one go, and in attempts that each have other processes and threads: the same, and exact."""
    virtual_ranks = data.draw(st.integers(1, 6))
    batch = virtual_ranks * data.draw(st.integers(1, 5))
    repeats = data.draw(st.integers(1, min(4, batch)))
    sizes = data.draw(st.lists(st.integers(1, 25), min_size=1, max_size=5).filter(lambda s: sum(s) >= batch))
    folder = tmp_path / "-".join(map(str, sizes))
    if not folder.exists():
        make_dots(folder, sizes)
    recipe = recipe_of(
        f"train.global_batch={batch}", f"data.train_samples={sum(sizes)}", f"augment.repeats={repeats}",
        f"data.shuffle_samples={data.draw(st.integers(1, 40))}", f"data.shuffle_piece={data.draw(st.integers(1, 30))}",
        "augment.resolution=8", f"train.virtual_ranks={virtual_ranks}", "augment.mixup=0",
    )  # fmt: skip
    steps = recipe.steps_per_epoch

    def train(start: int, stop: int, world_size: int, threads: int) -> dict[tuple[int, int], Batch]:
        per_process = virtual_ranks // world_size
        found = {}
        for rank in range(world_size):
            mine = tuple(range(rank * per_process, (rank + 1) * per_process))
            part = Part(folder, recipe, mine, virtual_ranks)
            drawn = iter(part.batches(threads, start, stop))
            found |= {(step, v): next(drawn) for step in range(start, stop) for v in mine}
            assert next(drawn, None) is None
        return found

    straight = train(0, 2 * steps, 1, 0)
    for epoch in range(2):
        drawn = [s for (step, _), b in straight.items() if step // steps == epoch for s in b.samples.tolist()]
        assert len(drawn) == steps * batch
        assert max(Counter(drawn).values()) <= repeats
    stops = [0, *sorted(data.draw(st.sets(st.integers(1, 2 * steps), max_size=3)) | {2 * steps})]
    for start, stop in itertools.pairwise(stops):
        world_size = data.draw(st.sampled_from([w for w in range(1, virtual_ranks + 1) if virtual_ranks % w == 0]))
        for at, drawn_again in train(start, stop, world_size, data.draw(st.integers(0, 3))).items():
            assert_same(straight[at], drawn_again)


def test_a_slow_step_leaves_the_loader_waiting(digits: Path) -> None:
    """However long a step takes, no more batches are begun than ``AHEAD`` says."""
    part = Part(digits, recipe_of())
    taken = 0

    class Counted:
        sharing, substitutes = part.stream().sharing, part.stream().substitutes

        def __iter__(self) -> Iterator[list[MicroBatch]]:
            nonlocal taken
            for micro_batches in part.stream():
                taken += len(micro_batches)
                yield micro_batches

    batches = iter(ThreadedBatches(Counted(), FastTrain(part.recipe), side=32, threads=2, pin=False))  # type: ignore[arg-type]
    for used in range(1, 4):
        next(batches)
        time.sleep(0.5)  # a long step
        assert used < taken <= used + AHEAD + 2  # those ahead, the one to be handed over, and the one in use
    batches.close()  # type: ignore[attr-defined]


def test_threads_end_with_a_loader_that_is_left_early(digits: Path) -> None:
    source = iter(Part(digits, recipe_of()).batches(2))
    next(source)
    assert loader_threads()
    source.close()  # type: ignore[attr-defined]
    assert loader_threads() == []


def test_an_error_while_decoding_names_the_sample(digits: Path) -> None:
    part = Part(digits, recipe_of())

    def broken(encoded: object, seed: int, out: object) -> None:
        raise ZeroDivisionError("a bug")

    for threads in (0, 2):
        batches = ThreadedBatches(part.stream(), broken, side=32, threads=threads, pin=False)
        with pytest.raises(RuntimeError, match=r"decoding sample '.+' failed: ZeroDivisionError") as caught:
            next(iter(batches))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert loader_threads() == []


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
    assert loader_threads() == []


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


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_a_bad_image_of_a_shared_micro_batch_is_replaced_as_if_one_process_had_it_all(
    tmp_path: Path, processes: int
) -> None:
    """The next good one may be another process's, and bad ones may be neighbours."""
    source = open_set("digits", split="train")["train"]

    def read(entry: int):  # type: ignore[no-untyped-def]
        key, image, extension, label = source.read(entry)
        return key, image[:50] if entry % 3 else image, extension, label

    make_set({"train": dataclasses.replace(source, entries=source.entries[:200], read=read)}, Store(tmp_path))
    recipe = recipe_of("data.train_samples=200", "train.virtual_ranks=2")
    batch = GlobalBatch.of(recipe, 2)
    whole = list(Part(tmp_path, recipe, (0, 1), 2).batches(2, 0, 3))
    assert sum(len(b.bad) for b in whole) > 60, "of 192, so many have a bad neighbour"
    named: list[str] = []
    for place in range(processes):
        share = batch.share(place, processes)
        slots = None if share.is_whole else share.slots
        found = list(Part(tmp_path, recipe, tuple(share.virtual_ranks), 2, slots).batches(place % 3, 0, 3))
        for step, one in enumerate(found):
            expected = whole[2 * step + share.virtual_ranks[0]]
            for name in ("images", "labels", "samples", "good"):
                assert torch.equal(getattr(one, name), getattr(expected, name)[list(share.slots)]), name
            named += one.bad
    assert sorted(named) == sorted(itertools.chain.from_iterable(b.bad for b in whole))
