"""What was made from other images is not taken for theirs, and is made anew only where that is asked for."""

import json
import re
import shutil

import pytest

from rsb_cluster.data.index import INDEX_NAME
from rsb_cluster.data.labels import LabelFile
from rsb_cluster.data.make import make_set, make_shards
from rsb_cluster.data.recode import Recode
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.folder import image_folder
from rsb_cluster.errors import ConfigError, DataError, StorageError
from rsb_cluster.storage.store import Store
from tests.unit import formats
from tests.unit.samples import contents, some, source_with


def test_shards_are_limited_in_bytes_and_hold_one_sample_at_least(tmp_path, monkeypatch):
    monkeypatch.setattr("rsb_cluster.data.split_plan._SHARD_BYTES", 3 * 1000)
    assert make_shards(some(6, size=900), Store(tmp_path)).shard_start.tolist() == [0, 3, 6]
    monkeypatch.setattr("rsb_cluster.data.split_plan._SHARD_BYTES", 1)
    assert make_shards(some(3), Store(tmp_path / "small")).shard_start.tolist() == [0, 1, 2, 3]


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
    with pytest.raises(ConfigError, match=rf"made from other images or settings: .*{named}.*--remake"):
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
    with pytest.raises(ConfigError, match=r"the sizes of images changed, and the existing shards do not tell how"):
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
        return source_with(
            list(some(2)), labels={"mine": LabelFile(about="test", labels={k: right for k, *_ in some(2)})}
        )

    make_shards(labelled(1), Store(tmp_path))
    make_shards(labelled(1), Store(tmp_path))
    with pytest.raises(ConfigError, match=r"the content of labels-mine\.json"):
        make_shards(labelled(2), Store(tmp_path))
    make_shards(labelled(2), Store(tmp_path), remake=True)
    assert b"[2]" in (tmp_path / "labels-mine.json").read_bytes()


def test_a_damaged_index_of_ours_is_made_anew_where_asked_for(images):
    (images.parent / "out" / INDEX_NAME).write_bytes(b"lost by the disk")
    with pytest.raises(DataError, match="is damaged"):
        make(images)
    assert make(images, remake=True).num_samples == 6


def test_a_complete_set_with_a_cut_shard_is_not_called_complete(images):
    shard = images.parent / "out" / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ConfigError, match=r"shards that have another size since: shard-000001\.tar.*--remake"):
        make(images)
    make(images, remake=True)
    make(images)
