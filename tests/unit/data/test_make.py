"""Making shards: read back by webdataset, the same bytes each time, and never half a set taken for a whole one."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from rsb_cluster.data.index import INDEX_NAME, load_index
from rsb_cluster.data.labels import LabelFile
from rsb_cluster.data.make import make_set, make_shards, plan_set
from rsb_cluster.data.recode import Recode
from rsb_cluster.data.sources import open_set
from rsb_cluster.data.sources.digits import digits
from rsb_cluster.data.sources.folder import image_folder
from rsb_cluster.data.split_folder import read_source_record
from rsb_cluster.errors import ConfigError, DataError, RsbError, StorageError
from rsb_cluster.storage.store import Store
from tests.servers.daemons import processes_with
from tests.unit import formats
from tests.unit.samples import contents, some, source_with
from tests.unit.tars import image_slice


# webdataset leaves the files it reads to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_what_was_made(tmp_path):
    import webdataset

    source = source_with([*some(23), ("d/" * 60 + "long", b"long", "png", 2)])
    source = replace(source, classes=("a", "b", "c"))
    index = make_shards(source, Store(tmp_path), shard_samples=10)
    urls = [str(tmp_path / name) for name in index.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [(s["__key__"], s.get("jpg", s.get("png")), int(s["cls"])) for s in read] == [
        (k, d, c) for k, d, _, c in source
    ]
    assert index.shards == ("shard-000000.tar", "shard-000001.tar", "shard-000002.tar")
    assert index.shard_start.tolist() == [0, 10, 20, 24]
    assert index.classes == ("a", "b", "c")
    assert Store(tmp_path).read_json("classes.json") == ["a", "b", "c"]
    assert [image_slice(Store(tmp_path), index, i) for i in range(24)] == [data for _, data, _, _ in source]
    assert load_index(Store(tmp_path)).digest == index.digest


def test_two_makes_give_the_same_bytes_with_any_number_of_processes(tmp_path, monkeypatch):
    make_shards(some(), Store(tmp_path / "1"), shard_samples=4)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)  # tarfile could put the time into every header
    old = os.umask(0o077)
    try:
        make_shards(some(), Store(tmp_path / "2"), shard_samples=4, workers=2)
    finally:
        os.umask(old)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1")) == 3 + 3


def test_progress_counts_samples(tmp_path):
    steps = []
    make_shards(some(10), Store(tmp_path), shard_samples=4, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(4, 10), (8, 10), (10, 10)]


def test_other_shards_are_refused_and_the_same_ones_kept(tmp_path):
    store = Store(tmp_path)
    made = make_shards(some(10), store, shard_samples=2)
    before = contents(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert make_shards(some(10), store, shard_samples=2).digest == made.digest
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times
    with pytest.raises(
        ConfigError, match=r"already holds index\.npz \(6 such files\), made from other images or settings: samples was"
    ):
        make_shards(some(3), store, shard_samples=2)
    with pytest.raises(ConfigError, match="max_side was None, is 9; quality was None, is 95"):
        make_shards(some(10), store, shard_samples=2, recode=Recode(9))
    assert contents(tmp_path) == before
    index = make_shards(replace(some(3), classes=()), store, overwrite=True)
    assert index.shards == ("shard-000000.tar",)
    assert set(contents(tmp_path)) == {"shard-000000.tar", INDEX_NAME, "source.json"}
    assert index.classes == ()


def test_a_make_that_fails_leaves_no_index_and_is_gone_on_with(tmp_path):
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "killed")
    make_shards(some(100), whole, shard_samples=20)
    last = int(some(100).order()[75])  # in the fourth shard of five, and not among those whose size is taken
    with pytest.raises(DataError, match="killed"):
        make_shards(some(100, fails_at=last), store, shard_samples=20)
    assert store.names() == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar", "source.json"]
    store.write_bytes("shard-000001.tar", store.read_bytes("shard-000001.tar")[:700])  # lost by the disk
    make_shards(some(3), Store(tmp_path / "other"))
    store.write_bytes("shard-000002.tar", (tmp_path / "other" / "shard-000000.tar").read_bytes())  # whole, but not ours
    (tmp_path / "killed" / ".shard-000003.tar.0123.tmp").write_bytes(b"half")  # what a kill inside of a write leaves
    kept = (tmp_path / "killed" / "shard-000000.tar").stat().st_mtime_ns
    steps = []
    make_shards(some(100), store, shard_samples=20, progress=lambda *step: steps.append(step))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert (tmp_path / "killed" / "shard-000000.tar").stat().st_mtime_ns == kept
    assert steps == [(20, 100), (40, 100), (60, 100), (80, 100), (100, 100)]


KILLED = """
import sys
from rsb_cluster.data.make import make_shards
from rsb_cluster.storage.store import Store
from tests.unit.samples import some

if __name__ == "__main__":
    make_shards(some(40, pause_s=0.05), Store(sys.argv[1]), shard_samples=2, workers=2)
"""


def test_a_make_killed_between_any_two_shards_ends_in_the_same_bytes(tmp_path):
    """SIGKILL to the parent alone: its two processes have to notice."""
    make_shards(some(40), Store(tmp_path / "whole"), shard_samples=2)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "killed"
    seen = set()
    for wanted in (2, 11):
        process = subprocess.Popen(
            [sys.executable, script, folder], env={**os.environ, "PYTHONPATH": str(Path.cwd()), "MADE": str(folder)}
        )
        while len(seen := set(folder.glob("shard-*.tar"))) < wanted and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert len(seen) < 20 and not (folder / INDEX_NAME).exists()
    deadline = time.monotonic() + 60
    while (left := processes_with([f"\0MADE={folder}\0"])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    make_shards(some(40), Store(folder), shard_samples=2)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_worker_that_is_killed_ends_the_make_with_a_hint(tmp_path):
    source = replace(some(8), read=Suicidal())
    with pytest.raises(RsbError, match=r"worker process was killed.*fewer --workers"):
        make_shards(source, Store(tmp_path), shard_samples=2, workers=2)


@dataclass(frozen=True)
class Suicidal:
    parent: int = os.getpid()

    def __call__(self, i):
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return f"k{i}", b"x", "jpg", 0


def test_overwriting_removes_the_index_before_all_else(tmp_path, monkeypatch):
    store = Store(tmp_path)
    make_shards(some(10), store, shard_samples=2)
    deleted = []

    def failing(self, path):
        deleted.append(path)
        raise StorageError("disk on fire")

    monkeypatch.setattr(Store, "delete_file", failing)
    with pytest.raises(StorageError):
        make_shards(some(3), store, overwrite=True)
    assert deleted == [INDEX_NAME]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (("a.b", b"x", "jpg", 0), "would not read this key back"),
        (("__x__/a", b"x", "jpg", 0), "would not read this key back"),
        (("a b\n", b"x", "jpg", 0), "would not read this key back"),
        (("é", b"x", "jpg", 0), "would not read this key back"),
        (("a", b"x", "JPG", 0), "the extension must be one of"),
        (("a", b"x", "txt", 0), "the extension must be one of"),
        (("a", b"x", "jpg", -1), "numbered from 0"),
        (("k001", b"x", "png", 0), "the key 'k001' occurs twice"),
    ],
)
def test_a_sample_that_could_not_be_found_again_is_refused(tmp_path, sample, message):
    with pytest.raises(RsbError, match=message):
        make_shards(source_with([*some(3), sample]), Store(tmp_path), shard_samples=1)
    assert not (tmp_path / INDEX_NAME).exists()


def test_no_samples_and_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no samples to write"):
        make_shards(source_with([]), Store(tmp_path))
    with pytest.raises(ConfigError, match="a shard cannot hold 0 samples"):
        make_shards(some(), Store(tmp_path), shard_samples=0)
    for wrong in ({"max_side": 0}, {"max_side": 9, "quality": 101}):
        with pytest.raises(ConfigError, match="cannot downscale to"):
            Recode(**wrong)
    assert contents(tmp_path) == {}


def test_what_a_part_was_made_from_is_in_it_and_tells_no_path(tmp_path):
    sources = open_set("digits")
    make_set(sources, Store(tmp_path))
    known = read_source_record(Store(tmp_path / "val"))
    assert known["data_set"] == "digits"
    assert (known["samples"], known["classes"], known["max_side"]) == (359, 10, None)
    assert str(tmp_path) not in (tmp_path / "val" / "source.json").read_text()
    assert read_source_record(Store(tmp_path)) == {}


def test_a_set_is_refused_before_any_part_is_written_and_gone_on_with_part_by_part(tmp_path):
    dest = Store(tmp_path)
    make_set({"val": replace(digits("val"), data_set="mine")}, dest)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="val already holds"):
        make_set(open_set("digits"), dest)
    assert contents(tmp_path) == before
    make_set({"val": open_set("digits")["val"]}, dest, overwrite=True)
    steps = []
    made = make_set(open_set("digits"), dest, progress=lambda *step: steps.append(step))
    assert {split: index.num_samples for split, index in made.items()} == {"train": 1438, "val": 359}
    assert steps == [(1359, 1797), (1797, 1797)]


def test_labels_lie_beside_the_index_before_it_is_written(tmp_path, monkeypatch):
    source = replace(
        some(3), labels={"mine": LabelFile(about="test", labels={"k000": [1], "k001": [], "k002": [0, 2]})}
    )
    store = Store(tmp_path)
    written = []
    write = Store.write_bytes
    monkeypatch.setattr(Store, "write_bytes", lambda self, p, c: (written.append(p), write(self, p, c))[1])
    make_shards(source, store)
    assert written == ["source.json", "shard-000000.tar", "classes.json", "labels-mine.json", INDEX_NAME]


def test_a_folder_that_is_advised_does_not_lie_in_the_images(tmp_path):
    formats.class_folders(tmp_path / "in" / "train", ("cat", "dog"), 1, seed=0, suffix="png")
    sources = {"train": image_folder(tmp_path / "in" / "train")}
    for dest in ("in/train", "in/train/cat", "in/train/new"):
        with pytest.raises(ConfigError, match=r"lies in .*/in/train, from which the images are read"):
            plan_set(sources, Store(tmp_path / dest))
