"""A run that is submitted again while it is queued or running."""

from pathlib import Path

import pytest

from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.config.sweep_file import Point, expand
from rsb_cluster.errors import ConfigError, SubmitError
from rsb_cluster.runs.run import Run, Submission
from rsb_cluster.submission.plan_runs import plan_runs
from rsb_cluster.submission.planned_run import PlannedRun
from rsb_cluster.submission.resubmit import cancel_replaced, check_replaced
from tests.unit.bundled import load_job
from tests.unit.sweeps import file, make

pytestmark = pytest.mark.usefixtures("here")

# A queue in a file, which scancel changes as Slurm's does; what starts meanwhile is named in another one.
SCANCEL = """\
#!/bin/bash
echo "$@" >>"$OUT/scancel"
while read -r job; do sed -i "s/^$job|\\(.*\\)|PENDING/$job|\\1|RUNNING/" "$OUT/queue"; done <"$OUT/starting"
case "$1" in --state=PENDING) only='|PENDING' ;; esac
for job in "$@"; do sed -i "/^$job|.*$only/d" "$OUT/queue"; done
"""


@pytest.fixture
def queue(slurm_programs, monkeypatch):
    folder: Path = slurm_programs.folder
    monkeypatch.setenv("OUT", str(folder))
    (folder / "squeue").write_text('#!/bin/bash\ncat "$OUT/queue"\n')
    (folder / "scancel").write_text(SCANCEL)
    for name in ("squeue", "scancel"):
        (folder / name).chmod(0o755)
    (folder / "starting").write_text("")
    (folder / "queue").write_text("7|7|PENDING|None|me|0|x|(null)\n8|8|RUNNING|None|me|0|x|(null)\n")
    slurm_programs.write("scontrol", "MaxArraySize = 1001\n")
    slurm_programs.write("sbatch")
    return folder


def points(*job: str) -> list[Point]:
    grid = {"recipes": ["digits"], "models": ["test_resnet"], "seeds": 2}
    return expand(file(grid=[grid]), job="slurm-cpu", job_overrides=parse_overrides(job))


def plan(runs: Path, data: Path, *job: str, resubmit: bool = False) -> tuple[list[PlannedRun], list[str]]:
    return plan_runs(points(*job), str(runs), str(data), dry_run=False, resubmit=resubmit)


def submit(run: Run, job_id: str, data: Path, *job: str) -> None:
    fields = load_job("slurm-cpu", *job).model_dump(mode="json")
    run.add_submission(Submission(backend="slurm", job_id=job_id, folder="/f", shape="", time=1, job=fields,
                                  data=str(data)))  # fmt: skip


@pytest.fixture
def sent(tmp_path, digits, queue) -> list[Run]:
    """Two runs, of which one is queued as job 7, and one is running as job 8."""
    found = [make(planned) for planned in plan(tmp_path, digits)[0]]
    for run, job_id in zip(found, ("7", "8"), strict=True):
        submit(run, job_id, digits)
    return found


def test_what_a_queued_and_a_running_job_keep_is_said(tmp_path, digits, sent):
    assert plan(tmp_path, digits)[1] == [], "the same options"
    runs, notes = plan(tmp_path, digits, "time_min=99", "slurm.partition=spot", "share=group")
    assert [planned.state for planned in runs] == ["already submitted"] * 2
    kept = "time_min = 120 (here 99), slurm.partition = unset (here 'spot'). Taken at once: share = 'group'"
    assert notes == [
        f"{sent[0].run_id} is queued as job 7, which keeps {kept}. --resubmit cancels the queued job and submits it "
        "anew.",
        f"{sent[1].run_id} is running as job 8, which keeps {kept}. 'rsb-cluster cancel {sent[1].run_id}' saves and "
        "stops it; then submit it again.",
    ]


def test_a_job_of_an_earlier_version_without_fields_is_no_reason_for_a_note(tmp_path, digits, queue):
    run = make(plan(tmp_path, digits)[0][0])
    run.add_submission(Submission(backend="slurm", job_id="7", folder="/f", shape="", time=1))
    assert plan(tmp_path, digits, "time_min=99")[1] == []


def test_resubmit_replaces_the_queued_job_and_not_the_running_one(tmp_path, digits, sent, queue):
    runs, notes = plan(tmp_path, digits, "time_min=99", resubmit=True)
    assert [planned.state for planned in runs] == ["queued anew", "already submitted"]
    assert [planned.should_submit for planned in runs] == [True, False]
    assert notes == [
        f"{sent[1].run_id} is running as job 8; --resubmit replaces only queued jobs. 'rsb-cluster cancel "
        f"{sent[1].run_id}' saves and stops it; then submit it again."
    ]
    check_replaced(runs, notes)
    with pytest.raises(ConfigError, match="is running as job 8; --resubmit replaces only queued jobs"):
        check_replaced(runs[1:], notes)
    cancel_replaced(runs)
    assert (queue / "queue").read_text().startswith("8|8|RUNNING")
    assert sent[0].is_cancelled("7") and not sent[1].cancelled()


def test_a_job_that_starts_at_that_moment_is_left_alone(tmp_path, digits, sent, queue):
    runs, _ = plan(tmp_path, digits, "time_min=99", resubmit=True)
    (queue / "starting").write_text("7\n")
    with pytest.raises(SubmitError, match=rf"job 7 \({sent[0].run_id}\): it has started meanwhile\nNothing was submit"):
        cancel_replaced(runs)
    assert "7|7|RUNNING" in (queue / "queue").read_text() and not sent[0].cancelled()


def test_a_job_that_slurm_would_refuse_replaces_none(tmp_path, digits, sent, slurm_programs):
    runs, notes = plan(tmp_path, digits, "slurm.partition=none", resubmit=True)
    slurm_programs.write("sbatch", errors="sbatch: error: invalid partition specified: none\n", code=1)
    with pytest.raises(SubmitError, match=r"invalid partition specified: none\. .* The queued jobs were left alone"):
        check_replaced(runs, notes)
