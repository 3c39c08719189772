"""What file systems of many machines do, and permissions: names are taken once, and no answer is believed blindly."""

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rsb_cluster.errors import StorageError
from rsb_cluster.storage import local_files
from rsb_cluster.storage.store import Store


def test_a_name_whose_answer_was_lost_is_ones_own(tmp_path, monkeypatch):
    """NFS asks again, and then finds the name that it has just made."""
    link = Path.hardlink_to

    def repeated(target, source):
        link(target, source)
        raise FileExistsError(errno.EEXIST, "File exists", str(target))

    monkeypatch.setattr(Path, "hardlink_to", repeated)
    assert local_files.create(tmp_path / "claim", b"mine")
    monkeypatch.undo()
    assert not local_files.create(tmp_path / "claim", b"theirs")
    assert (tmp_path / "claim").read_bytes() == b"mine"


@pytest.fixture
def no_links(monkeypatch):
    """A file system without hard links, as sshfs and some others."""

    def refuse(target, source):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(target))

    monkeypatch.setattr(Path, "hardlink_to", refuse)


def test_without_hard_links_one_of_many_creates_a_file(tmp_path, no_links):
    contents = [str(n).encode() for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda content: local_files.create(tmp_path / "claim", content), contents))
    assert sum(created) == 1
    assert (tmp_path / "claim").read_bytes() == contents[created.index(True)]
    assert [path.name for path in tmp_path.iterdir()] == ["claim"]


def test_without_hard_links_a_failed_write_takes_no_name(tmp_path, no_links, monkeypatch):
    synced = []

    def fail(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:  # the first is of the temporary file
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        local_files.create(tmp_path / "claim", b"mine")
    assert list(tmp_path.iterdir()) == []
    assert local_files.create(tmp_path / "claim", b"theirs")


def test_a_file_that_was_replaced_meanwhile_is_read_again(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"new")
    read, stale = Path.read_bytes, [1, 1]

    def once(path):
        if stale:
            stale.pop()
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", once)
    assert Store(tmp_path).read_bytes("x") == b"new"
    stale += [1] * local_files.STALE_READS
    with pytest.raises(OSError, match="Stale"):
        local_files.read(tmp_path / "x")


def test_a_deleted_file_that_is_open_keeps_no_folder_from_being_removed(tmp_path, monkeypatch):
    """NFS gives it another name, which cannot be removed while it is open, nor can the folder."""
    store, name = Store(tmp_path), ".nfs000000000123"
    for file in ("old/file", f"old/{name}", "old/below/file"):
        store.write_bytes(file, b"")
    unlink = Path.unlink

    def busy(path, missing_ok=False):
        if path.name == name:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", busy)
    store.delete("old")
    assert store.files() == [] and store.names("old") == []
    assert [path.name for path in (tmp_path / "old").iterdir()] == [name]
    monkeypatch.undo()
    store.delete("old")
    assert not store.exists("old")


def test_a_folder_that_is_not_empty_for_another_reason_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    rmdir = Path.rmdir

    def late(path):
        (path / "late").touch()
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", late)
    with pytest.raises(OSError, match="not empty"):
        local_files.remove(tmp_path / "old")


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(ann, bob):
    """Else its checkpoints would be taken for absent, and training started anew."""
    folder = ann.office / "runs" / "a"
    ann.does(f"from pathlib import Path; p = Path({str(folder / 'private')!r}); p.mkdir(parents=True)")
    folder.chmod(0o755)
    code = f"""
from rsb_cluster.errors import AccessError
from rsb_cluster.storage.store import Store
store = Store({str(folder)!r})
for ask in (lambda: store.files(), lambda: store.names("private"), lambda: store.exists("private/x"),
            lambda: store.read_bytes("private/x"), lambda: store.can_open("private/x")):
    try:
        print(ask())
    except AccessError as error:
        print("refused", "belongs to bin (drwx" in str(error))
"""
    assert bob.does(code).splitlines() == ["refused True"] * 5


@pytest.mark.parametrize(
    ("mode", "folder", "file"),
    [
        (0o2750, 0o2750, 0o640), (0o2755, 0o2755, 0o644), (0o2700, 0o2700, 0o600),
        (0o3770, 0o2750, 0o640), (0o3777, 0o2755, 0o644),
        (0o2770, None, None), (0o2777, None, None), (0o750, None, None), (0o1777, None, None),
    ],
)  # fmt: skip
def test_a_folder_hands_on_who_may_read_unless_files_can_be_replaced_there(tmp_path, mode, folder, file):
    (tmp_path / "x").mkdir()
    (tmp_path / "x").chmod(mode)
    for umask in (0o077, 0o002):
        before = os.umask(umask)
        try:
            Store(tmp_path / "x").write_bytes(f"{umask}/file", b"")
            Store(tmp_path / "x").create_bytes(f"{umask}/created", b"")
        finally:
            os.umask(before)
        made = tmp_path / "x" / str(umask)
        found = [stat.S_IMODE(path.stat().st_mode) for path in (made, made / "file", made / "created")]
        inherited = mode & stat.S_ISGID  # by the kernel
        assert found == [folder, file, file] if folder else [0o777 & ~umask | inherited, *[0o666 & ~umask] * 2]


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    store = Store(tmp_path)
    for read in (
        lambda: store.open("pipe"),
        lambda: store.read_into("pipe", 0, memoryview(bytearray(1))),
        lambda: list(store.stream("pipe")),
    ):
        with pytest.raises(StorageError, match=r"no regular file.* It is a pipe, a socket or a link to itself: remove"):
            read()


def test_a_link_to_itself_is_no_folder_and_hides_no_other_file(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert Store(tmp_path).entries() == {"file": True, "loop": True} and Store(tmp_path).files() == ["file"]
