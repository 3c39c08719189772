"""The table of known data sets."""

from rsb_cluster.data.datasets import known_data_sets
from rsb_cluster.data.sources.illusions import SETS
from tests.unit import formats


def test_the_table_is_whole_and_agrees_with_the_paper():
    known = known_data_sets()
    assert set(formats.FORMATS) | {"digits", "fashion-mnist"} | {f"indl-{name}" for name in SETS} == set(known)
    table5 = {
        "imagenet-1k": (1_281_167, 50_000, 1000),
        "flowers102": (2_040, 6_149, 102),
        "stanford-cars": (8_144, 8_041, 196),
        "cifar100": (50_000, 10_000, 100),
        "cifar10": (50_000, 10_000, 10),
    }
    for name, (train, val, classes) in table5.items():
        assert known[name].samples == {"train": train, "val": val}
        assert known[name].classes == classes
        assert known[name].metric == "top1"
    assert sum(known["inat2019"].samples.values()) == 265_240 + 3_003
    assert known["vizwiz-classification"].default_labels == "vizwiz"
    assert all(data_set.download and data_set.licence for data_set in known.values())
