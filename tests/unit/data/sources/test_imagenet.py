"""ImageNet as it is downloaded, and its second version."""

import pytest

from rsb_cluster.data.index import load_index
from rsb_cluster.data.labels import load_label_sets
from rsb_cluster.data.make import make_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.imagenet import imagenet_synsets
from rsb_cluster.data.verify import stats
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.samples import contents


def test_imagenets_tars_and_folders_give_the_same_shards(tmp_path):
    """Whether the devkit is packed, and whether val is a tar, a flat folder or class folders."""
    made = {}
    for case, how in {"tars": {}, "flat": {"packed_devkit": False, "val_tar": False}, "folders": None}.items():
        root = tmp_path / case
        root.mkdir()
        if how is None:
            formats.imagenet_folders(root)
        else:
            formats.imagenet_tars(root, **how)
        make_set(open_set("imagenet-1k", root=root, any_count=True), Store(tmp_path / f"{case}-out"), shard_samples=5)
        made[case] = {
            name: content for name, content in contents(tmp_path / f"{case}-out").items() if "source.json" not in name
        }
    for case, below in {"kaggle": "", "in it": "ILSVRC", "deep": "ILSVRC/Data/CLS-LOC"}.items():
        formats.imagenet_kaggle(tmp_path / case)
        source = open_set("imagenet-1k", root=tmp_path / case / below, any_count=True)
        make_set(source, Store(tmp_path / f"{case}-out"), shard_samples=5)
        made[case] = {
            name: content for name, content in contents(tmp_path / f"{case}-out").items() if "source.json" not in name
        }
    assert all(shards == made["tars"] for shards in made.values())
    assert len(made["tars"]) == (5 + 2) + (3 + 3)
    index = load_index(Store(tmp_path / "tars-out" / "val"))
    assert index.classes == formats.WNIDS
    # The devkit's own numbers would be 4, 1, 3, 2 here.
    assert {index.key(i)[-1]: int(index.labels[i]) for i in range(12) if int(index.key(i)[-8:]) <= 4} == {
        "1": 3, "2": 2, "3": 1, "4": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("ILSVRC2012_val_00000001,", "it has the row"),
        ("ILSVRC2012_val_00000001,n01440764 1 2 3 4 n01443537 1 2 3 4", "it has the row"),
        ("1,n01440764", "it has the row"),
        ("ILSVRC2012_val_00000099,n01440764 1 2 3 4", r"not one of the 1 images of .*LOC_val_solution\.csv"),
    ],
)
def test_a_table_of_kaggle_that_cannot_be_read_is_named(tmp_path, row, message):
    formats.imagenet_kaggle(tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{row}\n")
    with pytest.raises(ConfigError, match=message):
        open_set("imagenet-1k", root=tmp_path, split="val", any_count=True)


def test_a_cut_tar_and_a_missing_devkit_are_named(tmp_path):
    formats.imagenet_tars(tmp_path)
    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.rename(tmp_path / "elsewhere.tar.gz")
    with pytest.raises(
        ConfigError,
        match=r"neither .*devkit_t12\.tar\.gz nor .*LOC_val_solution\.csv.*Found: .*ILSVRC2012_img_val\.tar",
    ):
        open_set("imagenet-1k", root=tmp_path, split="val", any_count=True)
    train = tmp_path / "ILSVRC2012_img_train.tar"
    content = train.read_bytes()
    for size in (len(content) // 2, 12_000):
        train.write_bytes(content[:size])
        with pytest.raises(ConfigError, match=r"ILSVRC2012_img_train\.tar is not a complete tar.*Download it again"):
            open_set("imagenet-1k", root=tmp_path, split="train", any_count=True)
    train.unlink()
    with pytest.raises(ConfigError, match=r"neither .*ILSVRC2012_img_train\.tar nor .*with a folder per class"):
        open_set("imagenet-1k", root=tmp_path, split="train", any_count=True)


def test_reals_labels_come_with_imagenets_val(tmp_path):
    formats.imagenet_tars(tmp_path)
    store = Store(tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        # Four classes cannot hold labels of a thousand.
        patch.setattr("rsb_cluster.data.labels.timm_info", lambda _: tmp_path / "real.json")
        real = [[i % 4] * (i % 3) for i in range(50_000)]
        (tmp_path / "real.json").write_text(str(real))
        make_set(open_set("imagenet-1k", root=tmp_path, any_count=True), store, shard_samples=5)
    assert not store.exists("train/labels-real.json")
    index = load_index(store.child("val"))
    sets = load_label_sets(store.child("val"), index, "real")
    for i in range(index.num_samples):
        assert sets.of(i).tolist() == real[int(index.key(i)[-8:]) - 1]
    assert sets.scored.sum() == 8
    assert stats(store.child("val")).label_sets == ("real",)


def test_v2_is_numbered_by_number_and_not_as_text(tmp_path):
    wanted = formats.imagenet_v2(tmp_path)["val"]
    source = open_set("imagenet-v2", root=tmp_path, any_count=True)["val"]
    assert source.classes == imagenet_synsets()
    assert len(source.classes) == 1000 and source.classes[:4] == formats.WNIDS
    assert {content: label for _, content, _, label in source} == wanted
    (tmp_path / "imagenetv2-top-images-format-val").mkdir()
    with pytest.raises(
        ConfigError, match=r"2 variants .*top-images-format-val.*timm's results are on matched-frequency"
    ):
        open_set("imagenet-v2", root=tmp_path, any_count=True)
    formats.class_folders(tmp_path / "wnids", formats.WNIDS, 1, seed=0, suffix="JPEG")
    with pytest.raises(ConfigError, match=r"has the folder 'n01440764'; ImageNet-V2's are called 0 to 999"):
        open_set("imagenet-v2", root=tmp_path / "wnids", any_count=True)


def test_a_variant_of_v2_is_not_taken_for_another(tmp_path):
    formats.imagenet_v2(tmp_path)
    formats.imagenet_v2(tmp_path, "top-images")
    opened = open_set("imagenet-v2-top-images", root=tmp_path, any_count=True)["val"]
    assert "top-images" in opened.description
    for root in (tmp_path / "imagenetv2-matched-frequency-format-val", tmp_path / "imagenetv2-top-images-format-val"):
        if "top" in root.name:
            assert len(open_set("imagenet-v2-top-images", root=root, any_count=True)["val"]) == 14
        else:
            with pytest.raises(ConfigError, match=r"is another variant of ImageNet-V2 than top-images"):
                open_set("imagenet-v2-top-images", root=root, any_count=True)


def test_other_images_keep_the_numbers_of_their_classes(tmp_path):
    """A folder of 200 classes, numbered by itself, has nearly all of them wrong (timm's issue 2456)."""
    wanted = formats.FORMATS["imagenet-a"](tmp_path)["val"]
    for root in (tmp_path, tmp_path / "imagenet-a"):
        source = open_set("imagenet-a", root=root, any_count=True)["val"]
        assert {content: label for _, content, _, label in source} == wanted
        assert set(wanted.values()) == {6, 11, 988} and len(source.classes) == 1000
    (tmp_path / "imagenet-a" / "n99999999").mkdir()
    with pytest.raises(ConfigError, match=r"n99999999"):
        open_set("imagenet-a", root=tmp_path, any_count=True)
