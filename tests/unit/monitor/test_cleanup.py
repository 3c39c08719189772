"""What may be removed of runs that have ended, on a disk and on S3, and what never."""

import os
import time
from pathlib import Path

import pytest

from rsb_cluster.monitor import cleanup
from rsb_cluster.monitor.cleanup import InUseError, carry_out, plan_delete, plan_prune
from rsb_cluster.node.processes import Process
from rsb_cluster.runs import checkpoint, sharing
from rsb_cluster.runs.checkpoint import CheckpointId
from rsb_cluster.runs.run import Attempt, Run, Submission
from rsb_cluster.storage.store import Store
from tests.unit.new_runs import make_run

SCRIPTS = "20260101-000000-digits-1"


def ended(run: Run, *causes: str, starts: tuple[int, ...] = (0, 20)) -> None:
    """Record attempts, with logs and samples of each."""
    for number, (cause, start) in enumerate(zip(causes, starts, strict=False), 1):
        run.write_attempt(
            Attempt(number=number, job_id="1", world_size=1, hosts=("h",), started=1e9, start_step=start, cause=cause)  # type: ignore[arg-type]
        )
        for name in (f"logs/{number:04d}-rank00000.log", f"samples/{number:04d}-rank00000.jsonl"):
            run.store.write_bytes(name, b"x" * 10)
    run.store.write_bytes("metrics/0001-000000.jsonl", b"")


def save(run: Run, *saved: tuple[int, int]) -> None:
    for step, attempt in saved:
        checkpoint.write(
            run.store.child("checkpoints"),
            CheckpointId(step, attempt),
            {"model": b"m" * 100},
            before_manifest=lambda: None,
        )


def submitted(run: Run, folder: Path, job_id: str = "1") -> Path:
    """Record a submit to this machine, whose process is gone unless its id says otherwise."""
    job = folder / SCRIPTS / "0"
    job.mkdir(parents=True, exist_ok=True)
    (job / f"{job_id}_0_log.out").write_text("step 1\n")
    run.add_submission(Submission(backend="local", job_id=job_id, folder=str(job), shape="", time=1e9))
    return job


@pytest.fixture
def folder(anywhere: Store) -> str:
    return anywhere.url


def checkpoints(run: Run) -> list[str]:
    return [name for name in run.store.names("checkpoints") if run.store.names(f"checkpoints/{name}")]


def test_of_a_finished_run_its_results_and_its_last_and_best_checkpoints_stay(folder, tmp_path):
    run = make_run(folder)
    ended(run, "preempted", "finished")
    save(run, (10, 1), (20, 1), (30, 2), (40, 2))
    run.store.write_json("result.json", {"best_step": 20, "attempts": 2, "epochs": 1, "steps": 40, "images_per_s": 1,
                                         "top1": 9})  # fmt: skip
    for name in ("checkpoints/damaged-step-00000005-a0001/model", "code/x.whl", "submissions/a/spec.json"):
        run.store.write_bytes(name, b"12345")
    scripts = submitted(run, tmp_path)
    plan = plan_prune([run], time.time(), [run], orphans=True)
    assert {removal.what: removal.files for removal in plan.removals} == {
        "old checkpoints": 4, "quarantined checkpoints": 1, "logs": 2, "samples": 2, "wheels": 1, "submissions": 1,
        "scripts and logs": 1,
    }  # fmt: skip
    before = sum(run.store.sizes().values())
    assert carry_out(plan) == plan.bytes == before - sum(run.store.sizes().values()) + len("step 1\n")
    assert checkpoints(run) == ["step-00000020-a0001", "step-00000040-a0002"] and not scripts.exists()
    assert not run.store.files("logs") and not run.store.files("code")
    assert run.result() and run.store.files("metrics") and len(run.submissions()) == 1 and len(run.attempts()) == 2
    assert not plan_prune([run], time.time(), [run], orphans=True).removals, "a second time nothing is left"


def test_a_run_that_failed_keeps_what_it_resumes_from_and_what_says_why(folder, tmp_path):
    run = make_run(folder)
    ended(run, "preempted", "failed")
    save(run, (10, 1), (20, 1), (30, 1), (30, 2))  # the attempt after it resumed from step 20
    run.store.write_bytes("checkpoints/step-00000040-a0002/model", b"cut off")
    scripts = submitted(run, tmp_path)
    carry_out(plan_prune([run], time.time(), [run], orphans=True))
    assert checkpoints(run) == ["step-00000010-a0001", "step-00000020-a0001", "step-00000030-a0002"]
    assert run.store.files("logs") == ["logs/0002-rank00000.log"] and scripts.exists()


def test_damaged_checkpoints_stay_where_no_other_is_left(folder):
    """The next attempt would start from step 0 without a word."""
    run = make_run(folder)
    ended(run, "failed")
    run.store.write_bytes("checkpoints/damaged-step-00000005-a0001/model", b"12345")
    assert not [r for r in plan_prune([run], time.time(), [run], orphans=True).removals if "check" in r.what]


def test_a_run_that_never_started_goes_as_a_whole_unless_it_is_just_being_submitted(folder, monkeypatch):
    run, new = make_run(folder), make_run(folder, 1)
    new.store.write_json("spec.json", new.spec().model_copy(update={"created": time.time()}).model_dump(mode="json"))
    plan = plan_prune([run, new], time.time() + 1, [run, new], orphans=True)
    assert [(removal.owner, removal.what) for removal in plan.removals] == [(run.run_id, "never started")]
    carry_out(plan)
    assert not run.store.exists() and new.exists()
    monkeypatch.setattr(cleanup, "SUBMITTING_S", -1)
    assert plan_prune([new], time.time() + 1, [new], orphans=True).removals


def test_what_a_killed_submit_has_left_goes_and_what_is_not_ours_stays(tmp_path):
    left, other = make_run(tmp_path), make_run(tmp_path, 1)
    for run in (left, other):
        run.store.delete("spec.json")
        os.utime(Path(run.url) / "recipe.json", (0, 1e9))
    other.store.write_bytes("notes.txt", b"precious")
    both = [left, other, Run.at(tmp_path, "not-there")]
    plan = plan_prune(both, time.time(), both, orphans=True)
    assert [(removal.owner, removal.what) for removal in plan.removals] == [(left.run_id, "left by a killed submit")]
    carry_out(plan)
    assert not left.store.exists() and other.store.exists("notes.txt")


def test_a_live_run_is_left_alone_by_prune_and_refused_by_delete(tmp_path):
    run = make_run(tmp_path / "runs")
    ended(run, "preempted", "")
    save(run, (10, 1))
    job = submitted(run, tmp_path, str(Process.of(os.getpid())))
    (job / "running").touch()
    plan = plan_prune([run], time.time(), [run], orphans=True)
    assert plan.removals == () and "is running (job " in plan.left_alone[run.run_id]
    with pytest.raises(InUseError, match=rf"{run.run_id} is running \(job .*cancel it first"):
        plan_delete([run], True, [run])
    (job / "running").unlink()
    plan = plan_delete([run], True, [run])
    (job / "running").touch()
    with pytest.raises(InUseError, match="submitted meanwhile"):
        carry_out(plan)
    assert run.exists() and checkpoints(run)


def test_delete_keeps_the_record_and_with_all_nothing(folder, tmp_path):
    run = make_run(folder)
    ended(run, "failed")
    save(run, (10, 1), (20, 1))
    run.store.write_bytes("init/weights", b"1")
    scripts = submitted(run, tmp_path)
    carry_out(plan_delete([run], False, [run]))
    assert {name.partition("/")[0] for name in run.store.sizes()} == {
        "spec.json", "recipe.json", "attempts", "metrics", "submissions", "init",
    }  # fmt: skip
    assert not scripts.exists() and [attempt.cause for attempt in run.attempts()] == ["failed"]
    carry_out(plan_delete([run], True, [run]))
    assert not run.store.exists()


def test_scripts_of_several_runs_go_with_the_last_of_them(tmp_path):
    runs = [make_run(tmp_path / "runs", seed) for seed in range(2)]
    for run in runs:
        ended(run, "failed")
        scripts = submitted(run, tmp_path)
    carry_out(plan_delete(runs[:1], True, runs))
    assert scripts.exists()
    carry_out(plan_delete(runs[1:], True, runs[1:]))
    assert not scripts.exists()


def test_only_old_runs_and_old_scripts_of_no_run_are_pruned(tmp_path):
    run = make_run(tmp_path / "runs")
    ended(run, "preempted", "failed")
    mine = tmp_path / "runs" / "submissions" / sharing.user_folder()
    for name, age in (("20250101-000000-a-1", 90), (SCRIPTS, 3), ("notes", 90)):
        (mine / name).mkdir(parents=True)
        os.utime(mine / name, (0, time.time() - age * 86400))
    found = plan_prune([run], 1e9 - 1, [run], orphans=True)
    assert found.removals == (), "the run is younger, and so are the scripts"
    found = plan_prune([run], time.time(), [run], orphans=True)
    assert [removal.owner for removal in found.removals if "scripts" in removal.what] == ["20250101-000000-a-1"]


def test_a_run_that_is_a_link_is_left_alone_and_what_it_leads_to_is_named(tmp_path):
    """What it leads to may be in another folder, or be a run of this one, which would go by two names."""
    elsewhere = make_run(tmp_path / "archive")
    ended(elsewhere, "failed", "failed")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(elsewhere.url)
    run = Run.at(tmp_path / "runs", "link")
    plan = plan_prune([run], time.time(), [run], orphans=True)
    assert not plan.removals and plan.left_alone == {"link": f"is a link; name the folder itself: {elsewhere.url}"}
    with pytest.raises(InUseError, match="link is a link; name the folder itself"):
        plan_delete([run], True, [run])
    assert plan_delete([elsewhere], True, [elsewhere]).removals


def test_what_only_looks_like_a_run_is_not_deleted(tmp_path):
    """Another program's folder may have a recipe.json and checkpoints."""
    run = make_run(tmp_path)
    ended(run, "failed")
    run.store.delete("spec.json")
    with pytest.raises(InUseError, match=r"is not known to be a run: .*spec\.json is missing"):
        plan_delete([run], True, [run])
    assert not plan_prune([run], time.time(), [run], orphans=True).removals


def test_whose_a_run_is_or_what_to_do_about_a_broken_one_is_said(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    ended(run, "failed")
    submitted(run, tmp_path)
    monkeypatch.setattr(Store, "is_writable", lambda store: False)
    with pytest.raises(InUseError, match=rf"{run.run_id} cannot be written: {run.url}"):
        plan_delete([run], True, [run])
    monkeypatch.setattr(cleanup, "other_owner", lambda run: "ann")
    with pytest.raises(InUseError, match=rf"{run.run_id} belongs to ann, who must do it"):
        plan_delete([run], True, [run])
    (name,) = run.store.files("submissions")
    run.store.write_bytes(name, b"{")
    with pytest.raises(InUseError, match=rf"may be queued or running; if it is not, remove {run.url} yourself: .*JSON"):
        plan_delete([run], True, [run])
