"""``selftest resume`` on a real Slurm: it passes, and detects differences."""

import json
import shutil
from pathlib import Path

import pytest

from rsb_cluster.checks import selftest
from rsb_cluster.config.catalog import find
from rsb_cluster.runs.run import Run
from tests.command import RsbCluster
from tests.commands_of import as_printed
from tests.servers.slurm import SlurmCluster

pytestmark = pytest.mark.slurm

# The run that is to be preempted waits some steps after each moment when that is due: on a fast machine it would be
# through before it is.
WAITS = """
import math
_free_step = Trainer._step
def _step(self, source):
    due = [math.ceil(part * self.recipe.total_steps) for part in (1 / 3, 2 / 3)]
    due = next((step + 5 for step in due if step > self._first_step and "/preempted/" in self._folder.url), None)
    while self.progress.step == due and self.flag.cause is None:
        self.watchdog.progress(self.progress.step, "waiting for data")
        time.sleep(0.01)
    _free_step(self, source)
Trainer._step = _step
"""


def test_a_preempted_run_equals_an_uninterrupted_one_and_a_difference_is_detected(
    tmp_path: Path, slurm: SlurmCluster
) -> None:
    rsb = RsbCluster(tmp_path, slurm.env)
    rsb.change_trainer(WAITS)
    (tmp_path / "here.toml").write_text(find("jobs", "slurm-cpu").read_text().replace("nodes = 1 ", "nodes = 2 "))
    shown = rsb(*as_printed("rsb-cluster selftest resume --job ./here.toml"))
    lines = [line.split()[0] for line in shown.splitlines()[1:]]
    assert lines == ["ok"] * 6, shown
    assert "2 in 3 attempts" in shown and "bit-equal" in shown
    assert "is not empty" in rsb.error("selftest", "resume", "--job", "slurm-cpu")

    uninterrupted, preempted = (Run(r.store, r.run_id) for r in _runs(tmp_path / "selftest"))
    assert all(outcome.passed for outcome in selftest.compare(uninterrupted, preempted))
    for harm, what in HARMS.items():
        copy = tmp_path / what.split()[0]
        shutil.copytree(preempted.url, copy)
        harm(copy)
        wrong = [f.what for f in selftest.compare(uninterrupted, Run.at(tmp_path, copy.name)) if not f.passed]
        assert wrong == [what]


def _runs(folder: Path) -> list[Run]:
    return [Run.at(folder / name, next((folder / name).glob("digits-*")).name) for name in ("unbroken", "preempted")]


def _edit(path: Path, line: int, **update: object) -> None:
    lines = path.read_text().splitlines()
    lines[line] = json.dumps(json.loads(lines[line]) | update)
    path.write_text("\n".join(lines) + "\n")


def _other_pixels(run: Path) -> None:
    _edit(run / "samples" / "0002-rank00001.jsonl", 7, pixels=0)


def _other_loss(run: Path) -> None:
    _edit(run / "metrics" / "0003-000000.jsonl", 3, loss=1.5)


def _other_weights(run: Path) -> None:
    manifest = max(run.glob("checkpoints/step-*/manifest.json"))
    value = json.loads(manifest.read_text())
    value["files"]["ema.safetensors"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(value))


def _gap(run: Path) -> None:
    path = run / "attempts" / "0001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"end_step": 3}))


HARMS = {
    _other_pixels: "samples, pixels and mix of each micro-batch",
    _other_loss: "metric rows",
    _other_weights: "weights, optimizer state, BatchNorm, EMA",
    _gap: "resumed at the next step",
}
