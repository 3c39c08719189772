"""The evidence is green where all parts ran on a GPU and met their goals, and nowhere else."""

import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import evidence
from tests.gpu.evidence import NO_GPU, PARTS, Line, Place, keep, main


def exit_code(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    gpus: int,
    *missed: str,
    failed: tuple[str, ...] = (),
    parts: tuple[str, ...] = (),
) -> int:
    """The exit code where each part meets its goals, or is one of those that miss theirs, or fail."""

    def found(name: str, place: Place) -> None:
        keep(name, place, [Line("a rate", "1", "2", met=name not in missed, failed=name in failed)])

    monkeypatch.setattr(evidence, "run_in_time", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(sys, "argv", ["evidence", *parts, "--folder", str(folder)])
    return main()


def test_without_a_gpu_it_is_never_green(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, tmp_path, 0) == NO_GPU != 0
    said = capsys.readouterr()
    assert "NO GPU" in said.out and "There is no GPU here" in said.err
    assert " ok" not in said.out
    assert exit_code(monkeypatch, tmp_path, 0, "saving") == NO_GPU, "a rate on a CPU is none of a GPU"
    assert exit_code(monkeypatch, tmp_path, 0, failed=("saving",)) == 1
    said = capsys.readouterr()
    assert said.out.count("FAILED") == 1 and "some of the code fails" in said.err


def test_all_parts_have_to_meet_their_goals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(monkeypatch, tmp_path, 2) == 0
    assert exit_code(monkeypatch, tmp_path, 2, "lamb") == 1
    assert capsys.readouterr().out.count("MISSED") == 1
    assert exit_code(monkeypatch, tmp_path, 2, parts=("lamb",)) == 0  # the others are known from before


def test_a_part_that_was_not_run_on_these_gpus_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exit_code(monkeypatch, tmp_path, 1, parts=("lamb",)) == 1
    assert exit_code(monkeypatch, tmp_path, 1, parts=tuple(set(PARTS) - {"lamb"})) == 0
    assert exit_code(monkeypatch, tmp_path, 2, parts=("lamb",)) == 1


def test_a_part_that_dies_or_hangs_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, 0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    evidence.run_in_time("lamb", place)
    assert "ended without a word" in (tmp_path / "found" / "lamb.json").read_text()
    (tmp_path / "sleeper").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "sleeper").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "sleeper"))
    monkeypatch.setattr(evidence, "LIMIT_S", 0.2)
    evidence.run_in_time("lamb", place)
    assert "took more than" in (tmp_path / "found" / "lamb.json").read_text()
