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
    assert made["tars"] == made["flat"] == made["folders"]
    assert len(made["tars"]) == (5 + 2) + (3 + 3)
    index = load_index(Store(tmp_path / "tars-out" / "val"))
    assert index.classes == formats.WNIDS
    # The devkit's own numbers would be 4, 1, 3, 2 here.
    assert {index.key(i)[-1]: int(index.labels[i]) for i in range(12) if int(index.key(i)[-8:]) <= 4} == {
        "1": 3, "2": 2, "3": 1, "4": 0,
    }  # fmt: skip


def test_a_cut_tar_and_a_missing_devkit_are_named(tmp_path):
    formats.imagenet_tars(tmp_path)
    devkit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.rename(tmp_path / "elsewhere.tar.gz")
    with pytest.raises(ConfigError, match=r"neither .*devkit_t12\.tar\.gz nor .*Found: .*ILSVRC2012_img_val\.tar"):
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
