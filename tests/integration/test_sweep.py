"""A sweep on a real Slurm: two resource classes, a preemption, a failure, and the retry that finishes it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rsb_cluster.runs.run import Run
from rsb_cluster.runs.sweep import read_sweep
from tests.command import RsbCluster
from tests.equality import assert_bit_equal, final_state, rows_of, samples_of
from tests.integration.conftest import MODELS, FinishedSweep
from tests.servers.slurm import SlurmCluster

pytestmark = pytest.mark.slurm


def submissions(sweep: FinishedSweep) -> dict[str, list[str]]:
    found = {}
    for run in sweep.sent["runs"]:
        found[run["run_id"]] = [s.job_id for s in Run.at(sweep.runs, run["run_id"]).submissions()]
    return found


def test_a_sweep_is_one_array_for_each_resource_class(finished_sweep: FinishedSweep) -> None:
    arrays = finished_sweep.sent["arrays"]
    assert [array["job"]["cpus_per_task"] for array in arrays] == [2, 1]
    first = {run_id: jobs[0] for run_id, jobs in submissions(finished_sweep).items()}
    for array, model, size in zip(arrays, MODELS, (3, 2), strict=True):
        assert len(array["runs"]) == size and all(f"-{model}-" in run_id for run_id in array["runs"])
        assert f"#SBATCH --array=0-{size - 1}%{min(4, size)}\n" in array["script"]
        parents = {first[run_id].split("_")[0] for run_id in array["runs"]}
        assert len(parents) == 1
    assert Counter(run["recipe"] for run in finished_sweep.sent["runs"]) == {"low": 4, "high": 1}


def test_a_queued_sweep_is_not_submitted_a_second_time(finished_sweep: FinishedSweep) -> None:
    again = finished_sweep.sent_again
    assert again["sweep_id"] == finished_sweep.sweep_id and again["arrays"] == []
    assert {run["state"] for run in again["runs"]} == {"already submitted"}


def test_status_shows_what_happened_to_each_run(finished_sweep: FinishedSweep) -> None:
    found = {status["run_id"]: status for status in finished_sweep.status_before}
    assert list(found) == [run["run_id"] for run in finished_sweep.sent["runs"]]
    failed = found.pop(finished_sweep.failed)
    assert failed["state"] == "failed" and "crashed without a new checkpoint" in failed["cause"]
    assert failed["top1"] is None
    assert {status["state"] for status in found.values()} == {"finished"}
    preempted = found.pop(finished_sweep.preempted)
    assert preempted["attempt"] == 2 and preempted["cause"] == ""
    for status in found.values():
        assert (status["attempt"], status["cause"], status["step"], status["epoch"]) == (1, "", 44, 2)
        assert status["images_per_s"] > 0 and 0 <= status["top1"] <= 100


def test_retry_resubmits_the_failed_run_with_its_resources(finished_sweep: FinishedSweep) -> None:
    assert finished_sweep.retried.startswith(f"{finished_sweep.failed}: resubmitted as job ")
    assert finished_sweep.retried.endswith(", starts from the beginning\n") and finished_sweep.retried.count("\n") == 1
    for run_id, jobs in submissions(finished_sweep).items():
        assert len(jobs) == (2 if run_id == finished_sweep.failed else 1)
    first, second = Run.at(finished_sweep.runs, finished_sweep.failed).submissions()
    assert first.job == second.job and second.job["cpus_per_task"] == 2


def test_in_the_end_all_runs_have_finished_and_none_is_submitted(finished_sweep: FinishedSweep) -> None:
    rsb, sweep_id = finished_sweep.rsb, finished_sweep.sweep_id
    assert {status["state"] for status in rsb.json("status", sweep_id, "--json")} == {"finished"}
    assert "nothing to retry" in rsb.run("retry", sweep_id).stderr
    assert "all 5 runs are neither queued nor running" in rsb.error("cancel", sweep_id, code=1)
    assert [m.run_id for m in read_sweep(str(finished_sweep.runs), "resnet-depths").members] == list(
        submissions(finished_sweep)
    )


def test_the_files_of_a_sweep_are_plain_data(finished_sweep: FinishedSweep) -> None:
    record = json.loads((finished_sweep.runs / "sweeps" / f"{finished_sweep.sweep_id}.json").read_text())
    assert record["file"].endswith("resnet-depths.toml") and len(record["members"]) == 5


def test_collect_and_report_are_right_about_each_run_of_a_sweep(finished_sweep: FinishedSweep) -> None:
    rsb, one = finished_sweep.rsb, finished_sweep.sweep_id
    found = rsb.json("collect", one, "--format", "json", "--runs", str(finished_sweep.before))
    assert [(run["run_id"], run["state"]) for run in found["unfinished"]] == [(finished_sweep.failed, "failed")]
    of = {(group["recipe"], group["model"]): group for group in found["groups"]}
    assert of.keys() == {("low", MODELS[0]), ("low", MODELS[1]), ("high", MODELS[0])}
    for (recipe, _), group in of.items():
        assert (group["n"], group["unfinished"]) == ((2, []) if recipe == "low" else (0, [finished_sweep.failed]))
        for run in group["runs"]:
            preempted = run["run_id"] == finished_sweep.preempted
            assert (run["attempts"], run["preemptions"]) == ((2, 1) if preempted else (1, 0))
            assert 0 < run["goodput"] <= 1 and run["rank_hours"] > 0 == run["steps_repeated"]
    by_itself = finished_sweep.before / "sweeps" / one  # sweep --collect
    published = json.loads((by_itself / "collect.json").read_text())["unfinished"]
    assert [(run["run_id"], run["state"]) for run in published] == [(finished_sweep.failed, "failed")]
    after = rsb.json("collect", one, "--format", "json")
    assert after["unfinished"] == [] and sum(group["n"] for group in after["groups"]) == 5
    rsb.run("report", one, "-o", "report.html")
    page = (rsb.cwd / "report.html").read_text()
    assert all(member["run_id"] in page for member in finished_sweep.sent["runs"])


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_the_smoke_sweep_with_decoding_processes_is_the_one_without_to_the_bit(
    tmp_path: Path, slurm: SlurmCluster, digits: Path
) -> None:
    """Some five minutes on two cores."""
    swept: list[list[Run]] = []
    for processes in (0, 1):
        rsb = RsbCluster(tmp_path / f"{processes}", slurm.env)
        (rsb.cwd / "data").mkdir(parents=True)
        (rsb.cwd / "data" / "digits").symlink_to(digits)
        options = ("loader_workers=1", f"loader_processes={processes}", "log_samples=true", "log_every_steps=1")
        sets = [word for option in options for word in ("--set", f"job.{option}")]
        sweep_id = rsb("sweep", "smoke", "--job", "slurm-cpu", *sets).strip()
        rsb("status", sweep_id, "--watch", timeout=2400)
        members = read_sweep(str(rsb.cwd / "runs"), sweep_id).members
        swept.append([Run.at(rsb.cwd / "runs", member.run_id) for member in members])
    assert len(swept[0]) == len(swept[1]) == 8
    for threads, process in zip(*swept, strict=True):
        assert threads.run_id == process.run_id and threads.result() is not None
        assert samples_of(threads) == samples_of(process) != {}
        assert rows_of(threads) == rows_of(process)
        assert_bit_equal(final_state(threads), final_state(process))
