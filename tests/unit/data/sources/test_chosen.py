"""Only some classes of a source: their images, numbered in the order of the list."""

import pytest

from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import DataSource, open_set
from rsb_cluster.data.sources.chosen import choose_from
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.tars import read_back


@pytest.mark.parametrize("layout", ["imagenet_folders", "imagenet_tars"])
def test_classes_of_a_known_data_set_are_chosen_with_their_labels(tmp_path, layout):
    content = getattr(formats, layout)(tmp_path)
    names = (formats.WNIDS[3], formats.WNIDS[1])
    sources = open_set("imagenet-1k", root=tmp_path, any_count=True, classes=names)
    dest = Store(tmp_path / "out")
    made = make_set(sources, dest, shard_samples=4)
    for part, images in content.items():
        number = {3: 0, 1: 1}
        wanted = {image: number[label] for image, label in images.items() if label in number}
        assert read_back(dest.child(part)) == wanted
        assert made[part].classes == names
        assert sources[part].notes[-1] == "2 of 4 classes"
    keys = set(sources["val"].keys())
    assert set(sources["val"].labels["real"].labels) == keys
    assert {label for found in sources["val"].labels["real"].labels.values() for label in found} <= {0, 1}


def test_classes_of_a_folder_are_chosen(tmp_path):
    for split in ("train", "val"):
        formats.class_folders(tmp_path / "in" / split, ("ant", "bee", "cat"), 2, seed=0, suffix="png")
    sources = open_set(f"{tmp_path}/in", classes=("cat", "ant"))
    for source in sources.values():
        assert source.classes == ("cat", "ant")
        assert {(key.split("/")[0], label) for key, _, _, label in source} == {("cat", 0), ("ant", 1)}
        assert len(source.sizes) == len(source) == 4
    with pytest.raises(ConfigError, match="has no class 'dog'"):
        open_set(f"{tmp_path}/in", classes=("dog",))


def test_class_folders_that_are_not_chosen_may_be_empty(tmp_path):
    for split in ("train", "val"):
        formats.class_folders(tmp_path / split, ("ant", "cat", "dog"), 1, seed=0, suffix="png")
        (tmp_path / split / "bee").mkdir()
    with pytest.raises(ConfigError, match=r"no image: bee.*name the others with --classes"):
        open_set(f"{tmp_path}")
    opened = open_set(f"{tmp_path}", classes=("cat", "ant"))
    assert [sorted(sample[3] for sample in part) for part in opened.values()] == [[0, 1], [0, 1]]
    assert [len(part) for part in open_set(f"{tmp_path}/train", split="val", classes=("dog",)).values()] == [1]


def assert_chosen(every, chosen, numbers, samples):
    """The first samples of the chosen classes are as they were, with their new numbers."""
    wanted = [(*sample[:3], numbers[sample[3]]) for i in range(samples) if (sample := every.sample(i))[3] in numbers]
    assert {sample[3] for sample in wanted} == set(numbers.values())
    assert [chosen.sample(i) for i in range(len(wanted))] == wanted


@pytest.mark.parametrize(("name", "numbers"), [("digits", {7: 0, 0: 1}), ("indl-hering", {1: 0, 0: 1})])
def test_classes_of_a_set_without_files_are_chosen(name, numbers):
    every = open_set(name)
    chosen = open_set(name, classes=[every["val"].classes[number] for number in numbers])
    for split, samples in (("train", 20), ("val", 40 if name == "indl-hering" else len(every["val"]))):
        assert_chosen(every[split], chosen[split], numbers, samples)
    assert (len(chosen["val"]) < len(every["val"])) is (name == "digits")


def test_a_source_whose_classes_only_its_images_tell_is_refused():
    source = DataSource("s", ("a", "b"), [0, 1], lambda entry: (str(entry), b"x", "jpg", entry))
    with pytest.raises(ConfigError, match=r"known only once it is read.*data\.classes in the recipe"):
        choose_from(source, ("a",))


def test_a_class_that_the_entry_does_not_have_is_an_error():
    source = DataSource("s", ("a", "b"), [("k", 0)], lambda entry: (entry[0], b"x", "jpg", 1))
    with pytest.raises(RuntimeError, match="the class of 'k' is 1"):
        choose_from(source, ("a",)).sample(0)


def test_blocks_hold_what_is_left_of_them():
    entries = [(f"k{i}", i % 3) for i in range(9)]
    source = DataSource("s", ("a", "b", "c"), entries, lambda e: (e[0], b"x", "jpg", e[1]), block_samples=(2, 1, 6))
    chosen = choose_from(source, ("b",))
    assert chosen.block_samples == (1, 2)
    assert sorted(sample[0] for sample in chosen) == ["k1", "k4", "k7"]
    assert {label for *_, label in chosen} == {0}
