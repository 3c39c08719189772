"""Values of options, as a user types them."""

import click
import pytest

from rsb_cluster.cli.parameters import Nodes, Seeds, TimeLimit


@pytest.mark.parametrize(
    ("given", "minutes"),
    [
        ("90", 90), ("12:00:00", 720), ("2-0", 2880), ("1-12:30", 2190), ("0:90", 2), ("45:30", 46), ("0-0:0:1", 1),
        ("00:00:60", 1),
    ],
)  # fmt: skip
def test_a_time_limit_is_written_as_for_sbatch(given, minutes):
    assert TimeLimit().convert(given, None, None) == minutes


@pytest.mark.parametrize("given", ["", "soon", "1:2:3:4", "-5", "0", "0-0", "1-", "1d", "1.5", "²"])
def test_what_is_no_time_limit_is_refused(given):
    with pytest.raises(click.BadParameter, match=r"is no time"):
        TimeLimit().convert(given, None, None)


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ("1", (0,)),
        ("3", (0, 1, 2)),
        ("1,5,7", (1, 5, 7)),
        ("0-4", (0, 1, 2, 3, 4)),
        ("7, 1-2,7", (7, 1, 2)),
        ("5-5", (5,)),
    ],
)
def test_seeds_are_counted_listed_or_a_range(given, seeds):
    assert Seeds().convert(given, None, None) == seeds


@pytest.mark.parametrize("given", ["", "0", "-1", "1,", "4-1", "1-", "a", "1.5", "0-99999", "99999", "²"])
def test_what_are_no_seeds_is_refused(given):
    with pytest.raises(click.BadParameter):
        Seeds().convert(given, None, None)


@pytest.mark.parametrize(("given", "nodes"), [("", (0, 0)), ("4", (4, 4)), ("2-4", (2, 4)), ("4-4", (4, 4))])
def test_nodes_are_a_number_or_a_range(given, nodes):
    assert Nodes().convert(given, None, None) == nodes


@pytest.mark.parametrize("given", ["0", "0-0", "-1", "4-2", "2\N{EN DASH}4", "\N{SUPERSCRIPT TWO}", "two"])
def test_what_is_no_number_of_nodes_is_refused(given):
    with pytest.raises(click.BadParameter, match="neither a number of nodes nor a range"):
        Nodes().convert(given, None, None)
