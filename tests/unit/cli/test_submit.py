"""Options of the commands that submit, as a user types them."""

from rsb_cluster.cli.submit import _what_was_done
from tests.unit.sweeps import make, planned


def test_a_submit_has_a_run_for_each_seed(rsb, digits):
    given = ("--recipe", "digits", "--job", "local", "--data", str(digits), "--dry-run", "--json")
    assert [run["seed"] for run in rsb.json("submit", *given, "--seeds", "1,5-6")["runs"]] == [1, 5, 6]


def test_gpus_of_this_machine_need_no_other_option(rsb, digits):
    """A job of processes on the CPU has one for each GPU then."""
    rsb.env["CUDA_VISIBLE_DEVICES"] = "0,1"
    given = (
        "--recipe",
        "digits",
        "--job",
        "local",
        "--data",
        str(digits),
        "--gpus-per-node",
        "2",
        "--dry-run",
        "--json",
    )
    job = rsb.json("submit", *given)["job"]
    assert (job["gpus_per_node"], job["tasks_per_node"]) == (2, 0)


def test_a_run_that_is_submitted_again_says_where_it_starts(tmp_path, digits):
    planned_run = planned(tmp_path, digits)[0]
    assert _what_was_done(planned_run) == "submitted"
    make(planned_run)
    again = planned(tmp_path, digits)[0]
    assert _what_was_done(again) == "resubmitted, starts from the beginning"
