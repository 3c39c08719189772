"""Sets sorted by class are told from mixed ones, in figures that agree with the order of samples itself."""

from dataclasses import replace

import numpy as np
import pytest

from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.mixing import class_mixing, mixing_note
from rsb_cluster.data.order import EpochOrder, permutation
from rsb_cluster.data.verify import verify
from tests.unit.tars import index_of, pair, store_of, tar_of


def set_of(labels, shard=1000):
    """An index of samples with these classes."""
    index = index_of([shard] * (len(labels) // shard))
    return replace(index, labels=np.asarray(labels, dtype=np.int32), num_classes=int(max(labels)) + 1)


def sorted_by_class(samples, classes):
    return set_of(np.arange(samples) * classes // samples)


def mixed(samples, classes):
    return set_of(permutation(samples, 1) % classes)


@pytest.mark.parametrize(("samples", "classes"), [(200_000, 1000), (50_000, 100), (20_000, 10), (4_000, 2)])
def test_mixed_sets_are_as_random_ones(samples, classes):
    found = class_mixing(mixed(samples, classes), 4096, 64)
    assert found.spread**2 == pytest.approx(1, abs=0.02 + 4 * found.noise)
    assert found.classes == pytest.approx(found.random_classes, rel=0.02)
    assert mixing_note(mixed(samples, classes)) == ""


@pytest.mark.parametrize(("samples", "classes"), [(200_000, 1000), (50_000, 100), (20_000, 10)])
def test_sorted_sets_are_named_with_what_to_do(samples, classes):
    note = mixing_note(sorted_by_class(samples, classes))
    assert "sorted by class" in note and "--set data.shuffle_piece=" in note
    piece = int(note.partition("shuffle_piece=")[2].partition(",")[0])
    assert class_mixing(sorted_by_class(samples, classes), 4096, piece).spread < 1.3
    assert class_mixing(sorted_by_class(samples, classes), 4096, 64).spread > 1.3


def test_the_spread_is_that_of_the_micro_batches():
    index = sorted_by_class(200_000, 100)
    order = EpochOrder(index, seed=0, epoch=0, global_batch=2048, virtual_ranks=32, repeats=1, block=4096, piece=64)
    draws = [order.draw(step, rank).samples for step in range(order.steps) for rank in range(32)]
    counts = np.array([np.bincount(index.labels[samples], minlength=100) for samples in draws])
    measured = np.sqrt(((counts - 0.64) ** 2).mean() / (0.64 * 0.99))
    assert class_mixing(index, 4096, 64).spread == pytest.approx(measured, rel=0.05)


def test_one_class_and_few_samples_are_nothing_to_mix():
    assert mixing_note(set_of(np.zeros(5000, dtype=int))) == ""
    assert mixing_note(sorted_by_class(2000, 10)) == ""


def test_verify_says_so(tmp_path):
    store = store_of(
        tmp_path,
        **{f"{i:02d}": tar_of([m for j in range(150) for m in pair(f"{i:02d}_{j}", b"x%d" % j, i)]) for i in range(30)},
    )
    build_index(store)
    assert any(note.startswith("sorted by class: a shuffle block") for note in verify(store).notes)
