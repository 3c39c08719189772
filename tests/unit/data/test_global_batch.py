"""Who computes which images of a global batch."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsb_cluster.data.global_batch import GlobalBatch, hosts_of_parts, places_by_host
from tests.unit.bundled import load_recipe

PAPER = GlobalBatch(virtual_ranks=4, micro_batch=512, mixes=True)


def test_a_batch_of_the_paper_is_shared_by_powers_of_two():
    assert [w for w in range(1, 2049) if PAPER.fits(w)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert PAPER.most == 1024, "each has at least a pair"
    assert GlobalBatch(4, 512, mixes=False).most == 2048
    assert (PAPER.parts(2), PAPER.parts(4), PAPER.parts(32)) == (1, 1, 8)
    assert (PAPER.images_at_once(1), PAPER.images_at_once(32)) == (512, 64)


@pytest.mark.parametrize(
    ("processes", "multiple_of", "nearest"),
    [(24, 8, [16, 32]), (3, 1, [2, 4]), (5, 5, []), (4000, 8, [1024]), (12, 3, [])],
)
def test_the_nearest_numbers_of_processes_that_fit(processes, multiple_of, nearest):
    assert PAPER.nearest(processes, multiple_of) == nearest


def test_what_cannot_be_shared_has_whole_virtual_ranks_only():
    compiled = GlobalBatch.of(load_recipe("a1", "train.compile=true"), 4)
    assert [w for w in range(1, 65) if compiled.fits(w)] == [1, 2, 4] and "torch.compile" in compiled.unshared
    recomputed = GlobalBatch.of(load_recipe("a1"), 4, recomputes=True)
    assert not recomputed.fits(8) and "job.gradient_checkpointing" in recomputed.unshared
    stock = ("data.pipeline=timm", "data.max_bad_samples=1")
    assert not GlobalBatch.of(load_recipe("a1", *stock), 4).fits(8)
    assert GlobalBatch.of(load_recipe("a1", stock[0]), 4).fits(8)


batches = st.builds(
    GlobalBatch,
    virtual_ranks=st.integers(1, 12),
    micro_batch=st.sampled_from([2, 4, 6, 8, 12, 16, 24, 48]),
    mixes=st.booleans(),
)


@given(batch=batches, data=st.data())
def test_each_image_is_computed_once_and_pairs_stay_together(batch, data):
    processes = data.draw(st.sampled_from([w for w in range(1, batch.most + 1) if batch.fits(w)]))
    shares = [batch.share(place, processes) for place in range(processes)]
    computed = [(v, slot) for share in shares for v in share.virtual_ranks for slot in share.slots]
    assert sorted(computed) == list(itertools.product(range(batch.virtual_ranks), range(batch.micro_batch)))
    for share in shares:
        assert len(share.slots) == batch.images_at_once(processes)
        if batch.mixes:  # timm pairs the first image of its batch with the last
            pairs = zip(share.slots, reversed(share.slots), strict=True)
            assert all(one + other == batch.micro_batch - 1 for one, other in pairs)


@given(batch=batches, allowed=st.integers(1, 200))
def test_the_largest_number_of_processes_fits_and_no_larger_one_does(batch, allowed):
    largest = batch.largest(allowed)
    assert batch.fits(largest) and not any(batch.fits(w) for w in range(largest + 1, allowed + 1))


@pytest.mark.parametrize(
    ("hosts", "parts", "places"),
    [
        ("aaaabbbb", 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("abababab", 4, [0, 4, 1, 5, 2, 6, 3, 7]),  # as Slurm deals cyclically
        ("abababab", 1, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("aaabbb", 2, [0, 1, 4, 2, 3, 5]),  # only the last of each host have a partner elsewhere
    ],
)
def test_processes_that_share_a_virtual_rank_are_on_one_host_however_ranks_are_numbered(hosts, parts, places):
    assert places_by_host(list(hosts), parts) == places


def test_hosts_that_a_virtual_rank_spans_are_named():
    places = places_by_host(list("aaabbb"), 2)
    assert hosts_of_parts(list("aaabbb"), places, 2) == [{"a"}, {"b"}, {"a", "b"}]
