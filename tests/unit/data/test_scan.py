"""The index against real tars: what tarfile and webdataset write, and what webdataset reads."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsb_cluster.data.index import INDEX_NAME, ShardIndex, build_index, load_index
from rsb_cluster.data.scan import split_name
from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import Store

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(members, format=tarfile.GNU_FORMAT, **kw):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, **kw) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


def store_of(folder, **shards):
    store = Store(folder)
    for name, content in shards.items():
        store.write_bytes(f"{name}.tar", content)
    return store


def pair(key, image, label):
    return [(f"{key}.jpg", image), (f"{key}.cls", str(label).encode())]


def read_by_webdataset(store, shards):
    """All samples as webdataset yields them, in order. WebDataset itself would leave the files open."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    samples = []
    for name in shards:
        with Path(store.locate(name)).open("rb") as stream:
            samples += group_by_keys(tar_file_expander([{"url": name, "stream": stream}]))
    return samples


def image_slice(store, index, i):
    shard = index.shards[int(index.shard_of(np.array(i)))]
    start = int(index.image_offsets[i])
    return store.read_range(shard, start, start + int(index.image_sizes[i]))


def sample_slice(store, index, i):
    """The sample's own bytes, read as a tar."""
    shard = index.shards[int(index.shard_of(np.array(i)))]
    content = store.read_range(shard, int(index.offsets[i]), int(index.stops[i]))
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar if info.isreg()}


def test_golden_offsets_of_two_small_shards(tmp_path):
    store = store_of(
        tmp_path,
        b=tar_of(pair("x/1", b"A" * 513, 2)),
        a=tar_of(pair("x/1", b"B" * 512, 0) + pair("x/2", b"C", 4)),
    )
    index = build_index(store)
    assert index.shards == ("a.tar", "b.tar")
    assert index.shard_start.tolist() == [0, 2, 3]
    assert index.labels.tolist() == [0, 4, 2]
    assert index.labels.dtype == np.int32
    assert index.offsets.tolist() == [0, 2048, 0]
    assert index.stops.tolist() == [2048, 4096, 2560]
    assert index.image_offsets.tolist() == [512, 2560, 512]
    assert index.image_sizes.tolist() == [512, 1, 513]
    assert [index.key(i) for i in range(3)] == ["x/1", "x/2", "x/1"]
    assert index.num_samples == 3
    assert index.num_classes == 5
    assert index.classes == ()
    assert index.shard_of(np.arange(3)).tolist() == [0, 0, 1]
    for name, size, sha256 in zip(index.shards, index.shard_bytes, index.shard_sha256, strict=True):
        content = (tmp_path / name).read_bytes()
        assert len(content) == size
        assert hashlib.sha256(content).hexdigest() == sha256


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("length", [20, 99, 150, 240])
def test_offsets_start_at_the_header_of_a_long_name(tmp_path, format, length):
    keys = [f"folder{i}/".ljust(length - 5, "k") if format != "ustar" else f"{'d' * 90}{i}/k" for i in range(3)]
    images = [bytes([i]) * (700 * i + 1) for i in range(3)]
    members = [member for i in range(3) for member in pair(keys[i], images[i], i)]
    store = store_of(tmp_path, s=tar_of(members, FORMATS[format]))
    index = build_index(store)
    assert [index.key(i) for i in range(3)] == keys
    assert index.offsets[0] == 0
    assert index.offsets[1:].tolist() == index.stops[:-1].tolist()
    for i in range(3):
        assert image_slice(store, index, i) == images[i]
        assert sample_slice(store, index, i) == {f"{keys[i]}.jpg": images[i], f"{keys[i]}.cls": str(i).encode()}


def test_pax_headers_of_a_whole_archive_and_odd_member_types_are_read_past(tmp_path):
    content = tar_of(
        [
            ("folder", None),
            *pair("folder/é ü", b"1", 1),
            ("__meta__/x.jpg", b"no"),
            ("README", b"no"),
            *pair("b", b"2", 0),
        ],
        tarfile.PAX_FORMAT,
        pax_headers={"comment": "a commit id"},
    )
    store = store_of(tmp_path, s=content)
    index = build_index(store)
    assert [index.key(i) for i in range(2)] == ["folder/é ü", "b"]
    assert sample_slice(store, index, 0) == {"folder/é ü.jpg": b"1", "folder/é ü.cls": b"1"}
    assert [image_slice(store, index, i) for i in range(2)] == [b"1", b"2"]
    assert [sample["__key__"] for sample in read_by_webdataset(store, index.shards)] == ["folder/é ü", "b"]


def test_a_key_that_is_not_utf8_keeps_its_bytes(tmp_path):
    members = [(name.encode("latin-1").decode("utf-8", "surrogateescape"), data) for name, data in pair("é", b"1", 0)]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    store = store_of(tmp_path, s=buffer.getvalue())
    assert build_index(store).key(0) == read_by_webdataset(store, ["s.tar"])[0]["__key__"] == "\udce9"


@given(st.one_of(st.text(), st.text("ab._/\n", max_size=12)))
@settings(max_examples=500)
def test_names_are_split_as_webdataset_splits_them(name):
    import re

    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    meta = re.match(r"__[^/]*__($|/)", name) or ("/" not in name and name.startswith("__") and name.endswith("__"))
    assert split_name(name) == (None if key is None or meta else (key, extension.lower()))


SAMPLE = st.fixed_dictionaries(
    {
        "image": st.tuples(st.sampled_from(["jpg", "JPEG", "png", "WebP"]), st.binary(min_size=1, max_size=1600)),
        "label": st.integers(0, 1000),
        "as_json": st.booleans(),
        "extra": st.lists(st.sampled_from(["txt", "seg.png", "a.b.c"]), unique=True),
        "directory": st.sampled_from(["", "d/", "d.v1/", "./", "x" * 120 + "/"]),
        "junk": st.sampled_from([None, "README", "__shard__", "__m__/a.jpg", "d/"]),
    }
)


@given(st.lists(SAMPLE, min_size=1, max_size=6), st.sampled_from(["gnu", "pax"]), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_any_tar_is_indexed_as_webdataset_reads_it(tmp_path_factory, samples, format, random):
    members = []
    for i, sample in enumerate(samples):
        extension, image = sample["image"]
        label = sample["label"]
        own = [
            (extension, image),
            ("json", json.dumps({"cls": label}).encode()) if sample["as_json"] else ("cls", b"%d\n" % label),
        ]
        own += [(extra, b"x" * 600) for extra in sample["extra"]]
        random.shuffle(own)
        own = [(f"{sample['directory']}{i:03d}.{ext}", content) for ext, content in own]
        if sample["junk"]:
            own.insert(
                random.randrange(len(own) + 1), (sample["junk"], None if sample["junk"].endswith("/") else b"junk")
            )
        members += own
    store = store_of(tmp_path_factory.mktemp("any"), s=tar_of(members, FORMATS[format]))
    index = build_index(store)
    read = read_by_webdataset(store, index.shards)
    assert [index.key(i) for i in range(index.num_samples)] == [sample["__key__"] for sample in read]
    assert index.labels.tolist() == [sample["label"] for sample in samples]
    for i, sample in enumerate(samples):
        assert image_slice(store, index, i) == sample["image"][1] == read[i][sample["image"][0].lower()]
        inside = sample_slice(store, index, i)
        for name, content in inside.items():
            key_and_extension = split_name(name)
            if key_and_extension:
                assert read[i][key_and_extension[1]] == content
        assert len([name for name in inside if split_name(name)]) == 2 + len(sample["extra"])


def test_a_set_from_webdatasets_own_writer_is_indexed(tmp_path):
    import webdataset

    images = [bytes([i]) * (i * 37 + 1) for i in range(25)]
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=10, verbose=0) as writer:
        for i, image in enumerate(images):
            writer.write({"__key__": f"train/{i:04d}", "jpg": image, "cls": i % 7, "json": {"label": 99}})
    store = Store(tmp_path)
    index = build_index(store)
    assert index.shard_start.tolist() == [0, 10, 20, 25]
    assert index.labels.tolist() == [i % 7 for i in range(25)]
    assert [image_slice(store, index, i) for i in range(25)] == images
    assert index.key(24) == "train/0024"


def test_the_first_image_is_taken_and_cls_goes_before_json(tmp_path):
    members = [("a.json", b'{"label": 1}'), ("a.PNG", b"first"), ("a.jpg", b"second"), ("a.cls", b" 3\n")]
    members += [("b.jpg", b"b"), ("b.json", b'{"label": "cat", "cls": true, "class": 2}')]
    store = store_of(tmp_path, s=tar_of(members))
    index = build_index(store)
    assert index.labels.tolist() == [3, 2]
    assert image_slice(store, index, 0) == b"first"


def test_class_names_come_from_the_argument_or_the_folder(tmp_path):
    store = store_of(tmp_path, s=tar_of(pair("a", b"a", 1)))
    store.write_json("classes.json", ["cat", "dog", "ü"])
    index = build_index(store)
    assert index.classes == ("cat", "dog", "ü")
    assert index.num_classes == 3
    assert load_index(store).classes == index.classes
    named = build_index(store, classes=["only"])
    assert named.classes == ("only",)
    assert named.num_classes == 2
    store.write_json("classes.json", {"0": "cat"})
    with pytest.raises(DataError, match=r"classes\.json is not a list"):
        build_index(store)


def equal(one: ShardIndex, other: ShardIndex):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ShardIndex.__dataclass_fields__)


def test_the_index_is_loaded_as_it_was_built_and_cannot_be_changed(tmp_path):
    store = store_of(tmp_path, a=tar_of(pair("a", b"a", 1) + pair("b", b"b", 0)), b=tar_of(pair("c", b"c", 2)))
    built, loaded = build_index(store), load_index(store)
    assert equal(built, loaded)
    assert loaded.digest == hashlib.sha256((tmp_path / INDEX_NAME).read_bytes()).hexdigest()
    for array in (loaded.labels, loaded.offsets, loaded.image_sizes, loaded.shard_start):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_the_same_shards_give_the_same_index_file(tmp_path):
    content = tar_of(pair("a", b"a", 1))
    first, second = store_of(tmp_path / "1", s=content), store_of(tmp_path / "2", s=content)
    assert build_index(first).digest == build_index(second).digest
    assert first.read_bytes(INDEX_NAME) == second.read_bytes(INDEX_NAME)
    with zipfile.ZipFile(tmp_path / "1" / INDEX_NAME) as file:
        # A zip entry's time has steps of two seconds: comparing two files made at once would not show it.
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
    # The digest is in the name of every run, so the file's format must not change unnoticed.
    assert first.read_bytes(INDEX_NAME).count(b"PK\x03\x04") == 10


def test_several_processes_give_the_same_index_and_report_progress(tmp_path):
    store = store_of(tmp_path, **{f"s{i}": tar_of(pair(f"k{i}", b"x" * i + b"y", i)) for i in range(5)})
    alone, steps = build_index(store), []
    together = build_index(store, workers=2, progress=lambda done, total: steps.append((done, total)))
    assert equal(alone, together)
    assert steps == [(i, 5) for i in range(1, 6)]
    store.write_bytes("s3.tar", b"junk" * 500)
    with pytest.raises(DataError, match=r"s3\.tar is not a whole tar"):
        build_index(store, workers=2)


GOOD = pair("good", b"g" * 1500, 0)
CLASSLESS = [*GOOD, ("bad.jpg", b"x")]
BROKEN = {
    "no image": ([*GOOD, ("bad.cls", b"1")], r"'bad' has no image \(it has: cls\)"),
    "only a mask": ([*GOOD, ("bad.seg.png", b"1"), ("bad.cls", b"1")], "'bad' has no image"),
    "empty image": ([*GOOD, *pair("bad", b"", 1)], "'bad' has an empty image"),
    "no class": (CLASSLESS, "'bad' has no class: neither"),
    "a class in words": ([*CLASSLESS, ("bad.cls", b"cat")], "'bad': its .cls holds b'cat'"),
    "an underscored class": ([*CLASSLESS, ("bad.cls", b"1_0")], "'bad': its .cls holds b'1_0'"),
    "a negative class": ([*CLASSLESS, ("bad.cls", b"-1")], "'bad' has the class -1"),
    "a class too large": ([*CLASSLESS, ("bad.cls", b"2147483648")], "'bad' has the class 2147483648"),
    "json without class": ([*CLASSLESS, ("bad.json", b'{"label": true}')], "'bad' has no class: its .json"),
    "json that is a list": ([*CLASSLESS, ("bad.json", b"[1]")], "'bad' has no class: its .json"),
    "broken json": ([*CLASSLESS, ("bad.json", b"{")], "'bad': its .json cannot be read"),
    "the key again": ([*pair("bad", b"x", 0), *GOOD, *pair("bad", b"x", 0)], "the key 'bad' comes twice"),
    "members apart": ([("bad.jpg", b"x"), *GOOD, ("bad.cls", b"0")], "the key 'bad' comes twice"),
    "the extension again": ([*GOOD, *pair("bad", b"x", 0), ("bad.JPG", b"x")], "'bad' has two members with .* 'jpg'"),
    "nothing but a folder": ([("folder", None)], "holds no samples"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_shard_that_breaks_a_rule_is_refused_by_name_and_key(tmp_path, case):
    members, message = BROKEN[case]
    store = store_of(tmp_path, a=tar_of(GOOD), s=tar_of(members))
    with pytest.raises(DataError, match=rf"{tmp_path}/s\.tar.*{message}"):
        build_index(store)
    assert not store.exists(INDEX_NAME)


def test_a_link_instead_of_an_image_is_refused(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in GOOD:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("bad.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "good.jpg"
        tar.addfile(link)
        info = tarfile.TarInfo("bad.cls")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"1"))
    with pytest.raises(DataError, match="'bad' has no image"):
        build_index(store_of(tmp_path, s=buffer.getvalue()))


def test_a_sparse_image_is_refused(tmp_path):
    import subprocess

    (tmp_path / "a.cls").write_bytes(b"1")
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(0, 2)
        file.write(b"end")
    (tmp_path / "set").mkdir()
    subprocess.run(["tar", "--sparse", "-cf", "set/s.tar", "a.jpg", "a.cls"], cwd=tmp_path, check=True)
    with pytest.raises(DataError, match=r"'a': 'a\.jpg' is stored sparse"):
        build_index(Store(tmp_path / "set"))


WHOLE = tar_of(pair("a", b"A" * 1200, 0) + pair("b", b"B" * 1200, 1))
CONTENT_STOP = 2 * (512 + 1536 + 512 + 512)


@pytest.mark.parametrize(
    "stop", [0, 1, 511, 512, 513, 1000, 2048, 2049, 2560, 3071, 3072, 4000, CONTENT_STOP - 512, CONTENT_STOP]
)
def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path, stop):
    store = store_of(tmp_path, s=WHOLE[:stop])
    with pytest.raises(DataError, match=r"s\.tar is not a whole tar.*(after the sample 'a'|at its start)"):
        build_index(store)


def test_a_tar_with_one_block_of_zeros_at_its_end_is_whole(tmp_path):
    assert build_index(store_of(tmp_path, s=WHOLE[: CONTENT_STOP + 512])).num_samples == 2


@given(st.integers(0, CONTENT_STOP - 1), st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_a_changed_byte_is_refused_or_shows_in_the_hash_but_never_crashes(tmp_path_factory, position, change):
    content = bytearray(WHOLE)
    content[position] ^= change
    store = store_of(tmp_path_factory.mktemp("flip"), s=bytes(content))
    try:
        index = build_index(store)
    except DataError as error:
        assert "s.tar" in str(error)
    else:
        assert index.shard_sha256[0] == hashlib.sha256(content).hexdigest()
        in_header = any(start <= position < start + 512 for start in (0, 2048, 3072, 5120))
        assert not in_header  # a header has a checksum


@pytest.mark.parametrize("behind", [WHOLE, b"x"])
def test_what_stands_behind_the_end_mark_is_refused(tmp_path, behind):
    with pytest.raises(DataError, match="something behind the end mark"):
        build_index(store_of(tmp_path, s=WHOLE + behind))


@pytest.mark.parametrize("packer", ["gzip", "bz2", "lzma"])
def test_a_compressed_tar_is_refused(tmp_path, packer):
    with pytest.raises(DataError, match=r"s\.tar is compressed"):
        build_index(store_of(tmp_path, s=__import__(packer).compress(WHOLE)))


def test_a_folder_without_shards_is_refused_with_a_hint(tmp_path):
    store = Store(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no \*\.tar files in .*nowhere.*shards make"):
        build_index(store)
    store.write_bytes("a.tar.gz", b"")
    with pytest.raises(DataError, match=r"Unpack a\.tar\.gz"):
        build_index(store)


def test_a_missing_index_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match=rf"no index.*rsb-cluster shards index {tmp_path}"):
        load_index(Store(tmp_path))
    build_index(store_of(tmp_path / "train", s=WHOLE))
    with pytest.raises(DataError, match=rf"did you mean {tmp_path}/train\?"):
        load_index(Store(tmp_path))


def test_an_index_damaged_anywhere_is_refused_or_unchanged(tmp_path):
    store = store_of(tmp_path, s=WHOLE)
    before = build_index(store)
    content = store.read_bytes(INDEX_NAME)
    refused = 0
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 0x41
        store.write_bytes(INDEX_NAME, damaged)
        try:
            after = load_index(store)
        except DataError as error:
            refused += 1
            assert "index.npz is damaged" in str(error)
        else:  # a byte that has no meaning, as in a zip entry's date; the digest still differs
            assert after.digest != before.digest
            assert all(
                np.array_equal(getattr(before, name), getattr(after, name))
                for name in ShardIndex.__dataclass_fields__
                if name != "digest"
            )
    assert refused > len(content) / 5 / 2
    for stop in (0, 10, len(content) // 2, len(content) - 1):
        store.write_bytes(INDEX_NAME, content[:stop])
        with pytest.raises(DataError, match=r"index\.npz is damaged"):
            load_index(store)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offsets", [1, 3072]),
        ("offsets", [0]),
        ("stops", [3072, 1 << 40]),
        ("image_sizes", [0, 1]),
        ("image_offsets", [0, 3584]),
        ("labels", [0, 7]),
        ("labels", [0, -1]),
        ("shard_start", [0, 1]),
        ("key_starts", [0, 2, 1]),
        ("shard_bytes", [1, 2]),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(tmp_path, name, value):
    store = store_of(tmp_path, s=WHOLE)
    build_index(store)
    with np.load(tmp_path / INDEX_NAME) as file:
        arrays = {key: file[key] for key in file.files}
    arrays[name] = np.array(value, dtype=arrays[name].dtype)
    np.savez(tmp_path / INDEX_NAME, **arrays)
    with pytest.raises(DataError, match=r"index\.npz is damaged"):
        load_index(store)


@pytest.mark.parametrize(
    "change",
    [{"shards": ["../s.tar"]}, {"shards": ["/etc/s.tar"]}, {"sha256": ["../../" + "0" * 64]}, {"sha256": ["0" * 63]}],
    ids=str,
)
def test_an_index_whose_names_leave_the_folder_is_refused(tmp_path, change):
    """The checksum is the name of the shard's copy in a node's cache."""
    store = store_of(tmp_path, s=WHOLE)
    build_index(store)
    with np.load(tmp_path / INDEX_NAME) as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(arrays["meta"].tobytes()) | change
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    np.savez(tmp_path / INDEX_NAME, **arrays)
    with pytest.raises(DataError, match=r"index\.npz is damaged: it names a shard that is in another folder"):
        load_index(store)


def test_a_pickle_in_the_index_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    np.savez(tmp_path / INDEX_NAME, meta=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError, match=r"index\.npz is damaged.*allow_pickle"):
        load_index(Store(tmp_path))


def test_an_index_of_imagenets_size_loads_in_a_second(tmp_path):
    from rsb_cluster.data.index import _pack
    from rsb_cluster.data.scan import ShardScan

    n, per_shard = 1_281_167, 10_000
    scans = []
    for start in range(0, n, per_shard):
        count = min(per_shard, n - start)
        at = np.arange(count, dtype=np.int64) * 120_320
        spans = np.stack([at, at + 120_320, at + 512, np.full(count, 110_000)], axis=1)
        keys = tuple(b"n%08d/n%08d_%05d" % (i % 1000, i % 1000, i) for i in range(start, start + count))
        scans.append(
            ShardScan(count * 120_320 + 1024, "0" * 64, keys, (np.arange(count) % 1000).astype(np.int32), spans)
        )
    content = _pack([f"{i:06d}.tar" for i in range(len(scans))], scans, ())
    (tmp_path / INDEX_NAME).write_bytes(content)
    assert len(content) < 100e6
    index = load_index(Store(tmp_path))
    assert index.num_samples == n
    assert index.key(n - 1) == "n00000166/n00000166_1281166"
