"""What 'shards make' did not make stays as it is, and what it made from other images is not taken for theirs."""

import io
import json
import re
import shutil
import tarfile

import pytest

from rsb_cluster.data.index import INDEX_NAME, build_index
from rsb_cluster.data.labels import LabelFile, pack_labels, renew_labels
from rsb_cluster.data.make import make_set, make_shards, plan_set
from rsb_cluster.data.part import source_of
from rsb_cluster.data.recode import Recode
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.folder import image_folder
from rsb_cluster.errors import ConfigError, DataError, StorageError
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.data.test_make import contents, given, some

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


def tar_of(*names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            for member, content in ((f"{name}.cls", b"0"), (f"{name}.jpg", b"image")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def put(folder, **files):
    for name, content in files.items():
        formats.write(folder / name, content)
    return contents(folder)


# --- what others made -----------------------------------------------------------------------------------------------


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
    put(tmp_path / "train", **{"own-0.tar": tar_of("a", "b")})
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
        with pytest.raises(ConfigError, match=rf"{place}(/train)? is no folder"):
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
    (going,) = plan.going
    assert going.own == (INDEX_NAME, "shard-000000.tar", "shard-000001.tar")
    assert going.foreign == ("classes.json", "own-0.tar", "shard-000007.tar")
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


def test_an_interrupted_remake_is_gone_on_with_and_keeps_no_old_shard(tmp_path, monkeypatch):
    formats.class_folders(tmp_path / "in", ("cat", "dog"), 4, seed=0, suffix="png")
    store = Store(tmp_path / "out")
    make_shards(image_folder(tmp_path / "in"), store, shard_samples=2)
    file = tmp_path / "in" / "cat" / "cat_0.png"
    file.write_bytes(file.read_bytes()[:-1] + b"x")  # of the same size, so no record tells
    delete = Store.delete_file

    def killed(self, path):
        if path == "shard-000001.tar":
            raise StorageError("killed")
        delete(self, path)

    monkeypatch.setattr(Store, "delete_file", killed)
    with pytest.raises(StorageError):
        make_shards(image_folder(tmp_path / "in"), store, shard_samples=2, remake=True)
    monkeypatch.undo()
    assert not store.exists(INDEX_NAME) and store.exists("shard-000001.tar")
    make_shards(image_folder(tmp_path / "in"), store, shard_samples=2)
    make_shards(image_folder(tmp_path / "in"), Store(tmp_path / "fresh"), shard_samples=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_an_index_and_labels_of_others_are_not_replaced(tmp_path):
    put(tmp_path, **{"own-0.tar": tar_of("a"), INDEX_NAME: b"npz", "labels-real.json": b'{"mine": 1}'})
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"index\.npz is no index of shards"):
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


# --- what was made from other images --------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path):
    """A folder of two classes, from which shards were made into ``out``."""
    formats.class_folders(tmp_path / "in", ("cat", "dog"), 3, seed=0, suffix="png")
    make_shards(image_folder(tmp_path / "in"), Store(tmp_path / "out"), shard_samples=4)
    return tmp_path / "in"


def make(images, **how):
    how.setdefault("shard_samples", 4)
    return make_shards(image_folder(images), Store(images.parent / "out"), **how)


def larger(images):
    file = images / "cat" / "cat_0.png"
    file.write_bytes(file.read_bytes() + b"more")


def added(images):
    formats.write(images / "dog" / "new.png", formats.picture(7, format="PNG"))


def removed(images):
    (images / "cat" / "cat_1.png").unlink()


def renamed(images):
    (images / "cat" / "cat_1.png").rename(images / "dog" / "moved.png")


def as_the_first_version_wrote_it(folder):
    record = json.loads((folder / "source.json").read_text())
    for later in ("beside", "sizes_sha256", "packed", "shards"):
        record.pop(later, None)
    (folder / "source.json").write_text(json.dumps(record, indent=2) + "\n")


CHANGES = {
    larger: [r"images with another size: cat/cat_0\.png \(\d+ bytes, were \d+\)"],
    added: ["images that are new: dog/new.png"],
    removed: ["images that are gone: cat/cat_1"],
    renamed: ["images that are new: dog/moved.png", "images that are gone: cat/cat_1"],
}


@pytest.mark.parametrize("record", ["ours", "old"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_images_is_named_and_made_only_where_asked_for(images, change, record):
    if record == "old":
        as_the_first_version_wrote_it(images.parent / "out")
    make(images)
    before = contents(images.parent / "out")
    change(images)
    with pytest.raises(ConfigError) as refused:
        make(images)
    for words in CHANGES[change]:
        assert re.search(words, str(refused.value)), str(refused.value)
    assert "--remake" in str(refused.value)
    assert contents(images.parent / "out") == before
    make(images, remake=True)
    make_shards(image_folder(images), Store(images.parent / "fresh"), shard_samples=4)
    assert contents(images.parent / "out") == contents(images.parent / "fresh")
    make(images)


# With smaller images an old record tells nothing.
@pytest.mark.parametrize(("recode", "record"), [(None, "ours"), (None, "old"), (Recode(8), "ours")])
def test_shards_kept_from_a_killed_make_are_of_the_images_that_are_there(images, recode, record):
    make(images, recode=recode, remake=True)
    (images.parent / "out" / INDEX_NAME).unlink()
    if record == "old":
        as_the_first_version_wrote_it(images.parent / "out")
    before = contents(images.parent / "out")
    larger(images)
    named = "the sizes of images" if recode else r"another size: cat/cat_0\.png"
    with pytest.raises(ConfigError, match=rf"made otherwise: .*{named}.*--remake"):
        make(images, recode=recode)
    assert contents(images.parent / "out") == before


def test_a_copy_of_the_images_is_no_change(images):
    """Their times are others, and so may be the folder's."""
    made = make(images)
    copied = images.parent / "copied"
    for file in images.rglob("*.png"):
        formats.write(copied / file.relative_to(images), file.read_bytes())
    shutil.rmtree(images)
    assert make(copied).digest == made.digest


@pytest.mark.parametrize("workers", [1, 2])
def test_contents_are_compared_where_that_is_asked_for(images, workers):
    make(images, by_bytes=True, workers=workers)
    file = images / "cat" / "cat_0.png"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    make(images)  # sizes do not tell
    for killed in (False, True):
        if killed:
            (images.parent / "out" / INDEX_NAME).unlink()
        with pytest.raises(ConfigError, match=r"images with other content: cat/cat_0\.png .*--remake"):
            make(images, by_bytes=True, workers=workers)
    make(images, remake=True)
    make(images, by_bytes=True, workers=workers)
    (images.parent / "out" / "shard-000001.tar").unlink()
    for by_bytes in (False, True):
        with pytest.raises(ConfigError, match=r"shards that are missing: shard-000001\.tar"):
            make(images, by_bytes=by_bytes)


def test_smaller_images_are_compared_by_the_sizes_that_they_had(images):
    make(images, recode=Recode(8), remake=True)
    make(images, recode=Recode(8))
    larger(images)
    with pytest.raises(ConfigError, match=r"the sizes of images, of which the shards .* do not say more"):
        make(images, recode=Recode(8))


def test_a_parquet_file_of_another_size_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(seed):
        images = [{"bytes": formats.picture(seed + i), "path": None} for i in range(4)]
        pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1]}), tmp_path / "in" / "train.parquet")
        return open_set(f"{tmp_path}/in")

    (tmp_path / "in").mkdir()
    make_set(write(0), Store(tmp_path / "out"))
    make_set(write(0), Store(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"files with another size: train\.parquet \([\d,]+ bytes, were [\d,]+\)"):
        make_set(write(100), Store(tmp_path / "out"))


def test_label_sets_that_would_be_others_are_a_change(tmp_path):
    def labelled(*right):
        return given(list(some(2)), labels={"mine": LabelFile(about="test", labels={k: right for k, *_ in some(2)})})

    make_shards(labelled(1), Store(tmp_path))
    make_shards(labelled(1), Store(tmp_path))
    with pytest.raises(ConfigError, match=r"what belongs into labels-mine\.json"):
        make_shards(labelled(2), Store(tmp_path))
    make_shards(labelled(2), Store(tmp_path), remake=True)
    assert b"[2]" in (tmp_path / "labels-mine.json").read_bytes()


@pytest.mark.parametrize(
    "record", [b"{", b"[]", b'"x"', FOREIGN_RECORD, b'{"format": "1", "samples": "many"}', b"\xff"]
)
def test_a_source_json_that_is_not_ours_makes_no_folder_ours(tmp_path, record):
    put(tmp_path, **{"source.json": record, "shard-000000.tar": b"x"})
    assert source_of(Store(tmp_path)) == {}
    with pytest.raises(ConfigError, match="were not made by this command"):
        make_shards(some(3), Store(tmp_path), remake=True)


def test_an_image_that_is_a_link_to_nothing_is_named_before_anything_is_written(tmp_path):
    formats.class_folders(tmp_path / "in", ("cat",), 2, seed=0, suffix="png")
    (tmp_path / "in" / "cat" / "gone.png").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"cannot read the image .*gone\.png: No such file"):
        image_folder(tmp_path / "in")


def test_a_damaged_index_of_ours_is_made_anew_where_asked_for(images):
    (images.parent / "out" / INDEX_NAME).write_bytes(b"lost by the disk")
    with pytest.raises(DataError, match="is damaged"):
        make(images)
    assert make(images, remake=True).num_samples == 6
