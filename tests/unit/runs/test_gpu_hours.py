"""The cost of a run, also if its attempts recorded no end; and its GPU-hour budget."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsb_cluster.config.catalog import load_job
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.runs.gpu_hours import BudgetExceededError, check_budget, cost, spans
from rsb_cluster.runs.metrics import MetricsWriter
from rsb_cluster.runs.run import Attempt, Run


def add(run, number, start_step, started, **fields):
    values = {"number": number, "job_id": "7", "world_size": 4, "gpus": 4, "hosts": ("h",)}
    run.write_attempt(Attempt(**values | {"started": started, "start_step": start_step} | fields))


def test_what_was_computed_after_the_last_checkpoint_is_repeated(tmp_path):
    run = Run.at(tmp_path, "r")
    add(run, 1, 0, 1000.0, ended=4600.0, end_step=500, cause="preempted")
    add(run, 2, 500, 5000.0, ended=6800.0, end_step=650, cause="crashed")
    add(run, 3, 600, 7000.0, ended=10600.0, end_step=1000, cause="finished")
    spent = cost(spans(run))
    assert (spent.wall_s, spent.gpu_hours, spent.rank_hours) == (9000.0, 10.0, 10.0)
    assert (spent.attempts, spent.preemptions, spent.steps_repeated) == (3, 1, 50)


def test_a_killed_attempt_ends_with_its_last_heartbeat(tmp_path):
    run = Run.at(tmp_path, "r")
    add(run, 1, 0, 1000.0)
    run.store.write_json("attempts/0001-alive.json", {"step": 70, "time": 1360.0, "beats": 36})
    add(run, 2, 40, 2000.0, ended=2360.0, end_step=100, cause="finished", gpus=0)
    first, second = spans(run)
    assert (first.seconds, first.end_step, second.seconds) == (360.0, 70, 360.0)
    spent = cost([first, second])
    assert (spent.gpu_hours, spent.rank_hours, spent.steps_repeated) == (0.4, 0.8, 30)


def test_without_a_heartbeat_its_last_metrics_row_stands_for_it(tmp_path):
    run = Run.at(tmp_path, "r")
    for number in (1, 2):
        add(run, number, 0, 1000.0)
        writer = MetricsWriter(run.store, number)
        for step in (10, 20):
            writer.add({"kind": "train", "step": step, "time": 1000.0 + step * number})
        writer.flush()
    assert [(span.seconds, span.end_step) for span in spans(run)] == [(20.0, 20), (40.0, 20)]


def test_an_attempt_that_wrote_nothing_costs_nothing(tmp_path):
    run = Run.at(tmp_path, "r")
    add(run, 1, 30, 1000.0)
    run.store.write_bytes("metrics/0001-000000.jsonl", b'{"step": 4')
    run.store.write_bytes("attempts/0001-alive.json", b"{")
    (span,) = spans(run)
    assert (span.seconds, span.end_step) == (0.0, 30)
    assert cost([]).steps_repeated == 0


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=6))
def test_repeated_steps_are_those_that_were_computed_more_than_once(moves):
    """Each attempt does some steps; the next goes back some, but not before the start."""
    times, step, attempts = {}, 0, []
    for number, (forward, back) in enumerate(moves, 1):
        start = step
        for done in range(start, start + forward):
            times[done] = times.get(done, 0) + 1
        fields = {"number": number, "job_id": "", "world_size": 1, "hosts": (), "started": 0.0, "start_step": start}
        attempts.append(Attempt(**fields, ended=1.0, end_step=start + forward, cause="crashed"))
        step = max(0, start + forward - back)
    run = Run.at("/nowhere", "r")
    assert cost(spans(run, attempts)).steps_repeated == sum(times.values()) - len(times)


def test_a_budget_counts_the_gpus_of_all_attempts_and_on_cpus_processes(tmp_path):
    run, (job, _) = Run.at(tmp_path, "r"), load_job("slurm", overrides=parse_overrides(["max_gpu_hours=10"]))
    assert check_budget(run, job) == 10
    add(run, 1, 0, 1000.0, ended=4600.0, end_step=9, gpus=4, world_size=3)  # one GPU was idle, and paid for
    assert check_budget(run, job) == 6
    add(run, 2, 9, 5000.0, gpus=0, world_size=4)  # killed
    run.store.write_json("attempts/0002-alive.json", {"step": 20, "time": 6800.0, "beats": 36})
    assert check_budget(run, job) == 4
    assert check_budget(run, job, run.attempts()[:1]) == 6
    add(run, 3, 20, 7000.0, ended=10600.0, end_step=30, gpus=4)
    with pytest.raises(
        BudgetExceededError, match=r"^r exceeded its GPU-hour budget \(used 10\.00 of 10\)\. .* larger --max-gpu-hours"
    ):
        check_budget(run, job)
    assert check_budget(run, load_job("slurm")[0]) == math.inf
