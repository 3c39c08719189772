"""Real tars, as tarfile and webdataset write them, are scanned as webdataset reads them; a broken one is refused."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsb_cluster.data.index import INDEX_NAME
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.reader import ShardReader
from rsb_cluster.data.scan import split_name
from rsb_cluster.errors import DataError
from rsb_cluster.storage.store import Store
from tests.unit.tars import FORMATS, WHOLE, image_slice, pair, read_by_webdataset, sample_slice, store_of, tar_of


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


def test_the_image_is_the_one_with_a_plain_extension_and_cls_goes_before_json(tmp_path):
    members = [("a.json", b'{"label": 1}'), ("a.PNG", b"first"), ("a.mask.jpg", b"second"), ("a.cls", b" 3\n")]
    members += [("b.jpg", b"b"), ("b.json", b'{"label": "cat", "cls": true, "class": 2}')]
    store = store_of(tmp_path, s=tar_of(members))
    index = build_index(store)
    assert index.labels.tolist() == [3, 2]
    assert image_slice(store, index, 0) == b"first"


GOOD = pair("good", b"g" * 1500, 0)
CLASSLESS = [*GOOD, ("bad.jpg", b"x")]
BROKEN = {
    "no image": ([*GOOD, ("bad.cls", b"1")], r"'bad' has no image \(it has: cls\)"),
    "only a mask": ([*GOOD, ("bad.seg.png", b"1"), ("bad.cls", b"1")], "'bad' has no image"),
    "empty image": ([*GOOD, *pair("bad", b"", 1)], "'bad' has an empty image"),
    "no class": (CLASSLESS, "'bad' has no class: it has neither"),
    "a class in words": ([*CLASSLESS, ("bad.cls", b"cat")], "'bad': its .cls holds b'cat'"),
    "an underscored class": ([*CLASSLESS, ("bad.cls", b"1_0")], "'bad': its .cls holds b'1_0'"),
    "a negative class": ([*CLASSLESS, ("bad.cls", b"-1")], "'bad' has the class -1"),
    "a class too large": ([*CLASSLESS, ("bad.cls", b"2147483648")], "'bad' has the class 2147483648"),
    "json without class": ([*CLASSLESS, ("bad.json", b'{"label": true}')], "'bad' has no class: its .json"),
    "json that is a list": ([*CLASSLESS, ("bad.json", b"[1]")], "'bad' has no class: its .json"),
    "broken json": ([*CLASSLESS, ("bad.json", b"{")], "'bad': its .json cannot be read"),
    "a class that no network has": ([*CLASSLESS, ("bad.cls", b"1500000000")], "'bad' has the class 1500000000"),
    "dots in a key": (
        [*GOOD, ("bad.1.jpg", b"x"), ("bad.1.cls", b"1")],
        r"\(it has: 1\.cls, 1\.jpg\)\. .*first dot after",
    ),
    "a compound image": (
        [*GOOD, ("bad.input.jpg", b"x"), ("bad.cls", b"1")],
        r"If 'input.jpg' is the image, add --image-key input\.jpg",
    ),
    "two images": (
        [*GOOD, ("bad.png", b"1"), ("bad.webp", b"2"), ("bad.cls", b"1")],
        r"2 images: png, webp.*--image-key",
    ),
    "the key again": ([*pair("bad", b"x", 0), *GOOD, *pair("bad", b"x", 0)], "the key 'bad' occurs twice"),
    "members apart": ([("bad.jpg", b"x"), *GOOD, ("bad.cls", b"0")], "the key 'bad' occurs twice"),
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


@pytest.mark.parametrize(("kind", "word"), [(tarfile.LNKTYPE, "hard"), (tarfile.SYMTYPE, "symbolic")])
@pytest.mark.parametrize("name", ["bad.jpg", "bad.cls"])
def test_a_link_in_a_sample_is_refused_by_its_name(tmp_path, kind, word, name):
    store = store_of(tmp_path, s=with_special(GOOD, name, kind))
    with pytest.raises(DataError, match=rf"s\.tar: '{name}' is a {word} link to 'good\.jpg'.*--hard-dereference"):
        build_index(store)


def with_special(members, name, kind):
    """A tar of files, and one member of another kind."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for file, content in members:
            info = tarfile.TarInfo(file)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        special = tarfile.TarInfo(name)
        special.type, special.linkname = kind, "good.jpg"
        tar.addfile(special)
    return buffer.getvalue()


def test_what_belongs_to_no_sample_is_counted_and_changes_nothing(tmp_path):
    clean = [*pair("in/a", b"A", 0), *pair("in/b", b"B", 1)]
    debris = [("in/._a.jpg", b"x"), ("in/.DS_Store", b"x"), ("__MACOSX/in/a.jpg", b"x"), ("in/Thumbs.db", b"x")]
    littered = [clean[0], debris[0], *clean[1:], *debris[1:], ("README", b"x"), ("__meta__/a.jpg", b"x"), ("in/", None)]
    notes = []
    index = build_index(store_of(tmp_path / "l", s=tar_of(littered)), say=notes.append)
    assert [index.key(i) for i in range(index.num_samples)] == ["in/a", "in/b"]
    assert [image_slice(Store(tmp_path / "l"), index, i) for i in range(2)] == [b"A", b"B"]
    assert notes == [
        "left out, hidden, or of a system or tool: 4 (s.tar: in/._a.jpg, s.tar: in/.DS_Store, s.tar: __MACOSX/in/a.jpg "
        "and 1 more)",
        "left out, no dot in the name, or metadata of webdataset: 2 (s.tar: README, s.tar: __meta__/a.jpg)",
    ]
    notes.clear()
    build_index(store_of(tmp_path / "f", s=with_special(GOOD, "notes.txt", tarfile.SYMTYPE)), say=notes.append)
    assert notes == ["left out, a link, or no regular file: 1 (s.tar: notes.txt)"]


def test_the_image_is_chosen_by_its_key(tmp_path):
    members = [("a.png", b"mask"), ("a.webp", b"image"), ("a.cls", b"0")]
    members += [("b.input.jpg", b"other"), ("b.png", b"mask"), ("b.cls", b"1")]
    store = store_of(tmp_path, s=tar_of(members))
    index = build_index(store, image_keys=("WEBP", ".input.jpg"))
    assert [image_slice(store, index, i) for i in range(2)] == [b"image", b"other"]
    assert [bytes(image) for image in ShardReader(store, index).read(np.arange(2)).values()] == [b"image", b"other"]
    with pytest.raises(DataError, match=r"'b' has no image .*give it one of: webp\."):
        build_index(store, image_keys=("webp",))


def test_a_sparse_image_is_refused(tmp_path):
    import subprocess

    (tmp_path / "a.cls").write_bytes(b"1")
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(0, 2)
        file.write(b"end")
    (tmp_path / "set").mkdir()
    subprocess.run(["tar", "--sparse", "-cf", "set/s.tar", "a.jpg", "a.cls"], cwd=tmp_path, check=True)
    with pytest.raises(DataError, match=r"'a\.jpg' is a sparse file"):
        build_index(Store(tmp_path / "set"))


CONTENT_STOP = 2 * (512 + 1536 + 512 + 512)


@pytest.mark.parametrize(
    "stop", [0, 1, 511, 512, 513, 1000, 2048, 2049, 2560, 3071, 3072, 4000, CONTENT_STOP - 512, CONTENT_STOP]
)
def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path, stop):
    store = store_of(tmp_path, s=WHOLE[:stop])
    with pytest.raises(DataError, match=r"s\.tar is not a complete tar.*(in or after '[ab]\.|at its start)"):
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
    with pytest.raises(DataError, match="data after the end marker"):
        build_index(store_of(tmp_path, s=WHOLE + behind))


@pytest.mark.parametrize("packer", ["gzip", "bz2", "lzma"])
def test_a_compressed_tar_is_refused(tmp_path, packer):
    with pytest.raises(DataError, match=r"s\.tar is compressed"):
        build_index(store_of(tmp_path, s=__import__(packer).compress(WHOLE)))
