"""Label sets: joined by key, whole or refused, and timm's copy of ReaL's labels is the authors'."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rsb_cluster.data.labels import LabelFile, load_label_sets, masked_labels, real_labels, write_labels
from rsb_cluster.data.make import make_shards
from rsb_cluster.data.sources import DataSource
from rsb_cluster.data.sources.imagenet import imagenet_synsets
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage.store import Store
from tests.unit.tars import index_of

KEYS = [f"n01/ILSVRC2012_val_{number:08d}" for number in (3, 1, 7, 50_000)]


@pytest.fixture
def part(tmp_path):
    source = DataSource("val", ("",) * 1000, KEYS, lambda key: (key, b"x", "jpg", 0))
    store = Store(tmp_path)
    return store, make_shards(source, store, shard_samples=2)


def test_reals_labels_are_joined_by_the_number_in_the_key(part):
    store, index = part
    write_labels(store, "real", real_labels(KEYS))
    sets = load_label_sets(store, index, "real")
    found = {index.key(i): sets.of(i).tolist() for i in range(4)}
    # By eye, from the authors' file: none for the first image, [230, 231] for the third.
    assert found[KEYS[1]] == []
    assert found[KEYS[0]] == [230, 231]
    assert sets.scored.tolist() == [bool(found[index.key(i)]) for i in range(4)]
    assert sets.among is None


def test_timms_copy_leaves_out_as_many_images_as_the_authors_do():
    labels = real_labels(f"ILSVRC2012_val_{number:08d}" for number in range(1, 50_001)).labels
    assert sum(map(bool, labels.values())) == 46_837  # arXiv:2006.07159


def test_a_file_that_is_not_reals_and_images_that_are_not_imagenets_are_refused(tmp_path):
    for content, message in (("[[1]]", "holds 1 entries; real.json is a list of 50,000"), ("{}", "no list"), ("[", "")):
        (tmp_path / "real.json").write_text(content)
        with pytest.raises(ConfigError, match=message or "cannot read the ReaL labels"):
            real_labels([], tmp_path / "real.json")
    for key in ("cat/1", "ILSVRC2012_val_00050001", "ILSVRC2012_val_00000000"):
        with pytest.raises(ConfigError, match=f"the key '{key}' does not name an image of ImageNet's validation set"):
            real_labels([key])


def test_labels_that_do_not_fit_the_index_are_refused(part):
    store, index = part
    with pytest.raises(DataError, match=r"no labels 'real' .*rsb-cluster shards labels real"):
        load_label_sets(store, index, "real")
    write_labels(store, "real", LabelFile(about="", labels={key: [1] for key in KEYS[:3]}))
    with pytest.raises(DataError, match=f"no entry for 1 images, '{KEYS[3]}'"):
        load_label_sets(store, index, "real")
    write_labels(store, "real", LabelFile(about="", labels={key: [1000] for key in KEYS}))
    with pytest.raises(DataError, match="classes that the index does not have"):
        load_label_sets(store, index, "real")
    for damaged in ("{", '{"labels": 1}', '{"about": "", "labels": {"a": ["x"]}}'):
        store.write_bytes("labels-real.json", damaged.encode())
        with pytest.raises(DataError, match=r"labels-real\.json is damaged"):
            load_label_sets(store, index, "real")


def test_groups_and_the_classes_that_may_be_answered_come_back(part):
    store, index = part
    groups = {"Blur": KEYS[:2], "None": []}
    content = LabelFile(about="x", among=(5, 2), labels={key: [2] for key in KEYS}, groups=groups)
    write_labels(store, "mine", content)
    assert LabelFile.model_validate(json.loads(store.read_bytes("labels-mine.json"))) == LabelFile.model_validate(
        content.model_dump(mode="json")
    )
    sets = load_label_sets(store, index, "mine")
    assert sets.among.tolist() == [2, 5]
    assert {index.key(i) for i in range(4) if sets.groups["Blur"][i]} == set(KEYS[:2])
    assert not sets.groups["None"].any()


def of_classes(labels, classes):
    """An index of images with these classes."""
    return replace(index_of([len(labels)]), labels=np.array(labels), classes=tuple(classes), num_classes=1000)


def test_a_mask_keeps_the_numbers_of_the_thousand_and_leaves_other_images_out():
    """6 and 11 are classes of ImageNet-A, 1 and 2 are not; of ImageNet-R are 1, 2, 6 and 11."""
    synsets = imagenet_synsets()
    index = of_classes([11, 1, 6, 0, 2], synsets)
    adversarial, renditions = (masked_labels(index, name) for name in ("a-classes", "r-classes"))
    assert [adversarial.of(i).tolist() for i in range(5)] == [[11], [], [6], [], []]
    assert [renditions.of(i).tolist() for i in range(5)] == [[11], [1], [6], [], [2]]
    for found, first in ((adversarial, [6, 11, 13]), (renditions, [1, 2, 4])):
        assert len(found.among) == 200 and found.among[:3].tolist() == first
    assert len(set(adversarial.among.tolist()) & set(renditions.among.tolist())) < 200
    assert load_label_sets(Store("/nowhere"), index, "a-classes").scored.sum() == 2
    assert masked_labels(of_classes([6], ()), "a-classes").of(0).tolist() == [6]
    for wrong in (of_classes([6], synsets[::-1]), replace(index, num_classes=200)):
        with pytest.raises(DataError, match=r"'a-classes' are for images of ImageNet's 1,000 classes"):
            masked_labels(wrong, "a-classes")


def test_a_list_of_other_things_is_not_the_authors(tmp_path):
    for value in (1, ["a"]):
        (tmp_path / "real.json").write_text(json.dumps([value] * 50_000))
        with pytest.raises(ConfigError, match=r"is no list of lists of classes: it has .* for 'ILSVRC2012_val_0000000"):
            real_labels(["ILSVRC2012_val_00000001"], tmp_path / "real.json")


def test_unknown_label_sets_are_answered_with_those_that_there_are(part):
    store, index = part
    write_labels(store, "mine", LabelFile(about="x", labels={}))
    with pytest.raises(DataError, match=r"no labels 'nope' .* It has mine; a-classes, r-classes are for ImageNet"):
        load_label_sets(store, index, "nope")
