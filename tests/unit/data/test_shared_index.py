"""An index in shared memory is the index, for every process that maps it."""

import os
import pickle
from dataclasses import fields

import numpy as np
import pytest

from rsb_cluster.data.index import content_digest, load_index
from rsb_cluster.data.shared_index import SharedIndex
from rsb_cluster.data.subset import choose_classes
from rsb_cluster.storage.store import Store


@pytest.mark.parametrize("classes", [(), ("7", "3")])
def test_a_mapped_index_equals_the_loaded_one_and_is_read_only(digits, classes):
    index = choose_classes(load_index(Store(digits / "train")), classes, "the digits")
    shared = SharedIndex(index)
    for found in (shared.index, SharedIndex.load(os.dup(shared.descriptor), shared.outline)):
        for name in (field.name for field in fields(index)):
            one, other = getattr(index, name), getattr(found, name)
            assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other, name
        assert content_digest(found) == content_digest(index)
        with pytest.raises(ValueError, match="read-only"):
            found.labels[0] = 1
    arrays = sum(value.nbytes for value in vars(index).values() if isinstance(value, np.ndarray))
    assert len(shared.outline) < len(pickle.dumps(index)) - 0.9 * arrays, "the arrays are not in the message"


def test_the_memory_outlives_the_descriptor_and_the_descriptor_its_owner_not(digits):
    shared = SharedIndex(load_index(Store(digits / "train")))
    index, descriptor = shared.index, shared.descriptor
    del shared
    with pytest.raises(OSError):
        os.fstat(descriptor)
    assert index.labels.sum() > 0
