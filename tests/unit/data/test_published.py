"""Sets of shards as they are published become train and val, without moving a file."""

import json
import shutil

import numpy as np
import pytest

from rsb_cluster.data.cache import ShardCache
from rsb_cluster.data.index import load_index, shards_of
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.published import INFO_NAME, find_parts, index_set, write_info
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.verify import stats, verify
from rsb_cluster.errors import ConfigError, DataError, NewerVersionError
from rsb_cluster.storage.store import Store
from tests.unit.formats import picture
from tests.unit.samples import contents
from tests.unit.tars import read_by_webdataset, tar_of

CLASSES = 4


def members(part: str, count: int, start: int = 0, image: str = "jpg") -> list[tuple[str, bytes]]:
    """Samples as timm writes them: image, class and a JSON about it."""
    found = []
    for i in range(start, start + count):
        content = picture(i + (500 if part != "train" else 0), format="WEBP" if image == "webp" else "JPEG")
        about = json.dumps({"filename": f"n{i % CLASSES:08d}_{i}.JPEG", "label": i % CLASSES, "width": 12})
        key = f"{part}_{i:05d}"
        found += [(f"{key}.cls", b"%d" % (i % CLASSES)), (f"{key}.{image}", content), (f"{key}.json", about.encode())]
    return found


def timm_set(folder, *, name="imagenet1k", train=3, val=2, info=True, image="jpg"):
    """A copy of timm/imagenet-1k-wds in small; shards of four samples, the last of three."""
    store, splits = Store(folder), {}
    for split, shards in (("train", train), ("validation", val)):
        files, lengths = [], []
        for i in range(shards):
            files.append(f"{name}-{split}-{i:0{4 if split == 'train' else 2}d}.tar")
            lengths.append(3 if i == shards - 1 else 4)
            store.write_bytes(files[-1], tar_of(members(split, lengths[-1], 4 * i, image)))
        if shards:
            splits[split] = {"name": split, "num_samples": sum(lengths), "filenames": files, "shard_lengths": lengths}
    store.write_bytes("README.md", b"---\nlicense: other\n---\n")
    store.write_bytes(".gitattributes", b"*.tar filter=lfs\n")
    if info:
        store.write_json(INFO_NAME, {"splits": splits})
    return store


def clip_set(folder):
    """A copy of clip-benchmark/wds_* in small."""
    store = Store(folder)
    for part, shards in (("train", 11), ("test", 2)):
        for i in range(shards):
            store.write_bytes(f"{part}/{i}.tar", tar_of(members(part, 2, 2 * i, "webp")))
        store.write_bytes(f"{part}/nshards.txt", b"%d" % shards)
    store.write_bytes("classnames.txt", b"cat\ndog\nowl\nant")
    store.write_bytes("zeroshot_classification_templates.txt", b"a photo of a {c}.\n")
    return store


@pytest.mark.parametrize(("info", "image"), [(True, "jpg"), (False, "webp")])
def test_train_and_validation_in_one_folder_are_two_parts(anywhere, info, image, tmp_path):
    store = timm_set(anywhere.url, info=info, image=image)
    found = find_parts(store)
    assert found.notes == ()
    made = index_set(found)
    assert {part: (index.num_samples, len(index.shards)) for part, index in made.items()} == {
        "train": (11, 3),
        "val": (7, 2),
    }
    for part, index in made.items():
        folder = store.child(part)
        assert load_index(folder).digest == index.digest
        assert shards_of(folder, load_index(folder)).url == store.url
        assert verify(folder, decode=True).problems == []
        cache = ShardCache(tmp_path / "cache", 1 << 20)
        for reader in (ShardReader(folder, index), ShardReader(folder, index, cache=cache)):
            images = reader.read(range(index.num_samples))
            name = "train" if part == "train" else "validation"
            wanted = [content for file, content in members(name, 11, image=image) if file.endswith(image)]
            assert [bytes(images[i]) for i in range(index.num_samples)] == wanted[: index.num_samples]
    assert stats(store.child("val")).samples == 7
    # As of a bucket that cannot be written to.
    local = Store(tmp_path / "local")
    away = index_set(found, local)
    assert {part: index.digest for part, index in away.items()} == {part: index.digest for part, index in made.items()}
    for part in ("train", "val"):
        assert verify(local.child(part)).problems == []
        read = ShardReader(local.child(part), load_index(local.child(part))).read(np.array([3]))
        assert bytes(read[3]) == bytes(ShardReader(store.child(part), made[part]).read(np.array([3]))[3])


def test_the_digest_is_that_of_an_index_beside_the_shards(tmp_path):
    published = timm_set(tmp_path / "published")
    elsewhere = Store(tmp_path / "elsewhere")
    before = contents(tmp_path / "published")
    away = index_set(find_parts(published), elsewhere)
    assert contents(tmp_path / "published") == before
    for part, word in (("train", "train"), ("val", "validation")):
        beside = Store(tmp_path / f"beside-{part}")
        for name in published.names():
            if word in name:
                beside.write_bytes(name, published.read_bytes(name))
        index = build_index(beside)
        assert index.digest == away[part].digest == load_index(elsewhere.child(part)).digest
        assert index.place == "" and away[part].place == published.url
    assert index_set(find_parts(published), elsewhere)["val"].digest == away["val"].digest
    # One that names its folder from its own moves with the tree; one that was told a folder does not.
    index_set(find_parts(published))
    shutil.move(tmp_path / "published", tmp_path / "moved")
    assert verify(Store(tmp_path / "moved" / "val")).problems == []
    assert [p for p in verify(elsewhere.child("val")).problems if "is missing" in p]


def test_earlier_versions_are_told_that_an_index_is_newer(tmp_path, monkeypatch):
    """They would look for the shards beside it."""
    index_set(find_parts(timm_set(tmp_path)))
    monkeypatch.setattr("rsb_cluster.data.index._PLACED_FORMAT", 99)  # what they do not know
    with pytest.raises(NewerVersionError, match=r"index\.npz was written by a newer version.*format 3"):
        load_index(Store(tmp_path / "val"))


def test_an_earlier_index_of_all_shards_together_is_named(tmp_path):
    store = timm_set(tmp_path)
    assert build_index(store).num_samples == 18
    (note,) = find_parts(store).notes
    assert note == "index.npz in this folder is of all shards as one set, by an earlier version: delete it"


def test_missing_and_unlisted_shards_are_named(tmp_path):
    store = timm_set(tmp_path)
    (tmp_path / "imagenet1k-train-0001.tar").unlink()
    store.write_bytes("extra.tar", tar_of(members("train", 1)))
    with pytest.raises(
        ConfigError, match=r"lists for 'train' 3 shards, of which 1 are missing: imagenet1k-train-0001\.tar.*any-count"
    ):
        find_parts(store)
    found = find_parts(store, any_count=True)
    assert len(found.parts["train"].names) == 2
    assert any("does not list are left out: extra.tar" in note for note in found.notes)
    store.write_bytes("imagenet1k-train-0001.tar", tar_of(members("train", 3, 4)))
    with pytest.raises(DataError, match=r"imagenet1k-train-0001\.tar holds 3 samples, and the list .* says 4"):
        index_set(find_parts(store))
    assert not (tmp_path / "train").joinpath("index.npz").exists()


def test_classes_in_the_json_are_not_taken_without_a_word(tmp_path):
    store = timm_set(tmp_path)
    info = store.read_json(INFO_NAME)
    info["splits"]["train"]["alt_label"] = "label_12k"
    store.write_json(INFO_NAME, info)
    (note,) = find_parts(store).notes
    assert note == "the classes of 'train' are those of .cls; timm would take 'label_12k' of the .json"


def test_without_a_list_gaps_are_named_and_splits_are_told_by_name(tmp_path):
    store = timm_set(tmp_path, train=4, info=False)
    (tmp_path / "imagenet1k-train-0001.tar").unlink()
    assert find_parts(store).notes == ("imagenet1k-train-#.tar: 1 numbers are skipped: 1",)
    store.write_bytes("imagenet1k-test-00.tar", tar_of(members("test", 1)))
    assert "the split 'test' is left out: imagenet1k-test-00.tar" in find_parts(store).notes
    store.write_bytes("odd.tar", tar_of(members("train", 1)))
    with pytest.raises(ConfigError, match=r"whose names tell none: odd\.tar"):
        find_parts(store)


def test_a_folder_of_one_split_is_one_part(tmp_path):
    """imagenet-w21-webp-wds has only train."""
    store = timm_set(tmp_path / "w21", name="imagenet_w21", val=0, image="webp")
    made = index_set(find_parts(store), Store(tmp_path / "set" / "train"))
    assert made[""].num_samples == 11
    assert verify(Store(tmp_path / "set" / "train"), decode=True).problems == []
    mixed = timm_set(tmp_path / "one", val=0, info=False)
    mixed.write_bytes("more.tar", tar_of(members("more", 1)))
    found = find_parts(mixed)
    assert list(found.parts) == [""] and "not all are named alike: more.tar" in found.notes[0]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"splits": {"train": {}}}', b'{"splits": {"train": 3}}'], ids=str)
def test_a_damaged_list_is_named(tmp_path, content):
    store = timm_set(tmp_path)
    store.write_bytes(INFO_NAME, content)
    with pytest.raises(DataError, match=rf"{INFO_NAME} is not timm's list of shards"):
        find_parts(store)


def test_folders_of_clip_benchmark_become_train_and_val(tmp_path):
    store = clip_set(tmp_path / "wds_pets")
    made = index_set(find_parts(store))
    assert (made["train"].num_samples, made["val"].num_samples) == (22, 4)
    assert made["val"].classes == ("cat", "dog", "owl", "ant")
    assert verify(store.child("val"), decode=True).problems == []
    assert sorted(contents(tmp_path / "wds_pets" / "val")) == ["index.npz"]
    (tmp_path / "wds_pets" / "train" / "7.tar").unlink()
    with pytest.raises(ConfigError, match=r"nshards\.txt counts 11 shards, of which 1 are missing: 7\.tar"):
        find_parts(store)
    store.write_bytes("train/7.tar", tar_of(members("train", 2, 14)))
    store.write_bytes("test/2.tar", tar_of(members("test", 2, 14)))
    with pytest.raises(ConfigError, match=r"holds 3 shards, and nshards\.txt counts 2: 2\.tar are of another set"):
        find_parts(store)
    store.write_bytes("testing/0.tar", tar_of(members("test", 2, 14)))
    with pytest.raises(ConfigError, match=r"several folders for 'test': test, testing"):
        find_parts(store)


def test_an_index_goes_into_no_folder_of_other_shards(tmp_path):
    store = timm_set(tmp_path / "a")
    build_index(timm_set(tmp_path / "b" / "train", val=0))
    with pytest.raises(ConfigError, match=r"holds shards of its own.*another folder for the index"):
        index_set(find_parts(store), Store(tmp_path / "b"))


def test_a_new_shard_of_the_same_split_is_found(tmp_path):
    store = timm_set(tmp_path)
    index_set(find_parts(store))
    store.write_bytes("imagenet1k-validation-02.tar", tar_of(members("validation", 1, 90)))
    assert verify(store.child("train")).problems == []
    (problem,) = verify(store.child("val")).problems
    assert problem.startswith("imagenet1k-validation-02.tar is not in the index")


@pytest.mark.parametrize("layout", ["one folder", "split folders"])
def test_timm_reads_the_list_that_is_written(tmp_path, layout):
    from timm.data.readers.reader_wds import _load_info, _parse_split_info

    store = timm_set(tmp_path, info=False) if layout == "one folder" else clip_set(tmp_path)
    made = index_set(find_parts(store))
    write_info(store)
    write_info(store)
    for part, split in (("train", "train"), ("val", "validation")):
        read = _parse_split_info(split, _load_info(str(tmp_path)))
        assert read.num_samples == made[part].num_samples == sum(read.shard_lengths)
        samples = read_by_webdataset(store, read.filenames)
        assert [int(sample["cls"]) for sample in samples] == made[part].labels.tolist()
    store.write_json(INFO_NAME, {"splits": {}})
    with pytest.raises(ConfigError, match=r"exists, with another content"):
        write_info(store)
    elsewhere = Store(tmp_path / "elsewhere")
    index_set(find_parts(store), elsewhere)
    with pytest.raises(ConfigError, match=r"timm reads those below"):
        write_info(elsewhere)


def test_tars_that_are_not_read_are_named(tmp_path):
    store = timm_set(tmp_path / "flat", info=False)
    store.write_bytes("imagenet1k-train-0003.tar.gz", b"x")
    store.write_bytes("imagenet1k-train-0004.TAR", b"x")
    (note,) = find_parts(store).notes
    assert note.endswith("not called *.tar: 2 (imagenet1k-train-0003.tar.gz, imagenet1k-train-0004.TAR)")
    folders = Store(tmp_path / "folders")
    for path in ("train/0.tar", "train/1.tgz", "holdout/0.tar", "notes/a.txt", "val/a.txt"):
        folders.write_bytes(path, tar_of(members("train", 1)))
    assert find_parts(folders).notes == (
        "the folder 'holdout' is left out: its name tells no split",
        "the folder 'val' is left out: it has no *.tar",
        "train: left out, as they are compressed, folders, or not called *.tar: 1 (1.tgz)",
    )


def test_class_names_with_the_line_ends_of_windows_are_the_same(tmp_path):
    store = clip_set(tmp_path)
    store.write_bytes("classnames.txt", b"\xef\xbb\xbfcat\r\ndog\r\nowl\r\nant\r\n")
    assert find_parts(store).classes == ("cat", "dog", "owl", "ant")


def test_the_list_of_a_part_alone_has_its_name(tmp_path):
    for part, name in (("val", "validation"), ("train", "train"), ("mine", "train")):
        store = Store(tmp_path / part)
        store.write_bytes("a.tar", tar_of(members("train", 1)))
        build_index(store)
        write_info(store)
        assert list(store.read_json(INFO_NAME)["splits"]) == [name]
