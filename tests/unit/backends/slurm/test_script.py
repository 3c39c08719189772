"""The sbatch script as it is reviewed, and the options of a job that it has."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rsb_cluster.backends.slurm.script import make_script
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError
from tests.command import ROOT
from tests.unit.bundled import load_job

GOLDEN = ROOT / "tests" / "unit" / "golden"
FOLDER = Path("/shared/submissions/20260101-000000-a1-1")


def script(job: Job, name: str = "a1-resnet50-s0-12345678", count: int = 1, folder: Path = FOLDER) -> str:
    return make_script(job, folder, name, count)


def options(text: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE)
    assert len(found) == len(dict(found)), "no option twice"
    return dict(found)


@pytest.mark.parametrize(
    ("name", "job", "count"),
    [
        ("slurm", ("slurm", "nodes=4", "slurm.partition=gpu", "setup=['module load cuda']"), 1),
        ("slurm-cpu", ("slurm-cpu", "mem_gb=1.5"), 1),
        ("slurm-array", ("slurm", "array_parallelism=2"), 3),
    ],
)
def test_the_script_is_the_one_that_was_reviewed(name, job, count):
    text = script(load_job(*job), count=count).replace(sys.executable, "/venv/bin/python") + "\n"
    assert text == (GOLDEN / f"sbatch-{name}.sh").read_text()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("sbatch-*.sh")), ids=lambda path: path.stem)
def test_the_reviewed_scripts_are_valid_shell(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_array_has_one_task_per_run():
    found = options(script(load_job("slurm"), count=3))
    assert found["array"] == "0-2%3"
    assert "%A_%a" in found["output"]
    assert "array" not in options(script(load_job("slurm"), count=1))
    assert options(script(load_job("slurm", "array_parallelism=2"), count=5))["array"] == "0-4%2"


def test_options_of_the_site_pass_through():
    job = load_job(
        "slurm", "slurm.partition=gpu", "slurm.account=vision lab", "slurm.exclusive=true", "slurm.mail-type=END",
        "slurm.gres_flags=enforce-binding", "slurm.licenses=a'b",
    )  # fmt: skip
    found = options(script(job))
    assert found["partition"] == "gpu"
    assert found["account"] == "'vision lab'"
    assert found["exclusive"] == ""
    assert found["mail-type"] == "END"
    assert found["gres-flags"] == "enforce-binding"
    assert found["licenses"] == "'a'\"'\"'b'"
    assert found["requeue"] == ""
    assert found["gpus-per-node"] == "8"


def test_a_job_may_start_on_fewer_nodes():
    job = load_job("slurm", "min_nodes=2", "nodes=4")
    assert options(script(job))["nodes"] == "2-4"
    assert job.shape == "2-4 nodes × 8 GPUs"
    assert options(script(load_job("slurm", "min_nodes=4", "nodes=4")))["nodes"] == "4"


def test_a_stopped_process_does_not_block_the_job():
    assert re.search(r"^srun .*--wait=90 ", script(load_job("slurm")), re.MULTILINE)


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("nodes", "Set the job's own field 'nodes' instead."),
        ("ntasks_per_node", "Set the job's own field 'tasks_per_node' instead."),
        ("ntasks-per-node", "Set the job's own field 'tasks_per_node' instead."),
        ("ntasks", "Set the job's own field 'tasks_per_node' instead."),
        ("time", "Set the job's own field 'time_min' instead."),
        ("signal", "Set the job's own field 'signal_delay_s' instead."),
        ("array", "Set the job's own field 'array_parallelism' instead."),
        ("open-mode", "rsb-cluster sets it."),
        ("job_name", "rsb-cluster sets it."),
        ("requeue", "rsb-cluster sets it."),
        ("no_requeue", "Set the job's own field 'max_preemptions' instead."),
    ],
)
def test_an_option_that_the_job_sets_is_refused(option, hint):
    with pytest.raises(ConfigError) as caught:
        script(load_job("slurm", f"slurm.{option}=1"))
    assert str(caught.value) == f"job 'slurm': slurm.{option.replace('_', '-')} cannot be set. {hint}"


def test_a_folder_whose_name_sbatch_would_change_is_refused():
    with pytest.raises(ConfigError, match=r"sbatch drops a '\\' in a path. Use other --runs, or"):
        script(load_job("slurm"), folder=Path("/runs\\1/x"))


@pytest.mark.parametrize(("option", "name"), [("p", ": slurm.partition"), ("t", ": slurm.time"), ("z", "")])
def test_a_short_option_is_refused(option, name):
    """It would be written as '--t=1', which sbatch takes for the beginning of another option."""
    with pytest.raises(ConfigError) as caught:
        script(load_job("slurm", f"slurm.{option}=1"))
    assert str(caught.value) == f"job 'slurm': slurm.{option} is a short option. Use the long name{name}."


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (("gpu_type=a100",), {"gpus-per-node": "a100:8"}),
        (("slurm.gres=gpu:v100:8",), {"gres": "gpu:v100:8"}),
        (("slurm.gres=false", "slurm.mem=false"), {}),
        (("slurm.gpus=16",), {"gpus": "16"}),
        (("slurm.gpus_per_task=1",), {"gpus-per-task": "1"}),
        (("slurm.mem=0",), {"mem": "0", "gpus-per-node": "8"}),
        (("slurm.mem-per-gpu=60G",), {"mem-per-gpu": "60G", "gpus-per-node": "8"}),
        (("slurm.exclusive=false", "slurm.constraint='h100&ib'"), {"constraint": "'h100&ib'", "gpus-per-node": "8"}),
        (("slurm.exclusive=user", "mem_gb=8"), {"exclusive": "user", "mem": "8192MB", "gpus-per-node": "8"}),
    ],
)
def test_a_site_may_want_gpus_and_memory_requested_in_its_own_way(assignments, expected):
    found = options(script(load_job("slurm", *assignments)))
    names = ("gpus-per-node", "gres", "gpus", "gpus-per-task", "mem", "mem-per-gpu", "exclusive", "constraint")
    assert {name: found[name] for name in names if name in found} == expected


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("mem_gb=8", "slurm.mem-per-cpu=2G"), "mem_gb and slurm.mem-per-cpu contradict each other"),
        (("slurm.mem=0", "slurm.mem_per_gpu=2G"), "slurm.mem and slurm.mem-per-gpu contradict each other"),
        (("gpu_type=a100", "slurm.gres=gpu:8"), "gpu_type and slurm.gres both request GPUs"),
    ],
)
def test_what_contradicts_itself_is_refused(assignments, message):
    with pytest.raises(ConfigError, match=message):
        script(load_job("slurm", *assignments))


def test_a_container_is_one_of_the_ranks_and_not_of_the_script():
    """Pyxis' options for sbatch would run the script in the container, where there is no srun."""
    text = script(load_job("slurm", "slurm.container-image=nvcr.io#x", "slurm.container_mounts='/data:/data'"))
    command = next(line for line in text.splitlines() if line.startswith("srun "))
    assert "'--container-image=nvcr.io#x' --container-mounts=/data:/data " in command
    assert "container-image" not in options(text)


def test_another_python_may_run_the_ranks():
    text = script(load_job("slurm", "python='apptainer exec --nv $HOME/image.sif python'"))
    command = next(line for line in text.splitlines() if line.startswith("srun "))
    assert command.endswith(
        """ sh -c 'trap "" TERM USR2; exec "$@"' sh apptainer exec --nv $HOME/image.sif python -P -u -m """
        f"submitit.core._submit {FOLDER}"
    )
