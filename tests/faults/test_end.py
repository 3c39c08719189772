"""The last moments of a run: killed between any two things that happen there, it still ends with its result."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest

from rsb_cluster.errors import StorageError
from rsb_cluster.monitor.status import read_status
from rsb_cluster.node.exit_codes import EXIT_RESTART
from rsb_cluster.runs import checkpoint, lease
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.causes import EXIT_CODES
from tests.equality import assert_bit_equal, final_state, rows_of
from tests.faults.lab import STEPS, AtStep, Killed, Lab

AVERAGE = "train.ema_decay=0.9"
LAST_SAVE = 15  # of PACE, before the end


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_digits: Path) -> Run:
    lab = Lab(tmp_path_factory.mktemp("whole") / "run", tiny_digits, AVERAGE)
    assert lab.start() == "finished"
    return lab.run


@pytest.fixture(scope="module")
def nearly_done(tmp_path_factory: pytest.TempPathFactory, tiny_digits: Path) -> Path:
    """The folder of a run that was killed after its last but one checkpoint, so that few steps are left."""
    lab = Lab(tmp_path_factory.mktemp("nearly-done") / "run", tiny_digits, AVERAGE)

    def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        # A question for each step, and one for each of 2 x 2 evaluations of the model and its average.
        lab.start(AtStep({LAST_SAVE + 5: kill}))
    assert [saved.step for saved in checkpoint.list_checkpoints(lab.checkpoints, {})][-1] == LAST_SAVE
    return Path(lab.store.url)


def copied(nearly_done: Path, data: Path, folder: Path) -> Lab:
    lab = Lab(folder / "run", data, AVERAGE)
    shutil.rmtree(folder / "run")
    shutil.copytree(nearly_done, folder / "run")
    return lab


@pytest.fixture
def lab(tmp_path: Path, nearly_done: Path, tiny_digits: Path) -> Lab:
    return copied(nearly_done, tiny_digits, tmp_path / "lab")


class Writes:
    """All that is written from the last step on is counted, and one of these writes kills the rank.

    Args:
        fatal: Which one, from 1; 0: none.
        before: Whether it kills ahead of the write, or after it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fatal: int = 0, *, before: bool = True) -> None:
        self.names: list[str] = []
        self._fatal, self._before, self._counts = fatal, before, False
        for name in ("write_bytes", "create_bytes"):
            monkeypatch.setattr(Store, name, self._counting(getattr(Store, name)))

    def begin(self) -> None:
        self._counts = True

    def _counting(self, real):  # type: ignore[no-untyped-def]
        def write(store: Store, path: str, content: bytes):  # type: ignore[no-untyped-def]
            is_ours = self._counts and not path.endswith("-alive.json")  # a heartbeat comes when it comes
            if is_ours:
                self.names.append(path)
            is_fatal = is_ours and len(self.names) == self._fatal
            if is_fatal and self._before:
                raise Killed
            done = real(store, path, content)
            if is_fatal:
                raise Killed
            return done

        return write


def last_writes(lab: Lab, monkeypatch: pytest.MonkeyPatch, fatal: int, *, before: bool) -> list[str]:
    """Start the run; one write from the last step on kills it. Return what was written since."""
    with monkeypatch.context() as patched:
        writes = Writes(patched, fatal, before=before)
        left = STEPS - LAST_SAVE
        try:
            lab.start(AtStep({left: writes.begin}))
        except Killed:
            assert len(writes.names) >= fatal, "it was one of these that killed it"
        return writes.names


def assert_as_if_nothing_had_been(run: Run, whole: Run) -> None:
    assert rows_of(run) == rows_of(whole)
    assert_bit_equal(final_state(run), final_state(whole))
    ours, theirs = run.result(), whole.result()
    assert ours is not None and theirs is not None
    for key in ("top1", "top5", "loss", "samples", "ema", "best_top1", "best_step", "steps"):
        assert ours[key] == theirs[key], key


def test_a_run_that_is_killed_at_any_moment_of_its_end_ends_all_the_same(
    lab: Lab, nearly_done: Path, tiny_digits: Path, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = last_writes(lab, monkeypatch, 0, before=True)
    assert moments[-2:] == ["result.json", "logs/0002-rank00000.log"]
    assert sum(name.endswith(checkpoint.MANIFEST) for name in moments) == 1
    assert_as_if_nothing_had_been(lab.run, whole)
    states = set()
    for number, before in itertools.product(range(1, len(moments)), (True, False)):
        name = moments[number - 1]
        again = copied(nearly_done, tiny_digits, tmp_path / f"{number}-{before}")
        last_writes(again, monkeypatch, number, before=before)
        (status,) = read_status([again.run])
        states.add(status.state)
        if (name, before) != ("result.json", False):
            assert again.run.result() is None, f"{name} comes ahead of the result"
            assert again.start() == "finished", f"killed {'before' if before else 'after'} {name}"
        assert_as_if_nothing_had_been(again.run, whole)
    assert states == {"killed", "finished"}


def test_a_checkpoint_of_the_last_step_without_scores_is_evaluated_again(lab: Lab, whole: Run) -> None:
    """As versions have left it that did not keep them."""
    assert lab.start() == "finished"
    folder = lab.checkpoints.child(checkpoint.list_checkpoints(lab.checkpoints, {})[-1].folder)
    progress = folder.read_json("progress.json")
    del progress["scores"]
    content = json.dumps(progress).encode()
    folder.write_bytes("progress.json", content)
    manifest = folder.read_json(checkpoint.MANIFEST)
    manifest["files"]["progress.json"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    folder.write_json(checkpoint.MANIFEST, manifest)
    lab.store.delete("result.json")
    assert lab.start() == "finished"
    assert lab.run.attempts()[-1].start_step == STEPS
    assert_as_if_nothing_had_been(lab.run, whole)


def test_a_result_that_cannot_be_written_is_a_crash_and_is_not_tried_for_ever(
    lab: Lab, whole: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The state is saved and the saver closed by then; the next attempt has nothing to train."""
    write = Store.write_bytes

    def refuse(store: Store, path: str, content: bytes) -> None:
        if path == "result.json":
            raise StorageError("cannot use result.json: No space left on device.")
        write(store, path, content)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write_bytes", refuse)
        for _ in range(3):  # the first of them got on: it saved the last step
            cause = lab.start()
            assert (cause, EXIT_CODES[cause]) == ("crashed", EXIT_RESTART)
            (status,) = read_status([lab.run])
            assert (status.state, "No space left on device" in status.cause) == ("crashed", True)
        assert "at the end of the attempt" not in capfd.readouterr().err, "what was closed is closed"
        assert lab.start() == "failed"
        assert "the last 2 attempts crashed" in lab.run.attempts()[-1].message
    number = len(lab.run.attempts())
    assert lab.start() == "failed" and len(lab.run.attempts()) == number, "its job has ended it permanently"
    lab.resubmit()
    assert lab.start() == "finished"
    assert_as_if_nothing_had_been(lab.run, whole)


@pytest.mark.parametrize("heartbeat_s", [0.01, 1000.0])
def test_a_run_whose_folder_vanishes_stops_with_a_message_and_does_not_make_it_again(
    tmp_path: Path,
    tiny_digits: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    heartbeat_s: float,
) -> None:
    """Its heartbeats find out, or the next save does at the latest."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", heartbeat_s)
    lab = Lab(tmp_path / "runs" / "run", tiny_digits)

    def vanish() -> None:
        while not (Path(lab.run.url) / "checkpoints" / ".last-a0001.json").exists():
            pass  # what is being written when a folder goes is nobody's fault
        Path(lab.run.url).rename(tmp_path / "aside")

    assert lab.start(AtStep({4: vanish})) == "failed"
    said = capsys.readouterr().err
    assert "no longer exists, so nothing can be saved: it was deleted or moved. Submit the run again" in said
    if heartbeat_s > 1:
        assert list((tmp_path / "runs").iterdir()) == []
