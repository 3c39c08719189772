"""The order of samples: exact, and a function of (seed, epoch, position) alone."""

import hashlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rsb_cluster.data.order import EpochOrder, _pieces, derive_seed, derive_seeds, groups_of, permutation
from tests.unit.tars import index_of

Ints = NDArray[np.int64]


GOLDEN = [[3, 18, 4], [6, 9, 7], [17, 16, 15], [10, 11, 2], [13, 14, 5], [12, 1, 8]]


@st.composite
def epochs(draw: st.DrawFn) -> dict[str, object]:
    """Random shards, batches, repeats and blocks that leave at least one step."""
    virtual_ranks = draw(st.integers(1, 9))
    micro_batch = draw(st.integers(1, 7))
    batch = virtual_ranks * micro_batch
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12).filter(lambda s: sum(s) >= batch))
    return {
        "index": index_of(sizes),
        "seed": draw(st.integers(0, 3)),
        "epoch": draw(st.integers(0, 3)),
        "global_batch": batch,
        "virtual_ranks": virtual_ranks,
        "repeats": draw(st.integers(1, 4)),
        "block": draw(st.integers(1, 50)),
        "draws": draw(st.integers(1, 2)),
        "piece": draw(st.integers(1, 45)),
    }


def global_batches(order: EpochOrder, virtual_ranks: int) -> list[list[list[tuple[int, int]]]]:
    """All (sample, copy) of an epoch, by step and virtual rank."""
    batches = []
    for step in range(order.steps):
        draws = [order.draw(step, v) for v in range(virtual_ranks)]
        batches.append([list(zip(d.samples.tolist(), d.copies.tolist(), strict=True)) for d in draws])
    return batches


def blocks_of(order: EpochOrder, group: int) -> Ints:
    """All that is read of a group's stream in an epoch."""
    _, last = order.blocks(order.steps - 1, group)
    return np.concatenate([order.block(group, block) for block in range(last + 1)])


@given(epochs())
def test_without_repeats_each_sample_comes_at_most_once_and_only_the_remainder_is_dropped(e: dict[str, object]) -> None:
    order = EpochOrder(**{**e, "repeats": 1})  # type: ignore[arg-type]
    seen = [pair for batch in global_batches(order, e["virtual_ranks"]) for micro in batch for pair in micro]  # type: ignore[arg-type]
    samples = [sample for sample, _ in seen]
    total = e["index"].num_samples  # type: ignore[attr-defined]
    assert len(samples) == len(set(samples)) == total - order.dropped
    assert 0 <= order.dropped < e["global_batch"]  # type: ignore[operator]
    assert set(samples) <= set(range(total))


@given(epochs())
def test_copies_meet_in_one_global_batch_and_in_different_micro_batches(e: dict[str, object]) -> None:
    order = EpochOrder(**e)  # type: ignore[arg-type]
    repeats, virtual_ranks, batch = e["repeats"], e["virtual_ranks"], e["global_batch"]
    images_of_epoch: set[int] = set()
    assert order.steps == e["index"].num_samples // batch  # type: ignore[attr-defined, operator]
    for micro_batches in global_batches(order, virtual_ranks):  # type: ignore[arg-type]
        pairs = [pair for micro in micro_batches for pair in micro]
        assert len(pairs) == len(set(pairs)) == batch  # no copy twice
        images = {sample for sample, _ in pairs}
        assert not images & images_of_epoch  # never again in this epoch
        images_of_epoch |= images
        copies = {image: sorted(c for s, c in pairs if s == image) for image in images}
        assert all(c == list(range(len(c))) for c in copies.values())
        # Whole sets of copies, but for the last image of each group of virtual ranks.
        groups = max(1, virtual_ranks // repeats)  # type: ignore[operator]
        assert sum(len(c) < repeats for c in copies.values()) <= groups  # type: ignore[operator]
        if virtual_ranks >= repeats:  # type: ignore[operator]
            for micro in micro_batches:
                inside = [sample for sample, _ in micro]
                assert len(inside) == len(set(inside))


@given(epochs(), st.data())
def test_any_step_can_be_asked_for_alone(e: dict[str, object], data: st.DataObject) -> None:
    """What a process draws does not depend on what it drew before, so neither on resumes nor on who else draws."""
    straight = global_batches(EpochOrder(**e), e["virtual_ranks"])  # type: ignore[arg-type]
    fresh = EpochOrder(**e)  # type: ignore[arg-type]
    step = data.draw(st.integers(0, fresh.steps - 1))
    virtual_rank = data.draw(st.integers(0, e["virtual_ranks"] - 1))  # type: ignore[operator]
    draw = fresh.draw(step, virtual_rank)
    assert list(zip(draw.samples.tolist(), draw.copies.tolist(), strict=True)) == straight[step][virtual_rank]


@given(epochs())
def test_the_blocks_of_a_step_hold_its_samples_and_little_else_is_read(e: dict[str, object]) -> None:
    order = EpochOrder(**e)  # type: ignore[arg-type]
    for step in range(order.steps):
        for v in range(e["virtual_ranks"]):  # type: ignore[call-overload]
            group = order.group_of(v)
            first, last = order.blocks(step, group)
            held = np.concatenate([order.block(group, b) for b in range(first, last + 1)])
            assert set(order.draw(step, v).samples.tolist()) <= set(held.tolist())
    everything = np.concatenate(
        [blocks_of(order, group) for group in {order.group_of(v) for v in range(e["virtual_ranks"])}]  # type: ignore[call-overload]
    )
    assert len(everything) == len(set(everything.tolist()))  # blocks do not overlap: each sample is read once


@given(st.lists(st.integers(0, 300), min_size=1, max_size=20), st.integers(1, 100))
def test_pieces_cover_each_sample_once_and_none_spans_two_shards(sizes: list[int], size: int) -> None:
    shard_start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    first, lengths = _pieces(shard_start, size)
    covered = np.concatenate([np.arange(f, f + n) for f, n in zip(first, lengths, strict=True)] or [np.zeros(0, int)])
    assert covered.tolist() == list(range(int(shard_start[-1])))
    assert (lengths > 0).all() and (lengths <= size).all()
    shards = np.searchsorted(shard_start, first, side="right")
    assert (shards == np.searchsorted(shard_start, first + lengths - 1, side="right")).all()


def test_epochs_seeds_and_blocks_differ() -> None:
    base = {"global_batch": 32, "virtual_ranks": 4, "repeats": 1, "block": 64, "piece": 16}
    index = index_of([50] * 20)
    one = EpochOrder(index, seed=0, epoch=0, **base).draw(0, 0).samples
    assert one.tolist() != EpochOrder(index, seed=0, epoch=1, **base).draw(0, 0).samples.tolist()
    assert one.tolist() != EpochOrder(index, seed=1, epoch=0, **base).draw(0, 0).samples.tolist()
    assert one.tolist() != sorted(one.tolist())


def test_the_order_is_the_one_of_earlier_versions() -> None:
    """A run may outlive an upgrade: these numbers must never change."""
    assert permutation(8, 0, 1).tolist() == [3, 7, 4, 2, 1, 6, 5, 0]
    assert derive_seed(1, 2, 3) == 16416179746454340671
    order = EpochOrder(
        index_of([5, 3, 7, 4]), seed=3, epoch=2, global_batch=6, virtual_ranks=2, repeats=1, block=4, piece=2
    )
    assert [order.draw(s, v).samples.tolist() for s in range(3) for v in range(2)] == GOLDEN


def test_the_plan_of_an_imagenet_epoch_needs_little_memory() -> None:
    """1.28 M samples in 1,281 shards and 64 virtual ranks; its time is measured in tests/benchmarks."""
    index = index_of([1000] * 1281)
    tracemalloc.start()
    order = EpochOrder(index, seed=0, epoch=0, global_batch=2048, virtual_ranks=64, repeats=1, block=4096, piece=64)
    for v in range(64):
        order.draw(300, v)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * 2**20


def test_a_process_reads_no_more_than_its_share() -> None:
    """Read amplification of a process: bytes of its blocks over bytes of its samples."""
    index = index_of([1000] * 128)
    order = EpochOrder(index, seed=0, epoch=0, global_batch=2048, virtual_ranks=64, repeats=1, block=4096, piece=64)
    for v in range(64):
        read = len(blocks_of(order, order.group_of(v)))
        used = order.steps * order.micro_batch
        assert read / used <= 1.1


@pytest.mark.parametrize("bad", [-1, 4])
def test_a_step_outside_the_epoch_is_refused(bad: int) -> None:
    order = EpochOrder(index_of([16]), seed=0, epoch=0, global_batch=4, virtual_ranks=2, repeats=1, block=8, piece=3)
    with pytest.raises(IndexError, match="outside"):
        order.draw(bad, 0)


def test_seeds_that_are_derived_together_are_those_derived_one_by_one() -> None:
    numbers, copies = np.random.default_rng(0).integers(0, 2**32, 200), np.arange(200) % 4
    for seed in (0, 1, 2**32 - 1, 2**32, 2**70):
        found = derive_seeds(seed, 299, numbers, copies, 2).tolist()
        assert found == [
            derive_seed(seed, 299, n, c, 2) for n, c in zip(numbers.tolist(), copies.tolist(), strict=True)
        ]
    assert derive_seeds(numbers).tolist() == [derive_seed(n) for n in numbers.tolist()]


def test_groups_are_of_a_power_of_two_where_that_divides_the_virtual_ranks() -> None:
    """And of a run of draws 1 they are what they were."""
    for virtual_ranks in (4, 8, 16, 32, 64):
        for repeats in (2, 3, 4):
            groups = groups_of(virtual_ranks, repeats, 2)
            size = 2 if repeats == 2 else 4
            assert groups == [range(first, first + size) for first in range(0, virtual_ranks, size)]
    assert groups_of(6, 3, 2) == groups_of(6, 3, 1) == [range(3), range(3, 6)]
    assert groups_of(2, 3, 2) == groups_of(2, 3, 1) == [range(2)]
    assert groups_of(16, 3, 1) == [range(3), range(3, 6), range(6, 9), range(9, 12), range(12, 16)]
    for draws in (1, 2):
        assert groups_of(5, 1, draws) == [range(i, i + 1) for i in range(5)]


def test_the_order_of_a_run_of_draws_1_stays_and_that_of_2_has_other_groups() -> None:
    base = {"seed": 0, "epoch": 0, "global_batch": 64, "virtual_ranks": 16, "repeats": 3, "block": 32, "piece": 4}
    one, two = (EpochOrder(index_of([100, 100]), **base, draws=draws) for draws in (1, 2))
    assert (one.members(one.group_of(3)), two.members(two.group_of(3))) == (range(3, 6), range(4))
    for order, digest in ((one, "02e5cc39bb34"), (two, "c7c7d2229120")):
        drawn = b"".join(order.draw(step, rank).samples.tobytes() for step in range(3) for rank in range(16))
        assert hashlib.sha256(drawn).hexdigest()[:12] == digest
