"""The back end slurm: what it says before a submit, and what may go wrong with one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from submitit.core.utils import DelayedSubmission

from rsb_cluster import backends
from rsb_cluster.backends import local
from rsb_cluster.backends.slurm import backend, programs
from rsb_cluster.backends.slurm.backend import Slurm
from rsb_cluster.backends.slurm.queue import this_user
from rsb_cluster.config.sweep_file import Grid, SweepFile
from rsb_cluster.errors import ConfigError, RefusedError, SubmitError
from rsb_cluster.node.task import Task
from rsb_cluster.runs.run import Submission
from rsb_cluster.submission.plan import Plan, plan
from rsb_cluster.submission.request import Request
from rsb_cluster.submission.site import Site
from tests.command import ROOT
from tests.unit.bundled import load_job


def submission(job_id: str, **fields: str) -> Submission:
    return Submission(backend="slurm", job_id=job_id, folder="/f", shape="", time=1e9, **fields)


def test_a_missing_sbatch_is_reported_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SubmitError, match="there is no 'sbatch' on this machine"):
        Slurm().check_available(load_job("slurm"))
    monkeypatch.setattr(local, "GPUS", tmp_path)
    assert backends.default_job(1) == "local"
    (tmp_path / "0000:01:00.0").mkdir()  # as the driver's folder has one for each GPU
    assert backends.default_job(1) == "local-gpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert backends.default_job(1) == "local"
    assert backends.default_job(2) == "slurm"


def test_a_machine_without_slurm_is_reported(rsb, digits):
    rsb.env["PATH"] = "/nonexistent"
    said = rsb.error("submit", "--recipe", "digits", "--job", "slurm-cpu", "--data", str(digits), code=1)
    assert "there is no 'sbatch' on this machine. Submit from a login node of the cluster, or use --job local." in said
    assert list(rsb.cwd.iterdir()) == []


def test_a_job_that_slurm_accepted_before_the_disk_was_full_is_to_be_checked(tmp_path, monkeypatch):
    folder = tmp_path / "submissions"
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f"#!/bin/bash\nrm -r {folder}\necho 7\n")
    sbatch.chmod(0o755)
    (tmp_path / "bin" / "srun").symlink_to(sbatch)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with pytest.raises(SubmitError, match=r"Slurm may have accepted the job all the same: .*'squeue --me --name=a1-x'"):
        Slurm().submit(load_job("slurm"), [Task("/r", "r", {})], folder, "a1-x")


def test_when_a_job_would_start_is_a_time_for_people(slurm_programs):
    slurm_programs.write("sbatch", errors="sbatch: Job 1 to start at 2026-12-01T01:26:22 using 2 processors\n")
    assert Slurm().test_only(load_job("slurm-cpu")) == "Job 1 to start at 2026-12-01T01:26:22 using 2 processors"
    assert slurm_programs.environment("sbatch")["SLURM_TIME_FORMAT"] == "standard"


def test_the_script_that_sbatch_tests_is_utf8_in_any_locale(slurm_programs):
    path = slurm_programs.folder / "sbatch"
    path.write_text('#!/bin/bash\ncat "$2" >&2; echo >&2\necho "sbatch: Job 1 to start at noon" >&2\n')
    path.chmod(0o755)
    code = (
        "from tests.unit.bundled import load_job; from rsb_cluster.backends.slurm.backend import Slurm\n"
        "print(Slurm().test_only(load_job('slurm', 'setup=[\"echo caf\\u00e9\"]')))"
    )
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "Job 1 to start at noon\n"), done.stderr


PLUGIN = "sbatch: error: You must charge an account, see https://hpc.example/accounts.\n"


def test_what_a_site_s_plugin_says_is_part_of_why_a_job_is_refused(slurm_programs, tmp_path):
    """Slurm itself says only "Unspecified error", and a wrapper may have the last word."""
    failed = "sbatch: error: Batch job submission failed: Unspecified error\nPlease contact support@hpc.example\n"
    slurm_programs.write("sbatch", errors=f"\x1b[31m{PLUGIN}\x1b[0m{failed}", code=1)
    why = "You must charge an account, see https://hpc.example/accounts; Batch job submission failed: Unspecified error"
    with pytest.raises(SubmitError, match=f"sbatch would refuse it: {why}; Please contact"):
        Slurm().test_only(load_job("slurm-cpu"))
    with pytest.raises(RefusedError, match=f"sbatch refused the job: {why}; Please contact"):
        Slurm().submit(load_job("slurm"), [Task("/r", "r", {})], tmp_path / "submissions", "a1")
    start = "sbatch: Job 1 to start at 2026-12-01T01:26:22 using 2 processors\n"
    slurm_programs.write("sbatch", errors=f"{PLUGIN}{start}See you.\n")
    assert Slurm().test_only(load_job("slurm-cpu")) == start.removeprefix("sbatch: ").strip()


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\nSee the wiki.\n", 1),
        ("sbatch: error: Slurm controller not responding, sleeping and retrying.\nsbatch: error: x\n", 1),
        ("sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received\n", 1),
        ("Terminated\n", 143),
    ],
)
def test_a_job_that_slurm_may_have_taken_is_not_called_refused(slurm_programs, tmp_path, errors, code):
    slurm_programs.write("sbatch", errors=errors, code=code)
    job, tasks = load_job("slurm", "slurm.clusters=big"), [Task("/r", "r", {})]
    said = r"(?s)had no answer: .*'squeue --clusters=big --me --name=a1', and cancel it"
    with pytest.raises(SubmitError, match=said) as raised:
        Slurm().submit(job, tasks, tmp_path / "submissions", "a1")
    assert not isinstance(raised.value, RefusedError)


def test_an_sbatch_that_does_not_end_may_have_queued_the_job(slurm_programs, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "SBATCH_S", 0.5)
    path = slurm_programs.folder / "sbatch"
    path.write_text("#!/bin/bash\nexec sleep 60\n")
    path.chmod(0o755)
    with pytest.raises(SubmitError, match=r"did not answer within 0.5 s.*\nSlurm may have accepted the job"):
        Slurm().submit(load_job("slurm"), [Task("/r", "r", {})], tmp_path / "submissions", "a1")


def test_what_a_shell_adds_to_a_job_is_said(monkeypatch):
    job = load_job("slurm", "slurm.partition=gpu")
    for name, value in {
        "SBATCH_ACCOUNT": "vision", "SBATCH_PARTITION": "debug", "SBATCH_TIMELIMIT": "10", "SLURM_JOB_ID": "42",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert Slurm().notes(job) == [
        "SBATCH_ACCOUNT=vision of this shell applies, as the job sets none",
        "ignored in this shell, as the job file decides: SBATCH_PARTITION=debug SBATCH_TIMELIMIT=10",
        "this shell is inside job 42: its SLURM_* variables are not passed on",
    ]


def test_a_submission_knows_what_its_job_is_known_by(slurm_programs, tmp_path, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "debug")
    slurm_programs.write("sbatch", "Dear user,\n1 job is enough.\n1\n12;big\ngood luck\n")
    folder = tmp_path / "submissions" / "a1"
    tasks = [Task("/r", "r", {}), Task("/s", "s", {}, "/data")]
    sent = Slurm().submit(load_job("slurm", "slurm.partition=gpu"), tasks, folder, "a1-sweep")
    assert [(s.job_id, s.cluster, s.user, s.name, s.data) for s in sent] == [
        ("12_0", "big", this_user(), "a1-sweep", ""), ("12_1", "big", this_user(), "a1-sweep", "/data"),
    ]  # fmt: skip
    assert slurm_programs.calls("sbatch") == [["--parsable", str(folder / "job.sh")]]
    assert "SBATCH_PARTITION" not in slurm_programs.environment("sbatch")
    pickles = [folder / f"12_{i}_submitted.pkl" for i in (0, 1)]
    assert [DelayedSubmission.load(path).function for path in pickles] == tasks


@pytest.mark.parametrize(
    ("shell", "option", "expected"), [("big", "", "big"), ("small", "big", "big"), ("", "a,b", ""), ("all", "", "")]
)
def test_a_job_is_on_the_cluster_that_was_named_where_a_wrapper_prints_only_its_number(
    slurm_programs, tmp_path, monkeypatch, shell, option, expected
):
    monkeypatch.setenv("SLURM_CLUSTERS", shell)
    slurm_programs.write("sbatch", "12\n")
    job = load_job("slurm", *[f"slurm.clusters={option}"] * bool(option))
    (sent,) = Slurm().submit(job, [Task("/r", "r", {})], tmp_path / "submissions", "a1")
    assert sent.cluster == expected
    assert ("SLURM_CLUSTERS" in slurm_programs.environment("sbatch")) == (not option)


def test_of_several_numbers_the_one_with_our_script_is_the_job(slurm_programs, tmp_path):
    """As a wrapper prints how many hours are left."""
    slurm_programs.write("sbatch", "Jobs before:\n3\n12\nHours left:\n120\n")
    for answer, code, expected in (
        (f"12|{tmp_path}/a1/job.sh\n120|/other/job.sh\n", 0, "12"),
        ("", 0, "120"),
        ("", 1, "120"),
    ):
        slurm_programs.write("squeue", answer, code=code)
        (sent,) = Slurm().submit(load_job("slurm"), [Task("/r", "r", {})], tmp_path / "a1", "a1")
        assert sent.job_id == expected


def test_an_unexpected_answer_of_sbatch_is_a_sentence(slurm_programs, tmp_path):
    slurm_programs.write("sbatch", "queued, somewhere\n")
    with pytest.raises(SubmitError, match=r"(?s)did not say which job.*'squeue --me --name=a1'"):
        Slurm().submit(load_job("slurm"), [Task("/r", "r", {})], tmp_path / "submissions", "a1")


def test_a_slow_controller_is_waited_for_where_scancel_does_not_repeat_itself(slurm_programs, monkeypatch):
    """For a task of an array it does, after 5 s, and is killed before."""
    monkeypatch.setattr(backend, "SCANCEL_S", 0.2)
    slurm_programs.write("squeue")
    path = slurm_programs.folder / "scancel"
    path.write_text(f'#!/bin/bash\nsleep 1\necho "$2" >>{slurm_programs.folder}/sent\n')
    path.chmod(0o755)
    Slurm().preempt([submission("7"), submission("8_1")])
    assert (slurm_programs.folder / "sent").read_text() == "7\n"
    monkeypatch.setattr(programs, "TIMEOUT_S", 0.2)
    with pytest.raises(SubmitError, match=r"scancel did not answer within 0\.2 s"):
        Slurm().preempt([submission("7")])


def test_failed_hosts_are_excluded_by_slurm_s_names(slurm_programs):
    slurm_programs.write("sinfo", "gpu1|gpu1\ngpu1|gpu1\n10-0-0-7.vpc|worker-7\nCLUSTER: big\n")
    job = Slurm().exclude_hosts(load_job("slurm", "slurm.exclude=n9"), ["gpu1.cluster.example", "10-0-0-7", "other"])
    assert job.slurm["exclude"] == "n9,gpu1,worker-7,other"
    slurm_programs.write("sinfo", errors="no\n", code=1)
    assert Slurm().exclude_hosts(load_job("slurm"), ["n1", "n2.x"]).slurm["exclude"] == "n1,n2.x"


def test_jobs_are_cancelled_on_their_clusters(slurm_programs):
    slurm_programs.write("scancel")
    assert Slurm().cancel([submission("7"), submission("8_1", cluster="big")]) == ["", ""]
    assert slurm_programs.calls("scancel") == [["7"], ["--clusters=big", "8_1"]]
    assert Slurm().cancel_command([submission("7"), submission("8_1", cluster="big")]) == (
        "scancel 7; scancel --clusters=big 8_1"
    )


def test_the_job_that_collects_waits_only_for_jobs_that_there_are(slurm_programs, tmp_path):
    slurm_programs.write("sbatch", "9\n")
    job = load_job("slurm", "slurm.account=vision", "slurm.clusters=big")
    assert Slurm().run_after(job, [submission("7_0"), submission("7_1")], ["true"], tmp_path, "collect") == "9"
    assert Slurm().run_after(job, [], ["true"], tmp_path, "collect") == "9"
    no_memory = load_job("slurm", "slurm.mem=false")
    assert Slurm().run_after(no_memory, [], ["true"], tmp_path, "collect") == "9"
    with_jobs, without, plain = slurm_programs.calls("sbatch")
    assert "--mem=4G" in with_jobs and "--mem=4G" not in plain
    assert "--dependency=afterany:7" in with_jobs and "--account=vision" in with_jobs
    assert not any(option.startswith("--dependency") for option in without) and "--clusters=big" in without


def plan_digits(digits: Path, folder: Path, *, dry_run: bool = True, **options: Any) -> Plan:
    file = SweepFile(name="one", grid=(Grid(recipes=("digits",)),))
    request = Request(data=str(digits), runs=str(folder / "runs"), **options)
    return plan(file, None, request, is_sweep=False, dry_run=dry_run)


def test_a_dry_run_refuses_what_sbatch_would(slurm_programs, tmp_path, digits):
    slurm_programs.write("scontrol", "MaxArraySize = 10\n")
    slurm_programs.write("sbatch", errors="sbatch: error: invalid partition specified: gpu\n", code=1)
    (refusal,) = plan_digits(digits, tmp_path, job="slurm-cpu", site=Site(partition="gpu")).refusals
    assert "sbatch would refuse it: invalid partition specified: gpu. Check" in str(refusal)


@pytest.fixture
def silent(slurm_programs):
    """Slurm is installed, and its controller is being restarted."""
    slurm_programs.write("sbatch", errors="no\n", code=1)
    slurm_programs.write("scontrol", errors="Unable to contact slurm controller (connect failure)\n", code=1)


def test_nothing_long_starts_on_a_login_node_because_slurm_does_not_answer(silent, tmp_path, digits):
    own_data = (("data.make", ""), ("job.gpus_per_node", 2))
    with pytest.raises(
        SubmitError, match=r"(?s)does not answer: .*connect failure.*--job local trains on this machine"
    ):
        plan_digits(digits, tmp_path, dry_run=False, overrides=own_data)
    (note,) = plan_digits(digits, tmp_path, overrides=own_data).notes
    assert note.startswith("Slurm is installed here, but does not answer")
    assert not (tmp_path / "runs").exists()


def test_a_recipe_with_small_data_of_its_own_trains_here(silent, tmp_path, digits):
    """README's first command works wherever it is typed: also where Slurm is, and whether it answers or not."""
    planned = plan_digits(digits, tmp_path)
    assert planned.runs[0].point.job.name == "local"
    assert planned.notes == ("trains on this machine; use --job slurm to submit it there",)


def test_options_of_a_site_reach_the_script(slurm_programs, tmp_path, digits):
    site = Site(partition="p", account="a", qos="q", time_min=90, gpu_type="a100")
    (array,) = plan_digits(digits, tmp_path, job="slurm", site=site, gpus_per_node=4).arrays
    for option in ("partition=p", "account=a", "qos=q", "time=90", "gpus-per-node=a100:4"):
        assert f"#SBATCH --{option}\n" in array.script


def test_options_of_slurm_are_refused_elsewhere(tmp_path, digits):
    with pytest.raises(ConfigError, match="--partition is for Slurm, and job 'local' has the back end local"):
        plan_digits(digits, tmp_path, job="local", site=Site(partition="gpu"))
    with pytest.raises(ConfigError, match="gpu_type = 'a100': back end local has no such field"):
        plan_digits(digits, tmp_path, job="local", site=Site(gpu_type="a100"))
