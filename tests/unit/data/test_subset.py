"""A subset of classes reads the right images with the right numbers, from shards that are as they were."""

import numpy as np
import pytest

from rsb_cluster.data.index import content_digest
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.labels import LabelFile, load_label_sets, write_labels
from rsb_cluster.data.order import EpochOrder
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.subset import choose_classes, choose_sets, class_numbers
from rsb_cluster.errors import ConfigError
from tests.unit.tars import pair, store_of, tar_of


def image(number):
    return b"%05d" % number * 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Shards of 60 samples of 5 classes; the second shard has only class 4."""
    members = [pair(f"k{i:03d}", image(i), i % 4 if i < 40 else 4) for i in range(60)]
    parts = {"a": members[:20], "b": members[40:], "c": members[20:40]}
    store = store_of(
        tmp_path_factory.mktemp("whole"), **{name: tar_of([m for p in part for m in p]) for name, part in parts.items()}
    )
    return store, build_index(store, classes=("ant", "bee", "cat", "dog", "eel"))


def test_all_classes_are_the_index_itself(whole):
    store, index = whole
    assert choose_classes(index, (), store.url) is index


@pytest.mark.parametrize(
    "names", [("dog", "ant"), ("eel",), ("cat", "eel", "bee"), ("eel", "dog", "cat", "bee", "ant")]
)
def test_each_sample_has_its_own_image_key_and_new_number(whole, names):
    store, index = whole
    chosen = choose_classes(index, names, store.url)
    wanted = [i for i in range(60) if index.class_names[index.labels[i]] in names]
    assert [chosen.key(i) for i in range(chosen.num_samples)] == [index.key(i) for i in wanted]
    assert [names[label] for label in chosen.labels] == [index.class_names[index.labels[i]] for i in wanted]
    assert (chosen.classes, chosen.num_classes, chosen.shards) == (names, len(names), index.shards)
    read = ShardReader(store, chosen).read(np.arange(chosen.num_samples))
    assert [bytes(read[i]) for i in range(chosen.num_samples)] == [
        image(int(chosen.key(i)[1:])) for i in range(chosen.num_samples)
    ]
    assert chosen.digest == content_digest(chosen) != index.digest
    assert chosen.digest != choose_classes(index, names[::-1], store.url).digest or len(names) == 1


def test_an_epoch_has_each_sample_of_the_subset_once(whole):
    store, index = whole
    chosen = choose_classes(index, ("dog", "eel"), store.url)
    order = EpochOrder(chosen, seed=0, epoch=0, global_batch=6, virtual_ranks=2, repeats=1, block=8, piece=4)
    drawn = [int(i) for step in range(order.steps) for rank in range(2) for i in order.draw(step, rank).samples]
    assert sorted(drawn) == list(range(30))


def test_classes_without_a_name_are_called_by_their_number(tmp_path):
    store = store_of(tmp_path, s=tar_of([m for i in range(6) for m in pair(f"{i}", image(i), i % 3)]))
    index = build_index(store, classes=("zero",))
    assert index.class_names == ("zero", "1", "2")
    assert choose_classes(index, ("2", "zero"), store.url).labels.tolist() == [1, 0, 1, 0]


def test_unknown_repeated_and_empty_classes_are_refused(whole):
    store, index = whole
    for names, message in (
        (("dogs",), "has no class 'dogs'. Did you mean 'dog'"),
        (("dog", "dog"), "'dog' is named twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose_classes(index, names, store.url)
    empty = build_index(store, classes=("ant", "bee", "cat", "dog", "eel", "fox"))
    with pytest.raises(ConfigError, match="no sample of the classes fox"):
        choose_classes(empty, ("fox",), store.url)


def test_label_sets_are_those_of_the_chosen_samples_with_the_new_numbers(whole):
    store, index = whole
    labels = {index.key(i): (int(index.labels[i]), 4) for i in range(60)}
    groups = {"all": list(labels), "first": [index.key(0)]}
    write_labels(store, "two", LabelFile(about="", labels=labels, among=(0, 1, 3, 4), groups=groups))
    sets = choose_sets(load_label_sets(store, index, "two"), index, ("dog", "ant"), store.url)
    chosen = choose_classes(index, ("dog", "ant"), store.url)
    assert [sets.of(i).tolist() for i in range(chosen.num_samples)] == [[label] for label in chosen.labels.tolist()]
    assert sets.among is not None and sets.among.tolist() == [0, 1]
    assert {name: int(members.sum()) for name, members in sets.groups.items()} == {"all": 20, "first": 1}


def test_a_name_of_two_classes_is_not_one_of_them(whole):
    store, _ = whole
    index = build_index(store, classes=("crane", "bee", "crane", "caf\xe9"))
    assert index.class_names == ("crane (0)", "bee", "crane (2)", "caf\xe9", "4")
    with pytest.raises(ConfigError, match=r"has no class 'crane'\. Did you mean 'crane \(\d\)'"):
        choose_classes(index, ["crane"], "here")
    assert choose_classes(index, ["crane (2)", "cafe\u0301"], "here").num_samples == 20
    with pytest.raises(ConfigError, match=r"here has two classes 'a', 0 and 2\. Rename one"):
        class_numbers(["a"], ("a", "b", "a"), "here")
