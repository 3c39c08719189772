"""Splits by the words in names."""

import pytest

from rsb_cluster.data.split_names import as_ours, split_of
from rsb_cluster.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet1k-train-0000.tar", "train"),
        ("imagenet1k-validation-00.tar", "validation"),
        ("VAL_3.tar", "validation"),
        ("test", "test"),
        ("eval-1.parquet", "test"),
        ("trainer-0.tar", ""),
        ("interval-0.tar", ""),
        ("00000.tar", ""),
    ],
)
def test_the_words_of_a_split_stand_alone(name, split):
    assert split_of(name, name) == split


def test_a_name_of_two_splits_is_refused():
    with pytest.raises(ConfigError, match=r"name of a/x has the words of several splits: train, test"):
        split_of("train-test-0.tar", "a/x")


def test_test_is_val_only_where_nothing_else_is():
    assert as_ours({"train": 1, "test": 3}) == ({"train": 1, "val": 3}, [])
    assert as_ours({"test": 3, "train": 1, "validation": 2, "extra": 4}) == ({"train": 1, "val": 2}, ["test", "extra"])
    assert as_ours({"validation": 2}) == ({"val": 2}, [])
