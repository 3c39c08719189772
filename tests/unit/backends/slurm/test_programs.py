"""No variable of a user's shell reaches Slurm's programs but those that a site sets for its users."""

import os
import subprocess

import pytest

from rsb_cluster.backends.slurm import programs
from rsb_cluster.errors import SubmitError

KEPT = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CONF_SERVER": "ctl", "SLURM_JWT": "token", "SLURM_CLUSTERS": "big"}
# Of a shell inside an allocation, of a profile, and of a job of this package.
GONE = {
    "SLURM_JOB_ID": "42", "SLURM_MEM_PER_CPU": "2000", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_RESTART_COUNT": "9", "SLURM_EXPORT_ENV": "NONE", "SBATCH_EXPORT": "NONE", "SBATCH_NO_REQUEUE": "1",
    "SBATCH_TIMELIMIT": "1", "SBATCH_ARRAY_INX": "0-3", "SBATCH_CLUSTERS": "other", "SQUEUE_STATES": "PENDING",
    "SQUEUE_PARTITION": "x", "SQUEUE_USERS": "root", "SCANCEL_USER": "me", "SACCT_FORMAT": "State",
    "SALLOC_PARTITION": "x", "SRUN_CPUS_PER_TASK": "7", "SCONTROL_ALL": "1", "SUBMITIT_EXECUTOR": "local",
    "RSB_LOCAL_RESTART": "5",
}  # fmt: skip


@pytest.fixture(autouse=True)
def shell(monkeypatch):
    for name, value in {**KEPT, **GONE, "SLURMISH": "kept", "HOME": "/home/me"}.items():
        monkeypatch.setenv(name, value)


def test_programs_see_where_slurm_is_and_nothing_else_of_a_shell_s_job():
    seen = programs.environment()
    assert {name: seen.get(name) for name in KEPT} == KEPT
    assert not GONE.keys() & seen.keys()
    assert (seen["SLURMISH"], seen["HOME"], seen["PATH"]) == ("kept", "/home/me", os.environ["PATH"])


@pytest.mark.parametrize(
    ("variable", "option"),
    [
        ("SBATCH_ACCOUNT", "account"), ("SBATCH_PARTITION", "partition"), ("SBATCH_QOS", "qos"),
        ("SBATCH_RESERVATION", "reservation"), ("SLURM_CLUSTERS", "clusters"),
    ],
)  # fmt: skip
def test_a_site_s_default_holds_where_the_job_says_nothing(monkeypatch, variable, option):
    """sbatch would prefer the variable to an option in the script."""
    monkeypatch.delenv("SLURM_CLUSTERS")
    monkeypatch.setenv(variable, "site")
    assert programs.environment()[variable] == "site"
    assert programs.site_defaults(()) == {variable: "site"}
    assert variable not in programs.environment((option,))
    assert programs.ignored_variables((option,)).get(variable) == ("site" if variable.startswith("SBATCH_") else None)


def test_variables_that_would_have_changed_the_job_are_named():
    assert list(programs.ignored_variables(())) == [
        "SBATCH_ARRAY_INX", "SBATCH_CLUSTERS", "SBATCH_EXPORT", "SBATCH_NO_REQUEUE", "SBATCH_TIMELIMIT",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("7\n", ("7", "")),
        ("1234;gpu-cluster\n", ("1234", "gpu-cluster")),
        ("Welcome! You have used 1 of 400 hours.\n1\nsbatch: ok\n  7  \nThank you.\n", ("7", "")),
        ("12\nCharged to 3 accounts\n", ("12", "")),
        ("Submitted batch job 7\n", ("7", "")),
        ("Submitted batch job 7\nLeft:\n120\n", ("7", "")),
        ("7;big\n120\n", ("7", "big")),
        ("\x1b[1;32mSubmitted batch job 12 on cluster big\x1b[0m\nexit code:\n0\n", ("12", "big")),
        ("\x1b[32m7\x1b[0m\n", ("7", "")),
    ],
)
def test_the_job_id_is_the_last_line_that_is_one(answer, expected):
    assert programs.parse_job_ids(answer)[0] == expected


@pytest.mark.parametrize("answer", ["", "Submitted 7 jobs\n", "-7", "0", "7;a b"])
def test_an_answer_without_a_job_id_is_an_error(answer):
    with pytest.raises(SubmitError, match="did not say which job it queued"):
        programs.parse_job_ids(answer)


def test_output_that_is_no_utf8_and_input_that_is_awaited_do_no_harm(slurm_programs):
    path = slurm_programs.folder / "squeue"
    path.write_text("#!/bin/bash\nread -r line; printf 'caf\\351 %s' \"$line\"\n")
    path.chmod(0o755)
    assert programs.output("squeue") == "caf\ufffd "


def test_a_program_that_fails_or_is_missing_is_an_error_with_what_it_said(slurm_programs):
    slurm_programs.write("scancel", "partly\n", errors="scancel: error: no\n", code=1)
    with pytest.raises(SubmitError, match="scancel 7 failed: scancel: error: no"):
        programs.output("scancel", "7")
    with pytest.raises(SubmitError, match="cannot run sbogus"):
        programs.run("sbogus")
    assert isinstance(programs.run("scancel"), subprocess.CompletedProcess)
