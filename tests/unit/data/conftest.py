"""Shards that several files read."""

import pytest

from rsb_cluster.data.indexing import build_index
from tests.unit.tars import read_by_webdataset, samples_of, store_of, tar_of


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    """A store of 70 samples in two shards, its index, and the images."""
    store = store_of(tmp_path_factory.mktemp("two"), a=tar_of(samples_of(40)), b=tar_of(samples_of(30, 40)))
    index = build_index(store)
    expected = [sample["jpg"] for sample in read_by_webdataset(store, index.shards)]
    return store, index, expected
