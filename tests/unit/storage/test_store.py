"""One suite for a local folder and a real S3 server; and what only a local one can do wrong."""

import contextlib
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rsb_cluster.errors import MissingError, StorageError
from rsb_cluster.storage.store import Store
from tests.command import ROOT


def test_of_many_that_create_a_file_at_once_one_does(anywhere):
    contents = [str(n).encode() for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda content: anywhere.create_bytes("file", content), contents))
    assert sum(created) == 1
    assert anywhere.read_bytes("file") == contents[created.index(True)]
    assert not anywhere.create_bytes("file", b"later")


WEIRD = [
    "with space", "quote'", 'double"', "ünïcödé 😀", "semi;colon", "per%cent", "per%20cent", "hash#", "question?",
    "ques?tion*star", "[bracket]", "{brace}", "new\nline", "tab\t", "a&b=c+d", "back\\slash", "~", "a:b@c", "trailing ",
]  # fmt: skip


def test_what_is_written_is_read(anywhere):
    assert not anywhere.exists("a/b.bin")
    anywhere.write_bytes("a/b.bin", b"one")
    anywhere.write_bytes("a/c.bin", memoryview(bytearray(b"three")))
    anywhere.write_bytes("empty", b"")
    assert anywhere.read_bytes("a/b.bin") == b"one"
    assert anywhere.read_bytes("a/c.bin") == b"three"
    assert anywhere.read_bytes("empty") == b""
    assert [anywhere.size(name) for name in ("a/b.bin", "a/c.bin", "empty")] == [3, 5, 0]
    assert [anywhere.exists(name) for name in ("a/b.bin", "a", "", "a/d.bin", "b")] == [True, True, True, False, False]
    anywhere.write_bytes("a/b.bin", b"other")
    assert anywhere.read_bytes("a/b.bin") == b"other"


def test_files_and_names_are_listed_in_order(anywhere):
    assert anywhere.files() == anywhere.names() == anywhere.files("a") == anywhere.names("a") == []
    assert not anywhere.exists()
    for name in ("b", "a/2", "a/10", "a/b/c", "ab/x", "a.txt", ".hidden"):
        anywhere.write_bytes(name, b"x")
    assert anywhere.files() == ["a.txt", "a/10", "a/2", "a/b/c", "ab/x", "b"]
    assert anywhere.files("a") == ["a/10", "a/2", "a/b/c"], "and not what only begins with the name"
    assert anywhere.names() == ["a", "a.txt", "ab", "b"]
    assert anywhere.names("a") == ["10", "2", "b"]
    assert anywhere.child("a").files() == ["10", "2", "b/c"]
    assert anywhere.child("a", "b").read_bytes("c") == b"x"
    assert anywhere.child("a").url == anywhere.locate("a") == f"{anywhere.url}/a"


def test_many_files_come_in_the_order_asked_for_and_errors_in_place(anywhere):
    for number in range(40):
        anywhere.write_bytes(f"many/{number}", str(number).encode() * number)
    asked = [f"many/{number}" for number in (39, *range(39), 39, 700)] * 8  # more than one batch
    found = list(anywhere.read_many(asked))
    assert [c for c in found if isinstance(c, bytes)] == [str(n).encode() * n for n in (39, *range(39), 39)] * 8
    assert [type(c) for c in found[41::42]] == [MissingError] * 8
    assert "many/700" in str(found[41])
    assert list(anywhere.read_many([])) == []
    assert next(anywhere.read_many(asked)) == b"39" * 39, "not all are read before the first is given"


def test_ranges_are_exact(anywhere):
    content = bytes(range(256))
    anywhere.write_bytes("f", content)
    for start, stop in ((0, 1), (10, 20), (0, 256), (5, 5), (250, 257), (256, 257), (300, 310)):
        assert b"".join(anywhere.stream("f", start, stop)) == content[start:stop]
    with pytest.raises(MissingError):
        list(anywhere.stream("g", 0, 1))


def test_json_goes_and_comes_back(anywhere):
    value = {"a": [1, 2.5, None, True], "é": "\u2028"}
    anywhere.write_json("x.json", value)
    assert anywhere.read_json("x.json") == value
    anywhere.write_bytes("y.json", b"{")
    with pytest.raises(StorageError, match=r"y\.json is not JSON: .*Was it cut off, or edited by hand\?"):
        anywhere.read_json("y.json")
    anywhere.write_bytes("z.json", b"\xff\xfe")
    with pytest.raises(StorageError, match=r"z\.json is not JSON"):
        anywhere.read_json("z.json")
    anywhere.write_bytes("empty.json", b"\n")
    with pytest.raises(StorageError, match=r"empty\.json is empty\. Was it cut off"):
        anywhere.read_json("empty.json")
    anywhere.write_bytes("deep.json", b"[" * 100_000)
    with pytest.raises(StorageError, match=r"deep\.json is not JSON"):
        anywhere.read_json("deep.json")


@pytest.mark.parametrize("what", ["read_bytes", "read_json", "size", "open"])
def test_what_is_not_there_is_missing(anywhere, what):
    anywhere.write_bytes("a", b"")
    with pytest.raises(MissingError) as caught:
        getattr(anywhere, what)("b/c")
    assert str(caught.value).startswith(f"there is nothing at {anywhere.url}/b/c. Check the path")


def test_files_and_folders_are_deleted(anywhere):
    for name in ("a/1", "a/b/2", "ab", "c"):
        anywhere.write_bytes(name, b"x")
    anywhere.delete("c")
    anywhere.delete("nothing")
    anywhere.delete("a")
    assert anywhere.files() == ["ab"]
    assert not anywhere.exists("a")


def test_a_file_is_deleted_and_never_a_folder(anywhere):
    for name in ("a/1", "b", "c", ".hidden"):
        anywhere.write_bytes(name, b"x")
    assert anywhere.entries() == {"a": False, "b": True, "c": True}
    anywhere.delete_file("b")
    anywhere.delete_file("nothing")
    with contextlib.suppress(StorageError):  # an object store has no folders, and nothing of that name
        anywhere.delete_file("a")
    assert anywhere.entries() == {"a": False, "c": True}
    assert anywhere.files() == ["a/1", "c"]


def test_files_and_folders_are_moved(anywhere):
    for name in ("a/1", "a/b/2", "ab/3"):
        anywhere.write_bytes(name, name.encode())
    anywhere.move("a", "new/place")
    anywhere.move("ab/3", "three")
    assert anywhere.files() == ["new/place/1", "new/place/b/2", "three"]
    assert anywhere.read_bytes("new/place/b/2") == b"a/b/2"
    assert anywhere.read_bytes("three") == b"ab/3"
    with pytest.raises(MissingError):
        anywhere.move("a", "elsewhere")


def test_a_stream_seeks(anywhere):
    anywhere.write_bytes("f", bytes(range(256)) * 100)
    with anywhere.open("f") as stream:
        assert stream.read(2) == b"\0\1"
        stream.seek(25_000)
        assert stream.read(3) == bytes([25_000 % 256, 25_001 % 256, 25_002 % 256])
        stream.seek(0)
        assert len(stream.read()) == 25_600


@pytest.mark.parametrize("path", ["../x", "a/../../x", "..", "a/", "a//b", "/etc/passwd", "", "a\0b", "a/..", "//x"])
def test_paths_cannot_leave_the_folder(anywhere, path):
    anywhere.write_bytes("a/b", b"")
    calls = [
        lambda: anywhere.read_bytes(path), lambda: anywhere.write_bytes(path, b""), lambda: anywhere.delete(path),
        lambda: anywhere.move("a", path), lambda: anywhere.child(path), lambda: anywhere.stream(path, 0, 1),
    ]  # fmt: skip
    for call in calls if path else calls[4:5]:
        with pytest.raises(StorageError, match=r"would leave its folder; it is refused"):
            call()
    assert anywhere.files() == ["a/b"]


@pytest.mark.parametrize("path", ["", ".", "./.", "a/."])
def test_the_folder_itself_is_no_file_in_it(anywhere, path):
    anywhere.write_bytes("a/b", b"")
    for call in (anywhere.delete, anywhere.read_bytes):
        with pytest.raises(StorageError, match=r"would leave its folder; it is refused"):
            call(path)
    assert anywhere.files() == ["a/b"]


@pytest.mark.parametrize("name", WEIRD)
def test_any_name_works(anywhere, name):
    neighbours = {"with-space", "question!", "quesXtionYstar", "b", "perXcent", "per cent"}
    for neighbour in neighbours:
        anywhere.write_bytes(neighbour, b"neighbour")
    anywhere.write_bytes(f"{name}/{name}", name.encode())
    folder = anywhere.child(name)
    assert folder.read_bytes(name) == anywhere.read_bytes(f"{name}/{name}") == name.encode()
    assert b"".join(folder.stream(name, 0, 1)) == name.encode()[:1]
    assert folder.files() == folder.names() == [name]
    assert anywhere.names() == sorted({name, *neighbours})
    assert folder.size(name) == len(name.encode())
    assert folder.exists(name)
    with folder.open(name) as stream:
        assert stream.read() == name.encode()
    anywhere.move(f"{name}/{name}", f"moved {name}")
    assert anywhere.read_bytes(f"moved {name}") == name.encode()
    anywhere.move(f"moved {name}", name + "/again")
    anywhere.delete(name)
    assert anywhere.files() == sorted(neighbours)


def test_a_big_file_comes_back_the_same(anywhere):
    content = os.urandom(1 << 20) * 41 + b"some more"  # two parts and a half, on S3
    anywhere.write_bytes("big", memoryview(content))
    assert anywhere.size("big") == len(content)
    assert anywhere.read_bytes("big") == content
    assert b"".join(anywhere.stream("big", 7_000_000, 19_000_001)) == content[7_000_000:19_000_001]


def test_a_reader_never_sees_a_part(anywhere):
    """The content says its own length, and is all of one letter."""
    contents = [bytes([65 + n % 26]) * (200_000 + 1000 * n) for n in range(30)]
    anywhere.write_bytes("f", contents[0])
    whole, seen, done = set(contents), set(), threading.Event()
    errors: list[object] = []

    def read() -> None:
        while not done.is_set():
            try:
                content = anywhere.read_bytes("f")
            except StorageError as error:
                errors.append(error)
                return
            seen.add(content)
            if content not in whole:
                errors.append(f"{len(content)} bytes of {set(content)}")
            if anywhere.names() != ["f"]:
                errors.append(anywhere.names())

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for content in contents * 3:
        anywhere.write_bytes("f", content)
    done.set()
    for reader in readers:
        reader.join()
    assert errors == []
    assert len(seen) > 2, "the reader was there while it happened"


def test_a_probe_leaves_nothing(anywhere):
    anywhere.check_writable()
    assert anywhere.files() == []


# --- local ----------------------------------------------------------------------------------------------------------


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").write_text("precious")
    for url in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(StorageError) as caught:
            Store(url).check_writable()
        assert str(caught.value).startswith(f"cannot use {url}/probe-")
        assert str(caught.value).endswith("Choose another folder.")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        Store(tmp_path).read_bytes("folder")
    with pytest.raises(StorageError, match="Is a directory"):
        Store(tmp_path).write_bytes("folder", b"")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"], "no temporary file is left"


def test_a_name_that_is_too_long_is_no_traceback(tmp_path):
    with pytest.raises(StorageError, match="File name too long"):
        Store(tmp_path).write_bytes("x" * 300, b"")


def test_a_read_only_file_system_is_named():
    with pytest.raises(StorageError, match=r" /proc/rsb/probe-.* Check the path"):
        Store("/proc/rsb").check_writable()


def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    try:
        store = Store(tmp_path)
        store.write_bytes("f", b"old" * 100_000)
        with pytest.raises(StorageError) as caught:
            store.write_bytes("f", b"new" * 300_000)
        assert "No space left on device" in str(caught.value)
        assert str(caught.value).endswith("Free some space, or choose another folder.")
        assert store.read_bytes("f") == b"old" * 100_000
        assert [p.name for p in tmp_path.iterdir()] == ["f"], "the half-written file is gone"
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    store = Store(tmp_path)
    store.write_bytes("f", b"A" * 3_000_000)
    program = (
        "import sys, itertools; from rsb_cluster.storage.store import Store\n"
        "store = Store(sys.argv[1]); print('up', flush=True)\n"
        "for n in itertools.count(1): store.write_bytes('f', bytes([65 + n % 26]) * 3_000_000)"
    )
    for pause in (0.0, 0.013, 0.031):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        with child:
            child.stdout.readline()
            threading.Event().wait(pause)
            child.kill()
        content = store.read_bytes("f")
        assert len(content) == 3_000_000 and len(set(content)) == 1
        assert store.files() == store.names() == ["f"]
