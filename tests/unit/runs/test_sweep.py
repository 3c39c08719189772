"""A sweep's id depends on its runs, and its record is read as it was written."""

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.runs.sweep import list_sweeps, read_sweep, sweep_id, write_sweep
from tests.unit.runs.made import IDS, add_sweep


def test_a_sweeps_id_depends_on_its_name_and_runs():
    assert sweep_id("x", IDS) == sweep_id("x", reversed(IDS))
    assert len({sweep_id("x", IDS), sweep_id("y", IDS), sweep_id("x", IDS[:2])}) == 3


def test_a_sweep_is_read_as_it_was_written(anywhere):
    assert list_sweeps(anywhere.url) == []
    one, other = add_sweep(anywhere.url, "one", *IDS), add_sweep(anywhere.url, "other", IDS[0])
    assert list_sweeps(anywhere.url) == [one, other]
    assert read_sweep(anywhere.url, "one") == read_sweep(anywhere.url, one.sweep_id) == one
    write_sweep(anywhere.url, one.model_copy(update={"created": 9.0}))
    assert read_sweep(anywhere.url, "one") == one, "sent again, it began with its first submit"
    for name in ("o", "othe"):
        with pytest.raises(ConfigError, match=f"there is no sweep '{name}'"):
            read_sweep(anywhere.url, name)
    two = [add_sweep(anywhere.url, f"two-{which}", *IDS) for which in ("a", "b")]
    with pytest.raises(ConfigError, match=r"'two' is a prefix of 2 sweeps: two-a-\w+, two-b-\w+\."):
        read_sweep(anywhere.url, "two")
    assert read_sweep(anywhere.url, "two-b") == two[1]
    with pytest.raises(ConfigError, match=r"there is no sweep 'othre' in "):
        read_sweep(anywhere.url, "othre")
