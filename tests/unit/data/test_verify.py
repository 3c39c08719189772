"""Each kind of damage is found and named, and an untouched set has no problems."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsb_cluster.data.index import INDEX_NAME, load_index
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.make import make_shards
from rsb_cluster.data.sources import DataSource
from rsb_cluster.data.sources.source import as_png
from rsb_cluster.data.verify import CHANGED, UNDECODABLE, DataSetStats, shared_images, stats, verify
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage.store import Store
from tests.command import ROOT
from tests.servers.web import WebServer
from tests.unit.tars import pair, tar_of


def images(n=9):
    noise = np.random.default_rng(0).integers(0, 256, (n, 20, 20, 3), dtype=np.uint8)
    return [(f"k{i}", as_png(Image.fromarray(noise[i])), "png", i % 3) for i in range(n)]


def made_of(samples, folder, classes=(), **how):
    store = Store(folder)
    make_shards(DataSource("given", tuple(classes), range(len(samples)), samples.__getitem__), store, **how)
    return store


@pytest.fixture
def store(tmp_path):
    return made_of(images(), tmp_path, "abc", shard_samples=3)


@pytest.mark.parametrize("decode", [False, True])
def test_an_untouched_set_has_no_problems(store, decode):
    steps = []
    report = verify(store, decode=decode, progress=lambda *step: steps.append(step))
    assert (report.shards, report.samples, report.problems) == (3, 9, [])
    assert report.notes == ["3 classes, with 3 images each"]
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_several_processes_find_the_same(store):
    content = bytearray(store.read_bytes("shard-000001.tar"))
    content[2000] ^= 1  # in its first image
    store.write_bytes("shard-000001.tar", content)
    store.delete("shard-000000.tar")
    alone, together = verify(store, decode=True), verify(store, decode=True, workers=2)
    assert alone.problems == together.problems
    assert len(alone.problems) == 3
    assert alone.images.tolist() == together.images.tolist()


def test_a_set_on_a_web_server_is_verified_without_a_list_of_its_files(store):
    with WebServer(Path(store.url)) as web:
        web.listings = False
        report = verify(Store(web.url), decode=True, workers=2)
        assert (report.shards, report.samples, report.problems) == (3, 9, [])
        assert stats(Store(web.url)).samples == 9
        store.delete("shard-000001.tar")
        report = verify(Store(web.url))
        assert report.problems == ["shard-000001.tar is missing. Copy it again."]
        assert report.images.tolist() == verify(store).images.tolist()


def test_memory_does_not_grow_with_a_shard_on_a_web_server(tmp_path):
    large = np.random.default_rng(0).bytes(1 << 20)
    content = tar_of([member for i in range(90) for member in pair(f"k{i:02d}", large, 0)])
    store = Store(tmp_path)
    store.write_bytes("a.tar", content)
    build_index(store)
    code = (
        "import sys, tracemalloc; from rsb_cluster.data.verify import verify\n"
        "from rsb_cluster.storage.store import Store\n"
        "store = Store(sys.argv[1]); store.exists('f'); tracemalloc.start(); report = verify(store)\n"
        "print(len(report.problems), report.samples, tracemalloc.get_traced_memory()[1])"
    )
    with WebServer(tmp_path) as web:
        done = subprocess.run(
            [sys.executable, "-c", code, web.url], cwd=ROOT, capture_output=True, text=True, check=True
        )
    problems, samples, peak = map(int, done.stdout.split())
    assert (problems, samples) == (0, 90)
    assert peak < 40 << 20, "two requests of 8 MiB, which are joined"


def test_a_web_server_gets_no_index_and_no_shards(store, tmp_path):
    before = store.files()
    with WebServer(tmp_path) as web:
        for write in (lambda: build_index(Store(web.url)), lambda: made_of(images(), web.url)):
            with pytest.raises(ConfigError, match=r"cannot keep .* at http://.*http:// is only read, as data"):
                write()
        assert web.requests == []
    assert store.files() == before


def test_images_that_come_twice_are_noted_with_their_classes(tmp_path):
    first, *others = images(6)
    again = [(f"again{i}", first[1], "png", label) for i, label in enumerate((0, 2))]
    report = verify(made_of([first, *others, *again], tmp_path / "1", "abcd", shard_samples=2))
    assert report.problems == []
    same, other_class, balance, empty = report.notes
    assert same.startswith("duplicate images: 2 ('")
    assert other_class.startswith("duplicate images with another class: 1 ('")
    assert "again1" in other_class
    assert balance == "4 classes, with 0 to 3 images (mean 2.0)"
    assert empty == "classes without an image: 1 (d)"
    other = verify(made_of([*again, *images(8)[6:]], tmp_path / "2"))
    assert shared_images(report, other) == 1
    assert shared_images(report, verify(made_of(images(8)[6:], tmp_path / "3"))) == 0


@pytest.mark.parametrize("decode", [False, True])
def test_a_missing_an_extra_a_cut_and_a_changed_shard_are_named(store, decode):
    content = bytearray(store.read_bytes("shard-000000.tar"))
    content[-1] ^= 1  # after the end marker: no image is hurt, the hash is
    store.write_bytes("shard-000000.tar", content)
    store.delete("shard-000001.tar")
    whole = store.read_bytes("shard-000002.tar")
    store.write_bytes("shard-000002.tar", whole + b"\0")
    store.write_bytes("other.tar", b"")
    report = verify(store, decode=decode)
    assert (report.shards, report.samples) == (2, 6)
    assert [problem.split(".tar")[0] for problem in report.problems] == [
        "other", "shard-000000", "shard-000001", "shard-000002",
    ]  # fmt: skip
    extra, changed, missing, longer = report.problems
    assert "is not in the index" in extra
    assert "has changed" in changed
    assert hashlib.sha256(content).hexdigest() in changed
    assert "is missing" in missing
    assert f"has {len(whole) + 1} bytes, and had {len(whole)}" in longer


@pytest.mark.parametrize("sample", range(9))
def test_a_flipped_bit_in_any_sample_is_found(store, sample):
    index = load_index(store)
    name = index.shards[int(index.shard_of(np.array(sample)))]
    content = bytearray(store.read_bytes(name))
    content[int(index.image_offsets[sample] + index.image_sizes[sample] // 2)] ^= 1
    store.write_bytes(name, content)
    (problem,) = verify(store).problems
    assert problem.startswith(f"{name} has changed")
    assert verify(store, decode=True).causes == {CHANGED}
    first, second = verify(store, decode=True).problems
    assert first.startswith(f"{name}: the image of sample '{index.key(sample)}' cannot be decoded")
    assert second == problem


def test_a_cut_shard_is_reported_by_its_size_and_the_samples_that_are_lost(store):
    index = load_index(store)
    content = store.read_bytes("shard-000002.tar")
    store.write_bytes("shard-000002.tar", content[: int(index.image_offsets[7]) + 100])
    problems = verify(store, decode=True).problems
    assert [f"'{index.key(i)}'" in problem for i, problem in zip((7, 8), problems, strict=False)] == [True, True]
    assert problems[2].startswith("shard-000002.tar has")
    assert len(problems) == 3


def test_an_image_that_was_bad_from_the_start_is_found_by_decoding_only(tmp_path):
    cut = images()[1][1][:300]
    store = made_of([*images(1), ("bad", cut, "png", 0), ("text", b"no image", "jpg", 1)], tmp_path)
    assert verify(store).problems == []
    assert verify(store, decode=True).causes == {UNDECODABLE}
    text, bad = sorted(verify(store, decode=True).problems, key=lambda problem: "bad" in problem)
    assert "shard-000000.tar: the image of sample 'bad' cannot be decoded" in bad
    assert "'text' cannot be decoded" in text


def test_keys_that_each_shard_counts_from_zero_are_noted_and_no_problem(tmp_path):
    store = Store(tmp_path)
    for name in "abc":
        members = [member for i in range(40) for member in pair(f"{i:03d}", name.encode() + bytes([i]), 0)]
        store.write_bytes(f"{name}.tar", tar_of(members))
    build_index(store)
    report = verify(store)
    assert (report.problems, report.causes) == ([], set())
    assert report.notes[0].startswith("samples whose key is also in another shard: 80 ('000' in b.tar and in a.tar);")


def test_without_an_index_nothing_is_verified(store):
    store.delete(INDEX_NAME)
    for check in (verify, stats):
        with pytest.raises(DataError, match="no index"):
            check(store)


def test_stats_count_what_is_there(tmp_path):
    store = Store(tmp_path)
    for number, labels in enumerate([(0, 0), (1, 0), (1,)]):
        content = tar_of([m for i, label in enumerate(labels) for m in pair(f"{number}{i}", b"x" * 30, label)])
        store.write_bytes(f"shard-00000{number}.tar", content)
    build_index(store, classes=["a", "b", "named only"])
    assert stats(store) == DataSetStats(
        data_set="",
        label_sets=(),
        shards=3,
        samples=5,
        total_bytes=sum(store.size(f"shard-00000{i}.tar") for i in range(3)),
        mean_image_bytes=30.0,
        num_classes=3,
        class_samples_min=0,
        class_samples_max=3,
        one_class_shards=2 / 3,
    )


def test_images_of_a_cut_shard_are_no_duplicates(store):
    store.write_bytes("shard-000001.tar", b"cut")
    report = verify(store)
    assert [problem.partition(" ")[0] for problem in report.problems] == ["shard-000001.tar"]
    assert not any("duplicate" in note for note in report.notes) and len(report.images) == 6
