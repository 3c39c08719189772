"""A checkpoint is complete or it is none; a damaged one is quarantined, and the previous one is used."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest

from rsb_cluster.errors import CheckpointError
from rsb_cluster.runs import checkpoint
from rsb_cluster.runs.checkpoint import CheckpointId
from rsb_cluster.runs.lease import SupersededError
from rsb_cluster.storage.store import Store
from tests.command import ROOT

FILES = {"model.pt": b"weights" * 1000, "progress.json": b"{}", "empty": b""}


def files_of(step):
    return {name: content + str(step).encode() for name, content in FILES.items()}


def put(store, step, files, attempt=1):
    checkpoint.write(store, CheckpointId(step, attempt), files, before_manifest=lambda: None)


def write(store, *steps, attempt=1):
    for step in steps:
        put(store, step, files_of(step), attempt)


def steps(store):
    return [saved.step for saved in checkpoint.list_checkpoints(store, {})]


def latest(store):
    return checkpoint.read_latest(store, {})


def prune(store, keep):
    checkpoint.prune(store, {}, keep=keep, best_step=0)


def path(step, name):
    return f"{CheckpointId(step, 1).folder}/{name}"


def test_it_is_read_as_it_was_written(anywhere):
    assert latest(anywhere) is None
    assert steps(anywhere) == []
    write(anywhere, 20, 3)
    put(anywhere, 100, {"model.pt": bytearray(b"x"), "view": memoryview(b"abc")})
    assert steps(anywhere) == [3, 20, 100]
    found = latest(anywhere)
    assert found == checkpoint.Checkpoint(CheckpointId(100, 1), {"model.pt": b"x", "view": b"abc"})
    assert checkpoint.read(anywhere, CheckpointId(3, 1)).files == files_of(3)


def test_numbers_are_numbers_and_not_text(anywhere):
    write(anywhere, 5, 99_999_999, 100_000_000, 40)
    assert steps(anywhere) == [5, 40, 99_999_999, 100_000_000]
    assert latest(anywhere).step == 100_000_000
    prune(anywhere, 2)
    assert steps(anywhere) == [99_999_999, 100_000_000]


def test_the_manifest_is_the_last_file(tmp_path, monkeypatch):
    written = []
    real = Store.write_bytes
    monkeypatch.setattr(
        Store, "write_bytes", lambda self, path, content: (written.append(path), real(self, path, content))
    )
    write(Store(tmp_path), 7)
    assert written == [*(path(7, name) for name in (*FILES, "manifest.json")), ".last-a0001.json"]
    entries = json.loads((tmp_path / path(7, "manifest.json")).read_text())
    assert entries["step"] == 7
    assert {name: entry["bytes"] for name, entry in entries["files"].items()} == {
        name: len(content) for name, content in files_of(7).items()
    }


def test_without_a_manifest_it_is_none(anywhere):
    write(anywhere, 1)
    for name, content in files_of(2).items():
        anywhere.write_bytes(path(2, name), content)
    assert steps(anywhere) == [1]
    assert latest(anywhere).step == 1
    write(anywhere, 2)
    assert latest(anywhere).files == files_of(2), "a half one is no hindrance to a whole one"


def flip(store, step, name, bit):
    content = bytearray(store.read_bytes(path(step, name)))
    content[len(content) // 2] ^= 1 << bit
    store.write_bytes(path(step, name), content)


def manifest(store, step, change):
    value = store.read_json(path(step, "manifest.json"))
    change(value)
    store.write_json(path(step, "manifest.json"), value)


DAMAGES = {
    "a flipped bit": lambda s: flip(s, 9, "model.pt", 3),
    "a cut file": lambda s: s.write_bytes(path(9, "model.pt"), s.read_bytes(path(9, "model.pt"))[:-1]),
    "an empty file": lambda s: s.write_bytes(path(9, "model.pt"), b""),
    "a longer file": lambda s: s.write_bytes(path(9, "empty"), b"99"),
    "a missing file": lambda s: s.delete(path(9, "empty")),
    "a manifest that is no JSON": lambda s: s.write_bytes(path(9, "manifest.json"), b'{"step": 9'),
    "a manifest that is no text": lambda s: s.write_bytes(path(9, "manifest.json"), b"\xff\xff"),
    "an empty manifest": lambda s: s.write_bytes(path(9, "manifest.json"), b""),
    "a manifest that is a list": lambda s: s.write_json(path(9, "manifest.json"), []),
    "a manifest without files": lambda s: manifest(s, 9, lambda m: m.pop("files")),
    "a manifest with files that are none": lambda s: manifest(s, 9, lambda m: m.update(files=None)),
    "a manifest with a list of files": lambda s: manifest(s, 9, lambda m: m.update(files=["model.pt"])),
    "a manifest with an entry that is none": lambda s: manifest(s, 9, lambda m: m["files"].update({"model.pt": 3})),
    "a manifest of another step": lambda s: manifest(s, 9, lambda m: m.update(step=8)),
    "a manifest with a name that leaves": lambda s: manifest(
        s, 9, lambda m: m["files"]["empty"].update(file="../step-00000005-a0001/empty")
    ),
    "a manifest with another size": lambda s: manifest(s, 9, lambda m: m["files"]["model.pt"].update(bytes=1)),
    "a manifest with another hash": lambda s: manifest(s, 9, lambda m: m["files"]["model.pt"].update(sha256="0" * 64)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_logged_and_quarantined_and_the_previous_one_is_used(anywhere, caplog, damage):
    write(anywhere, 5, 9)
    DAMAGES[damage](anywhere)
    with pytest.raises(CheckpointError, match="step-00000009-a0001"):
        checkpoint.read(anywhere, CheckpointId(9, 1))
    with caplog.at_level(logging.WARNING):
        found = latest(anywhere)
    assert (found.step, found.files) == (5, files_of(5))
    (said,) = caplog.messages
    assert f"{anywhere.url}/step-00000009-a0001" in said
    assert said.endswith("The checkpoint is quarantined; the previous one is used.")
    assert anywhere.names() == ["damaged-step-00000009-a0001", "step-00000005-a0001"]
    assert latest(anywhere).step == 5, "and it stays in quarantine"


def test_a_step_can_be_damaged_twice(anywhere):
    write(anywhere, 5)
    for _ in range(2):
        write(anywhere, 9)
        flip(anywhere, 9, "model.pt", 0)
        assert latest(anywhere).step == 5
    write(anywhere, 9)
    assert latest(anywhere).files == files_of(9)


def test_two_damaged_ones_are_passed_over(anywhere):
    write(anywhere, 1, 2, 3)
    flip(anywhere, 2, "model.pt", 0)
    anywhere.delete(path(3, "progress.json"))
    assert latest(anywhere).step == 1


def test_if_all_are_damaged_the_user_decides(anywhere):
    write(anywhere, 1, 2)
    flip(anywhere, 1, "model.pt", 0)
    flip(anywhere, 2, "model.pt", 0)
    with pytest.raises(CheckpointError) as caught:
        latest(anywhere)
    assert str(caught.value).startswith(f"all 2 checkpoints in {anywhere.url} are damaged and quarantined")
    with pytest.raises(CheckpointError):  # asking again does not make it start from scratch
        latest(anywhere)


def test_prune_keeps_the_newest(anywhere):
    write(anywhere, 1, 2, 3, 10)
    prune(anywhere, 2)
    assert anywhere.names() == ["step-00000003-a0001", "step-00000010-a0001"]
    prune(anywhere, 2)
    assert steps(anywhere) == [3, 10]
    assert latest(anywhere).files == files_of(10)


def test_prune_removes_what_was_begun_and_never_ended_but_not_what_may_be_under_way(anywhere):
    write(anywhere, 3, 10)
    for step in (1, 5, 12):
        anywhere.write_bytes(path(step, "model.pt"), b"half")
    anywhere.write_bytes("damaged-step-00000002-a0001/model.pt", b"evidence")
    prune(anywhere, 2)
    assert anywhere.names() == [
        "damaged-step-00000002-a0001", "step-00000003-a0001", "step-00000005-a0001",
        "step-00000010-a0001", "step-00000012-a0001",
    ]  # fmt: skip
    write(anywhere, 20, 30)
    prune(anywhere, 2)
    assert anywhere.names() == ["damaged-step-00000002-a0001", "step-00000020-a0001", "step-00000030-a0001"]


def test_a_step_that_is_saved_again_is_whole_at_any_time(anywhere):
    """A run that resumes and is preempted at once saves the same step again, perhaps over its only checkpoint."""
    write(anywhere, 9)
    again = files_of(9) | {"progress.json": b"evaluated"}
    real, left = anywhere.write_bytes, [0]

    class Killed(Exception):
        pass

    def dying(path, content):
        if not left[0]:
            raise Killed
        left[0] -= 1
        real(path, content)

    for survived in range(len(FILES) + 1):
        left[0] = survived
        anywhere.write_bytes = dying
        with pytest.raises(Killed):
            put(anywhere, 9, again)
        del anywhere.write_bytes
        assert checkpoint.read(anywhere, CheckpointId(9, 1)).files == files_of(9)
    put(anywhere, 9, again)
    assert latest(anywhere).files == again
    put(anywhere, 9, files_of(9))
    assert latest(anywhere).files == files_of(9)
    put(anywhere, 9, again)
    assert latest(anywhere).files == again


def test_the_best_is_kept_besides_the_newest(anywhere):
    write(anywhere, 1, 2, 3, 10)
    for _ in range(2):
        checkpoint.prune(anywhere, {}, keep=2, best_step=2)
        assert steps(anywhere) == [2, 3, 10]
    checkpoint.prune(anywhere, {}, keep=2, best_step=10)
    assert steps(anywhere) == [3, 10]


def test_what_an_attempt_saves_after_its_successor_started_is_ignored(anywhere):
    """Attempt 1 was presumed dead; attempt 2 started at its step 10."""
    write(anywhere, 5, 10)
    starts = {1: 0, 2: 10}
    write(anywhere, 20, attempt=1)
    assert checkpoint.read_latest(anywhere, starts).saved == CheckpointId(10, 1)
    write(anywhere, 15, attempt=2)
    assert checkpoint.read_latest(anywhere, starts).saved == CheckpointId(15, 2)
    assert checkpoint.list_checkpoints(anywhere, starts) == [
        CheckpointId(5, 1),
        CheckpointId(10, 1),
        CheckpointId(15, 2),
    ]
    checkpoint.prune(anywhere, starts, keep=2, best_step=0)
    assert anywhere.names() == ["step-00000010-a0001", "step-00000015-a0002"]


def test_two_attempts_that_save_one_step_do_not_share_a_folder(anywhere):
    write(anywhere, 9, attempt=1)
    put(anywhere, 9, {"model.pt": b"the second's"}, attempt=2)
    assert checkpoint.read_latest(anywhere, {1: 0, 2: 5}).files == {"model.pt": b"the second's"}
    assert checkpoint.read(anywhere, CheckpointId(9, 1)).files == files_of(9)


def test_an_attempt_that_is_superseded_writes_no_manifest(anywhere):
    def superseded():
        raise SupersededError

    with pytest.raises(SupersededError):
        checkpoint.write(anywhere, CheckpointId(7, 1), files_of(7), before_manifest=superseded)
    assert steps(anywhere) == []


WRITER = """
import sys
from rsb_cluster.runs import checkpoint
from rsb_cluster.storage.store import Store
store = Store(sys.argv[1])
step = int(sys.argv[2])
print("up", flush=True)
while True:
    step += 1
    files = {f"part-{n}": bytes([step % 256]) * (100_000 + step) for n in range(3)}
    for content in (files, files | {"part-1": b"again"}):
        checkpoint.write(store, checkpoint.CheckpointId(step, 1), content, before_manifest=lambda: None)
    checkpoint.prune(store, {}, keep=2, best_step=0)
    print(step, flush=True)
"""


def test_killed_at_any_moment_the_last_that_was_said_to_be_saved_is_there(anywhere, caplog):
    """A real process, a real SIGKILL; the next process continues from the step that was found."""
    step = 0
    for n in range(8 if anywhere.is_local else 3):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, anywhere.url, str(step)],
            cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with child:
            child.stdout.readline()
            said = int(child.stdout.readline())  # one at least is whole
            time.sleep(0.02 + 0.037 * n)
            child.kill()
            said = max(said, *map(int, child.stdout.read().split()), 0)
        found = latest(anywhere)
        assert found.step in (said, said + 1)
        size = 100_000 + found.step
        assert {len(content) for content in found.files.values()} <= {size, len(b"again")}
        assert {content[0] for name, content in found.files.items() if name != "part-1"} == {found.step % 256}
        step = found.step
    assert step > n
    assert caplog.messages == [], "nothing was damaged"
