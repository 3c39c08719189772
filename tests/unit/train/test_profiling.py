"""A profile holds the steps that were asked for, and a rank that is not the first of its node writes none."""

import dataclasses
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rsb_cluster.node.ranks import Ranks
from rsb_cluster.storage.store import Store
from rsb_cluster.train.profiling import StepProfiler

RANKS = Ranks(0, 0, 1, "test", 0, 1)


def group(local_rank: int = 0) -> Any:
    ranks = dataclasses.replace(RANKS, rank=4, local_rank=local_rank)
    return SimpleNamespace(rank=4, ranks=ranks, device=torch.device("cpu"))


def steps_of(trace: Path) -> list[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [e["name"] for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("step ")]


def test_the_trace_holds_the_steps_and_their_operations(tmp_path: Path) -> None:
    profiler = StepProfiler("3-4", Store(tmp_path), group())
    for number in range(1, 7):
        with profiler.step(number):
            torch.zeros(2) + 1
        assert (tmp_path / "profiles").exists() == (number >= 4)
    (trace,) = (tmp_path / "profiles").iterdir()
    assert trace.name == "steps-3-4-rank00004.json.gz" and steps_of(trace) == ["step 3", "step 4"]
    assert gzip.decompress(trace.read_bytes()).count(b'"aten::add"') == 2


def test_what_an_end_leaves_is_written(tmp_path: Path) -> None:
    profiler = StepProfiler("2-9", Store(tmp_path), group())
    for number in (5, 6):  # resumed after the first
        with profiler.step(number):
            pass
    profiler.close()
    profiler.close()
    assert [file.name for file in (tmp_path / "profiles").iterdir()] == ["steps-5-6-rank00004.json.gz"]


def test_one_rank_of_a_node_is_profiled(tmp_path: Path) -> None:
    profiler = StepProfiler("1-1", Store(tmp_path), group(local_rank=1))
    with profiler.step(1):
        pass
    profiler.close()
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profiles").write_text("in the way")
    with StepProfiler("1", Store(tmp_path), group()).step(1):
        pass
    assert "the profile could not be written" in caplog.text


def test_an_error_in_a_step_passes(tmp_path: Path) -> None:
    profiler = StepProfiler("1-2", Store(tmp_path), group())
    with pytest.raises(KeyError), profiler.step(1):
        raise KeyError
    profiler.close()
    assert not list(tmp_path.iterdir())
