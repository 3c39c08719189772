"""The sbatch script: as reviewed, and run by bash, requeues only when another attempt makes sense."""

import itertools
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rsb_cluster.backends.slurm.script import make_script
from rsb_cluster.config.job import Job
from rsb_cluster.errors import ConfigError
from rsb_cluster.node import starts
from rsb_cluster.node.exit_codes import EXIT_FAILED
from tests.command import ROOT
from tests.servers.daemons import GUARD_S
from tests.unit.bundled import load_job
from tests.unit.slurm_node import Node

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


# --- the script, run by bash ---------------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path, load_job("slurm"))


@pytest.mark.parametrize(
    ("code", "state"),
    [
        *itertools.product((0, 75, 137), ("RUNNING", "CANCELLED", "COMPLETING", "")),
        *itertools.product((1, 100, 130, 143, 255), ("RUNNING", "CANCELLED")),
    ],
)
def test_a_job_is_requeued_only_when_another_attempt_makes_sense(node, code, state):
    again = code in (75, 137, 143, 255) and state == "RUNNING"
    assert node.run(code, state) == code
    assert node.calls("scontrol") == (["requeue 7"] if again else [])
    assert node.calls("sleep") == (["300"] if again else []), "it waits to be taken off the node"


def test_an_array_task_requeues_itself_and_not_the_others(node):
    assert node.run(75, "RUNNING", SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="0") == 75
    assert node.calls("squeue") == ["-h -j 5_0 -O State,RestartCnt"]
    assert node.calls("scontrol") == ["requeue 5_0"]


@pytest.mark.parametrize(("mine", "now", "again"), [("1", "1", True), ("1", "2", False), (None, "1", False)])
def test_a_script_on_a_node_that_was_marked_down_leaves_the_job_alone(node, mine, now, again):
    """Slurm has restarted it elsewhere."""
    assert node.run(75, "RUNNING", RESTARTS=now, **({"SLURM_RESTART_COUNT": mine} if mine else {})) == 75
    assert node.calls("scontrol") == (["requeue 7"] if again else [])


NO_ATTEMPT = {"SRUN_DOES": "rm -f $OUT/*_claimed"}


@pytest.mark.parametrize("code", [75, 134, 137])
def test_starts_that_become_no_attempt_are_delayed_longer_each_time_and_then_fail(node, code):
    """Also if the folder of scripts cannot be written: then Slurm's own count is used."""
    for is_writable in (True, False):
        if not is_writable:
            (node.folder / "7_starts").mkdir()  # nothing can be written into it
        for restart in range(starts.LIMIT):
            is_last = restart == starts.LIMIT - 1
            process = node.start(code, "RUNNING", RESTARTS=str(restart), SLURM_RESTART_COUNT=str(restart), **NO_ATTEMPT)
            _, said = process.communicate(timeout=GUARD_S)
            assert process.returncode == (EXIT_FAILED if is_last else code)
            assert ("5 starts in a row ended before training" in said) == is_last
        delays = [f"update JobId=7 StartTime=now+{seconds}" for seconds in (30, 60, 120, 240)]
        assert node.calls("scontrol") == [call for delay in delays for call in ("requeue 7", delay)]
        (node.folder / "scontrol").unlink()
        if is_writable:
            (node.folder / "7_starts").unlink()


def test_the_requeue_that_ends_the_script_does_not_end_what_delays_the_next_start(node):
    does = '[ "$1" = requeue ] || { kill -TERM $BASHPID; echo delayed >$OUT/delayed; }'
    assert node.run(75, "RUNNING", DOES_SCONTROL=does, **NO_ATTEMPT) == 75
    assert (node.folder / "delayed").exists()


def test_an_attempt_ends_the_count_of_starts(node):
    for restart in range(3 * starts.LIMIT):
        is_attempt = restart % 4 == 3
        does = {"SRUN_DOES": "rm -f $OUT/7_starts"} if is_attempt else NO_ATTEMPT
        assert node.run(75, "RUNNING", RESTARTS=str(restart), SLURM_RESTART_COUNT=str(restart), **does) == 75
    assert node.calls("scontrol").count("requeue 7") == 3 * starts.LIMIT


def test_an_attempt_ends_slurms_count_of_starts_too(node):
    """After many preemptions the disk is full: that is the first start in a row, and not the twentieth."""
    (node.folder / "7_starts").mkdir()
    does = {"SRUN_DOES": "rm -f $OUT/5_0_claimed; echo 18 >$OUT/7_claimed"}
    assert node.run(75, "RUNNING", RESTARTS="19", SLURM_RESTART_COUNT="19", **does) == 75
    assert node.calls("scontrol") == ["requeue 7", "update JobId=7 StartTime=now+30"]


@pytest.mark.parametrize("code", [134, 137, 100])
def test_a_permanent_failure_is_not_requeued_whatever_the_highest_code(node, code):
    does = 'echo "$SLURM_RESTART_COUNT" >$OUT/7_ended'
    assert node.run(code, "RUNNING", RESTARTS="3", SLURM_RESTART_COUNT="3", SRUN_DOES=does) == code
    assert node.calls("scontrol") == []
    # An administrator may start it again; that start speaks for itself.
    assert node.run(137, "RUNNING", RESTARTS="4", SLURM_RESTART_COUNT="4") == 137
    assert node.calls("scontrol") == ["requeue 7"]


def test_a_job_that_may_not_be_requeued_exits_at_once(node):
    does = "echo 'slurm_requeue error: Requested operation is presently disabled' >&2; exit 1"
    process = node.start(75, "RUNNING", DOES_SCONTROL=does)
    _, said = process.communicate(timeout=GUARD_S)
    assert (process.returncode, node.calls("sleep")) == (75, [])
    assert said.startswith(
        "the job does not return to the queue, but 'rsb-cluster retry' resumes the run: slurm_requeue"
    )


def fails_first(times: int, message: str, calls: str) -> str:
    return f"if [ $(wc -l <$OUT/{calls}) -le {times} ]; then echo '{message}' >&2; exit 1; fi"


def test_a_controller_that_does_not_answer_is_asked_again(node):
    """It is being restarted just when the time limit is reached."""
    silent = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    busy = "slurm_requeue error: Socket timed out on send/recv operation"
    munge = "slurm_requeue error: Protocol authentication error"
    does = {
        "DOES_SQUEUE": fails_first(3, silent, "squeue"),
        "DOES_SCONTROL": fails_first(1, busy, "scontrol") + "; " + fails_first(2, munge, "scontrol"),
    }
    process = node.start(75, "RUNNING", **does)
    _, said = process.communicate(timeout=GUARD_S)
    assert process.returncode == 75
    assert said == f"slurmctld does not answer, and is asked again for an hour: {silent}\n"
    assert node.calls("scontrol") == ["requeue 7"] * 3
    assert node.calls("sleep") == ["5"] * 5 + ["300"]


@pytest.mark.parametrize(
    "line",
    [
        "CLUSTER: big",
        "ERROR: ld.so: object 'libx.so' from LD_PRELOAD cannot be preloaded: ignored.",
        "squeue: warning: RUNNING 3 plugins",
    ],
)
def test_lines_beside_the_answer_of_squeue_do_not_keep_a_preempted_job_from_the_queue(node, line):
    assert node.run(75, "RUNNING", DOES_SQUEUE=f'echo "{line}" >&2') == 75
    assert node.run(75, "CANCELLED", DOES_SQUEUE=f'echo "{line}"') == 75
    assert node.calls("scontrol") == ["requeue 7"]


def test_the_cluster_that_the_submitting_shell_was_set_to_is_not_asked(node):
    does = '[ -z "$SLURM_CLUSTERS" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }'
    assert node.run(75, "RUNNING", SLURM_CLUSTERS="small", DOES_SQUEUE=does) == 75
    assert node.calls("scontrol") == ["requeue 7"]


def test_a_job_that_slurm_no_longer_knows_is_left_alone(node):
    does = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    process = node.start(75, "RUNNING", DOES_SQUEUE=does)
    process.communicate(timeout=GUARD_S)
    assert (process.returncode, node.calls("scontrol"), node.calls("sleep")) == (75, [], [])


def test_options_of_the_shell_that_setup_lines_set_end_with_them(tmp_path):
    """With 'set -e' of the user's the script would end with srun, and requeue nothing."""
    node = Node(tmp_path, load_job("slurm", "setup=['set -euo pipefail', 'export SEEN=1']"))
    assert node.run(75, "RUNNING", SRUN_DOES="echo $SEEN >$OUT/seen") == 75
    assert (node.calls("seen"), node.calls("scontrol")) == (["1"], ["requeue 7"])


def test_what_a_profile_sets_on_the_node_changes_nothing(node):
    """As 'source ~/.bashrc' in the setup lines may do, or a site that exports nothing to jobs."""
    assert node.run(75, "RUNNING", SQUEUE_STATES="PENDING", SQUEUE_FORMAT="%A", SLURM_EXPORT_ENV="NONE") == 75
    assert node.calls("squeue_env") == [] and node.calls("export") == ["ALL"]
    assert node.calls("scontrol") == ["requeue 7"]


def test_options_that_the_submitting_shell_exports_end_before_the_ranks(node):
    assert node.run(75, "RUNNING", SHELLOPTS="errexit:nounset:pipefail") == 75
    assert node.calls("scontrol") == ["requeue 7"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_the_script_survives_the_signals_of_a_preemption(node, number):
    process = node.start(75, "RUNNING", SRUN_DOES="while [ ! -e $OUT/saved ]; do /bin/sleep 0.05; done")
    while not (node.folder / "srun").exists():
        time.sleep(0.02)
    process.send_signal(number)
    time.sleep(0.2)
    assert process.poll() is None
    (node.folder / "saved").touch()
    process.communicate(timeout=GUARD_S)
    assert node.calls("scontrol") == ["requeue 7"]


def test_the_ranks_do_not_inherit_ignored_signals(node):
    does = f"{shutil.which('grep')} SigIgn /proc/self/status >$OUT/ignored"
    node.run(0, "RUNNING", SRUN_DOES=does)
    ignored = int(node.calls("ignored")[0].split()[1], 16)
    assert not ignored & (1 << signal.SIGTERM - 1 | 1 << signal.SIGUSR2 - 1)


def test_the_ranks_get_the_cores_of_the_job(node):
    """Since 22.05, srun ignores sbatch's --cpus-per-task."""
    node.run(0, "RUNNING")
    assert node.calls("cpus") == ["8"]
