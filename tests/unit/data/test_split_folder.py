"""What 'shards make' did not make stays as it is."""

import pytest

from rsb_cluster.data.index import INDEX_NAME
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.labels import LabelFile, pack_labels, renew_labels
from rsb_cluster.data.make import make_set, make_shards, plan_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.split_folder import read_source_record
from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.samples import contents, put, some
from tests.unit.tars import pair, tar_of

FOREIGN_RECORD = b'{"url": "https://example.org", "samples": 3}'
THEIRS = {
    "own-0.tar": b"tar",
    "shard-000000.tar": b"tar",
    "index.npz": b"npz",
    "classes.json": b'["mine"]',
    "labels-x.json": b"{}",
    "source.json": FOREIGN_RECORD,
    "README.md": b"text",
}


@pytest.mark.parametrize("name", THEIRS)
def test_nothing_is_written_where_others_have_files(tmp_path, name):
    before = put(tmp_path / "set" / "train", **{name: THEIRS[name]})
    for how in ({}, {"remake": True}):
        with pytest.raises(ConfigError, match=rf"{name}, which were not made by this command.*--overwrite"):
            make_set({"val": some(3), "train": some(3)}, Store(tmp_path / "set"), **how)
    assert contents(tmp_path / "set") == {f"train/{name}": before[name]}


def test_shards_of_others_are_refused_with_the_way_to_train_on_them(tmp_path):
    put(tmp_path, **{f"own-{i}.tar": b"x" for i in range(5)})
    with pytest.raises(
        ConfigError, match=r"own-0\.tar, own-1\.tar, own-2\.tar and 2 more.*shards index " + str(tmp_path)
    ):
        make_shards(some(3), Store(tmp_path))


def test_a_folder_of_other_things_is_no_place_for_a_set(tmp_path):
    before = put(tmp_path, **{"notes.txt": b"x", "music/a.mp3": b"x", "val/theirs.jpg": b"x"})
    with pytest.raises(ConfigError, match=rf"holds music, notes\.txt, val\. .* such as {tmp_path}/NAME"):
        make_set({"train": some(3)}, Store(tmp_path))
    assert contents(tmp_path) == before
    made = make_set({"train": some(3)}, Store(tmp_path / "mine"))
    put(tmp_path / "mine", **{"README.md": b"what I know of it"})
    assert make_set({"train": some(3)}, Store(tmp_path / "mine"))["train"].digest == made["train"].digest
    assert make_set({"val": some(2)}, Store(tmp_path / "mine"))["val"].num_samples == 2


def test_a_val_is_made_beside_a_train_that_others_made_and_that_has_an_index(tmp_path):
    put(tmp_path / "train", **{"own-0.tar": tar_of(pair("a", b"image", 0) + pair("b", b"image", 0))})
    with pytest.raises(ConfigError, match="is not empty: it holds train"):
        make_set({"val": some(3)}, Store(tmp_path))
    build_index(Store(tmp_path / "train"))
    before = contents(tmp_path / "train")
    make_set({"val": some(3)}, Store(tmp_path))
    assert contents(tmp_path / "train") == before


def test_hidden_files_are_no_content_and_stay(tmp_path):
    hidden = {".gitkeep": b"", ".DS_Store": b"x", "train/.nfs0001": b"x", "train/.shard-x.tar.y.tmp/mine": b"x"}
    put(tmp_path, **hidden)
    make_set({"train": some(3)}, Store(tmp_path))
    make_set({"train": some(4)}, Store(tmp_path), remake=True)
    assert hidden.items() <= contents(tmp_path).items()


def test_a_place_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train").write_bytes(b"precious")
    for place in ("file", "link", "set"):
        with pytest.raises(ConfigError, match=rf"{place}(/train)? is not a folder"):
            make_set({"train": some(3)}, Store(tmp_path / place))
    (tmp_path / "link").unlink()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make_set({"train": some(3)}, Store(f"{tmp_path}/link/"))
    assert (tmp_path / "real" / "train" / INDEX_NAME).is_file()


def test_shards_do_not_go_where_the_images_are(tmp_path):
    for part in ("train", "val"):
        formats.class_folders(tmp_path / "in" / part, ("cat", "dog"), 1, seed=0, suffix="jpg")
    before = contents(tmp_path)
    for dest in ("in", "in/train/new", "in/train/cat", "in/train"):
        for how in ({}, {"overwrite": True}):
            with pytest.raises(ConfigError, match=r"from which the images are read|is not empty"):
                make_set(open_set(f"{tmp_path}/in"), Store(tmp_path / dest), **how)
    assert contents(tmp_path) == before
    make_set(open_set(f"{tmp_path}/in"), Store(tmp_path / "in" / "shards"))  # this one is no class
    make_set(open_set(f"{tmp_path}/in"), Store(tmp_path / "in" / "shards"))


def test_overwriting_says_what_goes_and_keeps_all_else(tmp_path):
    store = Store(tmp_path / "train")
    make_shards(some(4), store, shard_samples=2)
    mine = {"README.md": b"text", "notes/a.tar": b"x", "folder.tar/b": b"x", "labels-x.json": b"{}"}
    put(tmp_path / "train", **mine, **{"own-0.tar": b"x", "shard-000007.tar": b"x", "classes.json": b'["edited"]'})
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"classes\.json, own-0\.tar, shard-000007\.tar in .*train\. Add --yes"):
        make_set({"train": some(3)}, Store(tmp_path), overwrite=True)
    plan = plan_set({"train": some(3)}, Store(tmp_path), overwrite=True)
    assert contents(tmp_path) == before
    (removal,) = plan.removals
    assert removal.own == (INDEX_NAME, "shard-000000.tar", "shard-000001.tar")
    assert removal.foreign == ("classes.json", "own-0.tar", "shard-000007.tar")
    plan.make()
    make_shards(some(3), Store(tmp_path / "fresh"))
    assert contents(tmp_path / "train") == contents(tmp_path / "fresh") | mine


def test_overwriting_a_folder_of_others_takes_its_index_and_record_too(tmp_path):
    put(tmp_path, **THEIRS)
    with pytest.raises(ConfigError, match=r"classes\.json, index\.npz, own-0\.tar and 2 more"):
        make_shards(some(3), Store(tmp_path), overwrite=True)
    assert contents(tmp_path) == THEIRS


def test_a_foreign_file_in_a_folder_of_ours_stays_when_it_is_made_anew(tmp_path):
    store = Store(tmp_path)
    make_shards(some(4), store, shard_samples=2)
    mine = {"own-0.tar": b"x", "shard-000002.tar": b"x", "labels-x.json": b"{}"}
    put(tmp_path, **mine)
    make_shards(some(3), store, shard_samples=2, remake=True)
    assert mine.items() <= contents(tmp_path).items()
    with pytest.raises(ConfigError, match=r"shard-000002\.tar is in the way, and was not made by this command"):
        make_shards(some(6), store, shard_samples=2, remake=True)
    assert store.exists(INDEX_NAME)
    (tmp_path / INDEX_NAME).unlink()  # as if killed before its last file
    make_shards(some(3), store, shard_samples=2)
    assert mine.items() <= contents(tmp_path).items()
    (tmp_path / INDEX_NAME).unlink()
    put(tmp_path, **{"classes.json": b'["a", "b", "edited"]'})
    with pytest.raises(ConfigError, match=r"classes\.json is in the way"):
        make_shards(some(3), store, shard_samples=2)


def test_an_index_and_labels_of_others_are_not_replaced(tmp_path):
    put(
        tmp_path,
        **{"own-0.tar": tar_of(pair("a", b"image", 0)), INDEX_NAME: b"npz", "labels-real.json": b'{"mine": 1}'},
    )
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"index\.npz is not an index of shards"):
        build_index(Store(tmp_path))
    ours = LabelFile(about="ReaL: 2020", labels={"a": [1]})
    with pytest.raises(ConfigError, match=r"labels-real\.json was not made by this command"):
        renew_labels(Store(tmp_path), "real", ours)
    assert contents(tmp_path) == before
    (tmp_path / INDEX_NAME).unlink()
    assert build_index(Store(tmp_path)).digest == build_index(Store(tmp_path)).digest
    put(tmp_path, **{"labels-real.json": pack_labels(LabelFile(about="ReaL: 2019", labels={}))})
    renew_labels(Store(tmp_path), "real", ours)
    assert (tmp_path / "labels-real.json").read_bytes() == pack_labels(ours)


@pytest.mark.parametrize(
    "record", [b"{", b"[]", b'"x"', FOREIGN_RECORD, b'{"format": "1", "samples": "many"}', b"\xff"]
)
def test_a_source_json_that_is_not_ours_makes_no_folder_ours(tmp_path, record):
    put(tmp_path, **{"source.json": record, "shard-000000.tar": b"x"})
    assert read_source_record(Store(tmp_path)) == {}
    with pytest.raises(ConfigError, match="were not made by this command"):
        make_shards(some(3), Store(tmp_path), remake=True)
