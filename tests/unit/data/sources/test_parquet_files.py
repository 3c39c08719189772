"""Which parquet files are train and val, by the Hub's rules; what would be merged is refused."""

import pytest

from rsb_cluster.data.sources.parquet import parquet_set
from rsb_cluster.data.sources.parquet_files import parquet_files
from rsb_cluster.errors import ConfigError
from tests.unit import formats


def files(root, *names):
    """A tree of files whose content does not matter; returns the folder."""
    for name in names:
        formats.write(root / name, b"")
    return root


def chosen(root, config="", any_count=False):
    """The files of each split by their paths, and the notes."""
    found = parquet_files(root, config, any_count)
    splits = {split: [file.relative_to(root).as_posix() for file in members] for split, members in found.splits.items()}
    return splits, list(found.notes)


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], [0], [1]),
        (["train.parquet", "validation.parquet"], [0], [1]),
        (["default/train/0000.parquet", "default/train/0001.parquet", "default/validation/0000.parquet"], [0, 1], [2]),
        (["train/train-0.parquet", "test/test-0.parquet"], [0], [1]),
        (["test-set/train-0.parquet", "test-set/val-0.parquet"], [0], [1]),
        (["test-set/train-0.parquet", "test-set/test-0.parquet"], [0], [1]),
        (["my-train-00000-of-00001-0123abcd.parquet", "my-dev-00000-of-00001-0123abce.parquet"], [0], [1]),
    ],
    ids=str,
)
def test_names_tell_the_split(tmp_path, names, train, val):
    files(
        tmp_path, *names, ".cache/huggingface/download/train-0.parquet", "data/._train-1.parquet", "__MACOSX/x.parquet"
    )
    assert chosen(tmp_path) == ({"train": [names[i] for i in train], "val": [names[i] for i in val]}, [])


def test_of_three_splits_test_is_left_out(tmp_path):
    files(tmp_path, "train.parquet", "val.parquet", "test.parquet", "extra.parquet")
    splits, notes = chosen(tmp_path)
    assert splits == {"train": ["train.parquet"], "val": ["val.parquet"]}
    assert notes == [
        "files whose names tell no split are left out: extra.parquet",
        "the split 'test' is left out: test.parquet",
    ]


def test_several_configurations_are_not_merged(tmp_path):
    files(tmp_path, *(f"{px}/{part}-0.parquet" for px in ("32x32", "64x64") for part in ("train", "test")))
    with pytest.raises(ConfigError, match=r"several folders of parquet files, which would be merged: 32x32, 64x64\."):
        chosen(tmp_path)
    splits, notes = chosen(tmp_path, "64x64")
    assert splits == {"train": ["64x64/train-0.parquet"], "val": ["64x64/test-0.parquet"]}
    assert notes == ["other configurations are left out: 32x32/test-0.parquet, 32x32/train-0.parquet"]
    with pytest.raises(ConfigError, match=r"has no configuration '128': 32x32, 64x64"):
        chosen(tmp_path, "128")
    assert chosen(tmp_path, "32x32/*")[0]["train"] == ["32x32/train-0.parquet"]
    with pytest.raises(ConfigError, match=r"no \.parquet file in .* matches --config '16\*'"):
        chosen(tmp_path, "16*")


@pytest.mark.parametrize(
    "names",
    [
        ["train_32x32.parquet", "train_64x64.parquet"],
        ["train_32.parquet", "train_64.parquet"],
        ["train-32-00000-of-00001.parquet", "train-64-00000-of-00001.parquet"],
        ["snapshots/train-clean.parquet", "snapshots/train-other.parquet"],
    ],
    ids=str,
)
def test_resolutions_in_one_folder_are_not_merged(tmp_path, names):
    files(tmp_path, *names)
    with pytest.raises(ConfigError, match=r"files of train that may not belong together: .*Choose with --config"):
        chosen(tmp_path)
    assert chosen(tmp_path, f"*{names[1].rpartition('/')[2]}")[0] == {"train": [names[1]]}
    assert chosen(tmp_path, "*")[0] == {"train": sorted(names)}


@pytest.mark.parametrize(
    ("there", "missing"), [((0, 2), "1 parts .* missing: 1"), ((1, 3), "missing: 2"), ((0, 1), "missing: 2")]
)
def test_a_missing_part_is_named(tmp_path, there, missing):
    files(tmp_path, *(f"data/train-{number:05d}-of-00003.parquet" for number in there))
    with pytest.raises(ConfigError, match=rf"{missing}.*any-count"):
        chosen(tmp_path)
    splits, notes = chosen(tmp_path, any_count=True)
    assert len(splits["train"]) == len(there) and len(notes) == 1
    whole = files(tmp_path / "whole", "train-00001-of-00002.parquet", "train-00002-of-00002.parquet")
    assert chosen(whole)[1] == []


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "train-00000-of-00003.parquet"],
        ["train-00000-of-00001-aaaa.parquet", "train-00000-of-00001-bbbb.parquet"],
    ],
)
def test_parts_of_two_uploads_are_refused(tmp_path, names):
    files(tmp_path, *names)
    with pytest.raises(ConfigError, match=r"parts of several uploads"):
        chosen(tmp_path)


def test_numbers_without_a_total_name_their_gaps(tmp_path):
    files(tmp_path, "train/0000.parquet", "train/0002.parquet")
    assert chosen(tmp_path)[1] == ["1 parts like train/0000.parquet are missing: 1"]


def card(root, text):
    (root / "README.md").write_text(f"---\n{text}---\n# A data set\n")


def test_the_card_decides(tmp_path):
    files(tmp_path, "data/train-0.parquet", "data/dev-0.parquet", "data/old_train-0.parquet", "large/a.parquet")
    card(
        tmp_path,
        "configs:\n- config_name: small\n  default: true\n  data_files:\n  - split: train\n    path: data/train-*\n"
        "  - split: validation\n    path: [data/dev-*]\n- config_name: large\n  data_dir: large\n"
        "  data_files: '*.parquet'\n",
    )
    splits, notes = chosen(tmp_path)
    assert splits == {"train": ["data/train-0.parquet"], "val": ["data/dev-0.parquet"]}
    assert notes == [
        "other configurations are left out: large",
        "files that README.md does not list are left out: data/old_train-0.parquet",
    ]
    assert chosen(tmp_path, "large")[0] == {"train": ["large/a.parquet"]}
    with pytest.raises(ConfigError, match=r"README\.md has no configuration 'huge': small, large"):
        chosen(tmp_path, "huge")
    text = (tmp_path / "README.md").read_text().replace("  default: true\n", "")
    (tmp_path / "README.md").write_text(text)
    with pytest.raises(ConfigError, match=r"has several configurations: small, large\. Choose one with --config NAME"):
        chosen(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["configs: 3\n", "configs:\n- 7\n", "license: mit\n", "- a\n", "configs:\n- data_files: gone/*\n", ""],
)
def test_a_card_without_files_leaves_it_to_the_names(tmp_path, text):
    files(tmp_path, "train-0.parquet")
    card(tmp_path, text)
    assert chosen(tmp_path) == ({"train": ["train-0.parquet"]}, [])


def test_a_card_that_cannot_be_read_is_named(tmp_path):
    files(tmp_path, "train-0.parquet")
    card(tmp_path, "a: [1\n")
    with pytest.raises(ConfigError, match=r"front matter of .*README\.md is not valid YAML"):
        chosen(tmp_path)


def test_of_several_splits_of_a_kind_the_exact_one_is_taken(tmp_path):
    files(tmp_path, "a.parquet", "b.parquet", "c.parquet")
    rows = "".join(f"  - split: {name}\n    path: {file}.parquet\n" for name, file in
                   (("train", "a"), ("train_small", "b"), ("unlabelled", "c")))  # fmt: skip
    card(tmp_path, f"configs:\n- config_name: x\n  data_files:\n{rows}")
    splits, notes = chosen(tmp_path)
    assert splits == {"train": ["a.parquet"]}
    assert notes == ["the split 'unlabelled' is left out", "the split 'train_small' is left out"]
    rows = rows.replace("train\n", "train_big\n")
    card(tmp_path, f"configs:\n- config_name: x\n  data_files:\n{rows}")
    with pytest.raises(ConfigError, match=r"several splits for 'train': train_big, train_small"):
        chosen(tmp_path)


def test_the_rows_are_counted_against_the_card(tmp_path):
    formats.mini_imagenet(tmp_path)
    assert {split: len(part) for split, part in parquet_set(tmp_path).items()} == {"train": 20, "val": 10}
    (tmp_path / "README.md").write_text(formats.MINI_CARD.replace("num_examples: 20", "num_examples: 50000"))
    with pytest.raises(ConfigError, match=r"train has 20 rows, and README\.md says 50,000.*--any-count"):
        parquet_set(tmp_path)
    assert len(parquet_set(tmp_path, any_count=True)["train"]) == 20
