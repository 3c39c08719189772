"""Each tracker shows a run of several attempts as one experiment, with no step twice: with the real libraries."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest

from rsb_cluster.config import catalog
from rsb_cluster.runs.metrics import MetricsWriter
from rsb_cluster.runs.run import Run
from rsb_cluster.train.trackers import TRACKERS, Trackers

RECIPE = catalog.load_recipe("digits").recipe
# Two attempts: the first was killed at step 50, its checkpoint was of step 30.
ATTEMPTS = ((10, 20, 30, 40, 50), (40, 50, 60, 70))
STEPS = [10, 20, 30, 40, 50, 60, 70]


def train(run: Run, names: tuple[str, ...]) -> None:
    for number, steps in enumerate(ATTEMPTS, 1):
        writer = MetricsWriter(run.store, number)
        trackers = Trackers(names, run, RECIPE, writer, number)
        for step in steps:
            row = {"step": step, "epoch": step / 10, "time": 1e9 + step + 100 * number}
            writer.add(row | {"kind": "train", "loss": 1 / step, "lr": 1e-3})
            if step == 50:
                writer.add(row | {"kind": "eval", "top1": 90.0, "loss": 0.1, "samples": 360})
            writer.flush()
        trackers.close(finished=number == len(ATTEMPTS))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run.at(tmp_path / "runs", "digits-resnet10t-s0-12345678")


def test_tensorboard_shows_one_curve(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(run, ("tensorboard",))
    events = EventAccumulator(str(Path(run.store.url) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == STEPS
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([1 / step for step in STEPS])
    assert [(event.step, event.value) for event in events.Scalars("eval/top1")] == [(50, 90.0)]
    assert "train/kind" not in events.Tags()["scalars"]
    assert not caplog.records


@pytest.mark.long
@pytest.mark.filterwarnings("default")
def test_mlflow_shows_one_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    train(run, ("mlflow",))
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "rsb-cluster"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == (run.run_id, "FINISHED")
    assert found.data.params["optimizer.name"] == RECIPE.optimizer.name
    assert [m.step for m in client.get_metric_history(found.info.run_id, "train/loss")] == STEPS
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "eval/top1")] == [(50, 90.0)]


@pytest.mark.long
@pytest.mark.filterwarnings("default")
def test_wandb_keeps_one_run_offline(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(run, ("wandb",))
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == len(ATTEMPTS)
    assert all(folder.name.endswith(run.run_id) for folder in folders), "one id, so the server makes one run of them"
    rows = [row for folder in folders for row in wandb_history(folder)]
    assert [row["_step"] for row in rows] == STEPS
    assert [row["train/loss"] for row in rows] == pytest.approx([1 / step for step in STEPS])
    assert [row["eval/top1"] for row in rows if "eval/top1" in row] == [90.0]


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """Read what W&B wrote for its server: protobuf messages in LevelDB's log format behind seven bytes of its own."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    content, place, message, rows = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768  # a header is not split over blocks
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        message += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            if record.WhichOneof("record_type") == "history":
                rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def test_a_tracker_that_fails_is_disabled_and_the_metrics_are_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> Any:
        raise ConnectionError("no server")

    monkeypatch.setitem(TRACKERS, "mlflow", refuse)
    with caplog.at_level(logging.WARNING):
        train(run, ("mlflow", "tensorboard"))
    assert caplog.messages == ["mlflow is disabled for this attempt: ConnectionError: no server"] * 2
    assert len(run.store.files("metrics")) == 2
    assert run.store.files("tensorboard")
