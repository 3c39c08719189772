"""Which samples a process draws, and how much it reads for them."""

import itertools
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_iterator

from rsb_cluster.data.index import load_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.storage.store import Store
from rsb_cluster.train.input.streams import EvalStream
from tests.unit.train.input.part import STEPS, Part, assert_same, recipe_of


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


def test_with_repeats_each_process_reads_the_images_of_its_group(digits: Path) -> None:
    """Bytes read over bytes of distinct images: as many as processes share the group, here of four virtual ranks."""
    for mine, times in (((0, 1, 2, 3), 1), ((0, 1), 2), ((0,), 4)):
        part = Part(digits, recipe_of("augment.repeats=3"), mine)
        for _ in part.batches(0):
            pass
        member = float((part.index.stops - part.index.offsets).mean())
        distinct = STEPS * 64 / 3 * member * len(mine) / 4
        assert part.reader.bytes_read / distinct == pytest.approx(times, rel=0.1)


def test_webdataset_reads_the_same_keys_and_bytes(digits: Path) -> None:
    part = Part(digits, recipe_of())
    theirs: dict[str, bytes] = {}
    for shard in part.index.shards:
        # Not webdataset.WebDataset, which leaves its files open.
        with (digits / "train" / shard).open("rb") as file:
            members = ({**member, "__url__": shard} for member in tar_file_iterator(file))
            theirs |= {sample["__key__"]: sample["png"] for sample in group_by_keys(members)}
    drawn = itertools.chain.from_iterable(part.stream())
    ours = {s.key: bytes(s.image) for micro_batch in drawn for s in micro_batch.encoded}
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
        numbers = [s.number for batches in dealt for batch in batches for s in batch.encoded]
        assert numbers == list(range(index.num_samples))
        assert max(len(batches) for batches in dealt) == streams[0].rounds
        assert all(s.label == index.labels[s.number] for batches in dealt for batch in batches for s in batch.encoded)
