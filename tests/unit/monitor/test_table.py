"""Runs as a table that fits a terminal, as tab-separated values, and filtered and sorted."""

import io

import pytest
from rich.console import Console

from rsb_cluster.errors import ConfigError
from rsb_cluster.monitor.status import Status
from rsb_cluster.monitor.table import SORT_KEYS, TSV_FIELDS, Filter, table, tsv

CAUSE = "lost peer (rank 3: [/gloo/pair.cc:545] Read error\nand more of it)"


def status(i: int = 0, state: str = "lost peer", **changes: object) -> Status:
    values = {
        "attempt": 12, "epoch": 299.9, "step": 375000, "total_steps": 375300, "images_per_s": 123456.0,
        "eta_s": 86400.0, "top1": 79.86, "cause": CAUSE, "job_id": f"40012_{i}",
        "hosts": ("gpu-node-17", "gpu-node-18"),
        "recipe": "deit", "model": "deit_small_patch16_224",
    }  # fmt: skip
    return Status(f"deit-deit_small_patch16_224-s{i}-0123abcd", "/r", state, **(values | changes))  # type: ignore[arg-type]


def printed(found: list[Status], width: int) -> list[str]:
    shown = io.StringIO()
    Console(file=shown, width=width).print(table(found, width))
    return [line.rstrip() for line in shown.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_a_run_takes_one_line_at_any_width_of_the_terminal(width):
    states = ("lost peer", "running", "queued", "failed")
    header, *lines = printed([status(i, states[i % 4]) for i in range(8)], width)
    assert len(lines) == 8 and max(map(len, lines)) <= width
    for line in lines:
        assert line.startswith("deit-deit_") and "-0123abcd " in line and "375000/375300" in line and "79.86" in line
    assert ("host" in header, "job" in header, "attempt" in header) == {
        80: (False, False, False), 100: (False, True, False), 120: (True, True, False), 200: (True, True, True),
    }[width]  # fmt: skip
    assert ("gpu-node-17 +1" in lines[0]) == ("host" in header)


@pytest.mark.parametrize("width", [10, 20, 40, 60])
def test_on_a_very_narrow_terminal_no_number_is_cut(width):
    """A step of 375000 that reads 375 is wrong: columns go instead."""
    header, *lines = printed([status(i, cause="") for i in range(3)], width)
    assert max(map(len, [header, *lines])) <= width and header.split()[-1] in ("state", "step", "top-1")
    for line in lines:
        assert not any(word.isdigit() or "/" in word for word in line.split() if word != "375000/375300"), line


def test_a_wide_table_is_not_shortened_and_says_each_thing_once():
    line = printed([status()], 300)[1]
    assert line.startswith("deit-deit_small_patch16_224-s0-0123abcd  lost peer  40012_0  gpu-node-17 +1 ")
    assert line.endswith("24:00:00  79.86  rank 3: [/gloo/pair.cc:545] Read error and more of it")


def test_a_column_without_a_value_is_left_out():
    quiet = status(state="finished", cause="", eta_s=None, job_id="", hosts=())
    header, line = printed([quiet], 300)
    assert header.split() == ["run", "state", "attempt", "epoch", "step", "img/s", "top-1"]
    assert line.endswith(" 79.86")


def test_a_process_on_this_machine_is_named_by_its_pid():
    found = status(job_id="host-4711-99-0123abcd", state="cancelled", cause="cancelled job host-4711-99-0123abcd")
    (line,) = printed([found], 300)[1:]
    assert " pid 4711  " in line and line.endswith("cancelled job pid 4711")


def test_tab_separated_values_have_the_names_of_the_json_and_one_line_per_run():
    header, line = tsv([status(eta_s=None)]).split("\n")
    values = dict(zip(header.split("\t"), line.split("\t"), strict=True))
    assert set(TSV_FIELDS) <= set(vars(status())) and list(values) == list(TSV_FIELDS)
    assert values["hosts"] == "gpu-node-17,gpu-node-18" and values["eta_s"] == "" and values["top1"] == "79.86"
    assert values["cause"] == "lost peer (rank 3: [/gloo/pair.cc:545] Read error and more of it)"


def test_runs_are_chosen_by_state_recipe_model_and_time():
    found = [
        status(0, "failed", recipe="a1", model="resnet18", updated=10),
        status(1, "running", recipe="a1h", model="resnet50", updated=20),
        status(2, "never started", updated=0),
    ]
    taken = lambda **wanted: [i for i, s in enumerate(found) if Filter(**wanted).takes(s)]  # noqa: E731
    assert taken() == [0, 1, 2]
    assert taken(states=("failed", "never started")) == [0, 2]
    assert taken(recipes=("a1",)) == [0] and taken(recipes=("a1*", "deit")) == [0, 1, 2]
    assert taken(models=("resnet*",), recipes=("a1h",)) == [1]
    assert taken(since=15) == [1]
    with pytest.raises(ConfigError, match=r"no run has the state 'fialed'. Did you mean 'failed'\?"):
        Filter(states=("fialed",))


@pytest.mark.parametrize(
    ("key", "order"), [("run", [0, 1, 2]), ("state", [2, 0, 1]), ("updated", [1, 2, 0]), ("progress", [1, 0, 2]),
                       ("top1", [2, 0, 1]), ("eta", [2, 0, 1]), ("model", [1, 0, 2])]
)  # fmt: skip
def test_the_best_the_newest_and_the_farthest_come_first(key, order):
    found = [
        status(0, "running", top1=70.0, step=100, updated=1, eta_s=60.0, model="resnet18"),
        status(1, "finished", top1=None, step=300, updated=9, eta_s=None, model="resnet101"),
        status(2, "failed", top1=80.0, step=0, total_steps=0, updated=5, eta_s=1.0, model="resnet50"),
    ]
    assert sorted(range(3), key=lambda i: SORT_KEYS[key](found[i])) == order
