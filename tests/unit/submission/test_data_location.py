"""Finding the shards of a recipe, and making those of a recipe that makes its own: last, and never over other files."""

import json
import shlex
import shutil

import pytest

from rsb_cluster.cli import main
from rsb_cluster.config.catalog import bundled_dir, load_job, load_recipe
from rsb_cluster.config.schema import parse_overrides
from rsb_cluster.data.index import INDEX_NAME
from rsb_cluster.data.indexing import build_index
from rsb_cluster.data.make import make_set
from rsb_cluster.data.published import find_parts, index_set
from rsb_cluster.data.sources import open_set
from rsb_cluster.errors import ConfigError, DataError
from rsb_cluster.storage.store import Store
from rsb_cluster.submission.data_location import find_data, make_missing_shards, require_data
from tests.unit.samples import contents, put, some
from tests.unit.tars import pair, tar_of


def test_data_is_found_by_name_below_a_root(digits, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "digits").symlink_to(digits)
    where = [find_data("digits", given, load_job("local")[0]).url for given in (str(digits), str(root))]
    assert where == [str(digits), f"{root}/digits"]
    missing = find_data("digits", str(tmp_path / "no"), load_job("local")[0])
    assert not missing.is_found and "Searched for" in missing.problem


TARS = {
    "train/own-0.tar": tar_of(pair("a", b"image", 0) + pair("b", b"image", 0)),
    "val/own-0.tar": tar_of(pair("c", b"image", 0)),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(folder, capsys):
    """Submits a run that is refused; returns the error."""

    def run(*args, code):
        with pytest.raises(SystemExit) as ended:
            main([*map(str, args)], prog_name="rsb-cluster")
        said = capsys.readouterr()
        assert ended.value.code == code, said
        return said.err

    return run


def test_an_index_may_lie_elsewhere_than_the_shards(folder):
    """As those of a bucket that cannot be written to, with train and val in one folder."""
    put(folder / "theirs", **{f"{name.split('/')[0]}-0.tar": content for name, content in TARS.items()})
    assert f"run 'rsb-cluster shards index {folder}/theirs'" in found(folder, folder / "theirs", make="").problem
    index_set(find_parts(Store(folder / "theirs")), Store(folder / "mine"))
    mine = found(folder, folder / "mine")
    assert (mine.train.num_samples, mine.val.num_samples) == (2, 1)
    assert mine.folders == [f"{folder}/mine", f"{folder}/theirs", f"{folder}/theirs"]
    put(folder / "beside", **TARS)
    for part in ("train", "val"):
        build_index(Store(folder / "beside" / part))
    assert found(folder, folder / "beside").digest == mine.digest


def found(folder, given="", make="digits", job="local", *changes):
    return find_data("digits", str(given), load_job(job, overrides=parse_overrides(changes))[0], make)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The data set as it is made in an empty folder."""
    folder = tmp_path_factory.mktemp("fresh")
    make_set(open_set("digits"), Store(folder))
    return contents(folder)


# --- as the user submits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["digits", "mine.toml"])
def test_shards_without_an_index_are_kept_and_indexing_is_advised(refused, folder, recipe):
    text = (bundled_dir("recipes") / "digits.toml").read_text()
    (folder / "mine.toml").write_text(text.replace('name = "digits"', 'name = "mine"', 1))
    put(folder / "mine", **TARS)
    for more in ((), ("--job", "nowhere"), ("--set", "data.num_classes=2")):
        refused("submit", "--recipe", recipe, "--data", "mine", *more, code=2 if "nowhere" in more else 1)
        assert contents(folder / "mine") == TARS
    said = refused("submit", "--recipe", recipe, "--data", "mine", "--job", "local", code=1)
    for part in ("train", "val"):
        assert f"{folder}/mine/{part} holds shards but no index: run 'rsb-cluster shards index {folder}" in said


def test_a_command_that_is_advised_can_be_pasted_into_a_shell(folder):
    put(folder / "it's mine", **TARS)
    found = find_data("digits", str(folder / "it's mine"), load_job("local")[0])
    (advice,) = (line for line in found.problem.splitlines() if "mine/val holds shards" in line)
    command = shlex.split(advice.partition(": run '")[2].removesuffix("'."))
    assert command == ["rsb-cluster", "shards", "index", f"{folder}/it's mine/val"]


def test_a_set_with_one_indexed_part_is_kept(refused, folder):
    put(folder / "half", **TARS)
    build_index(Store(folder / "half" / "train"))
    before = contents(folder / "half")
    said = refused("submit", "--recipe", "digits", "--data", "half", "--job", "local", code=1)
    assert f"Make it: rsb-cluster shards index {folder}/half/val" in said
    assert contents(folder / "half") == before


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("submit --recipe digits --job nowhere", 2, "there is no job 'nowhere'"),
        ("submit --recipe digits --job local --set data.num_classes=2", 2, "Use --set data.num_classes=10"),
        ("submit --recipe digits --job local --set data.val_samples=9", 2, "add --set data.val_samples=359"),
        ("submit --recipe digits --job local --set train.global_batch=63", 2, "global_batch"),
        ("submit --recipe digits --job local --init nowhere.safetensors", 1, "nowhere.safetensors"),
        ("submit --recipe digits --job slurm-cpu", 1, "there is no 'sbatch' on this machine"),
        ("submit --recipe digits --job local --set data.make=''", 1, "no shards of 'digits' were found. Searched for"),
        ("sweep --recipe digits,a3 --job local", 1, "no shards of 'imagenet-1k' were found"),
    ],
)
def test_a_submit_that_is_refused_has_made_nothing(refused, folder, monkeypatch, args, code, message):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert message in refused(*args.replace("''", "").split(), code=code)
    assert list(folder.iterdir()) == []


# --- where data are looked for, and made ----------------------------------------------------------------------------


def test_data_are_made_in_the_folder_that_is_searched(folder, fresh, monkeypatch):
    places = {
        "data/digits": (),
        "roots/digits": ("", "digits", "local", 'data="roots"'),
        "given": ("given",),
    }
    for place, asked in places.items():
        source = found(folder, *asked)
        assert (source.url, source.to_make) == (f"{folder}/{place}", "digits")
        assert not (folder / place).exists()
        assert make_missing_shards([source, source]) == [f"{folder}/{place}"]
        assert contents(folder / place) == fresh
        again = found(folder, *asked)
        assert (again.url, again.to_make, again.digest) == (source.url, "", source.digest)
        assert make_missing_shards([again]) == []
    monkeypatch.setenv("RSB_DATA", str(folder / "elsewhere"))
    assert found(folder).url == f"{folder}/elsewhere/digits"
    assert found(folder, "", "digits", "local", 'data="roots"').to_make == ""


def test_nothing_is_made_if_a_root_has_the_set(folder, digits):
    shutil.copytree(digits, folder / "root" / "digits")
    put(folder / "root", **{"other/train/x.tar": b"x"})
    source = found(folder, "root")
    assert (source.url, source.to_make) == (f"{folder}/root/digits", "")


def test_a_folder_that_holds_something_else_is_named_with_what_is_in_it(folder):
    before = put(folder / "root", **{"imagenet-1k/x": b"x", "notes.txt": b"x"})
    source = found(folder, "root")
    with pytest.raises(
        DataError, match=r"root is not empty: it holds imagenet-1k, notes\.txt\.(.|\n)*Use --data .*root/digits"
    ):
        require_data(source)
    assert contents(folder / "root") == before
    put(folder / "data" / "digits", **{"notes.txt": b"x"})
    assert "digits is not empty: it holds notes.txt" in found(folder).problem
    (folder / "file").write_bytes(b"x")
    assert "file is not a folder" in found(folder, "file").problem
    make_set({"train": some(3)}, Store(folder / "others"))
    assert "data_set was , is digits" in found(folder, "others").problem
    with pytest.raises(DataError, match=r"shards index .*others/val"):
        found(folder, "others", "")


@pytest.mark.parametrize("given", ["here", "here/digits"])
def test_an_incomplete_set_is_completed(folder, fresh, given):
    place = folder / "here" / "digits"
    make_set({"train": open_set("digits")["train"]}, Store(place))  # a train alone; its val comes beside it
    assert found(folder, given).url == str(place)
    for name in ("train/index.npz", "train/classes.json", "train/shard-000001.tar"):
        (place / name).unlink()
        source = found(folder, given)
        assert (source.url, source.to_make) == (str(place), "digits")
    kept = (place / "train" / "shard-000000.tar").stat().st_mtime_ns
    make_missing_shards([source])
    assert (place / "train" / "shard-000000.tar").stat().st_mtime_ns == kept
    assert contents(place) == fresh


def test_other_shards_that_appear_meanwhile_are_refused(folder):
    source = found(folder)
    other = {part: open_set("digits")["val"] for part in ("train", "val")}
    make_set(other, Store(source.url))
    with pytest.raises(ConfigError, match=r"already holds index\.npz"):
        make_missing_shards([source])
    assert not (folder / "data" / "digits" / "train" / "shard-000001.tar").exists()
    assert (folder / "data" / "digits" / "train" / INDEX_NAME).exists()


def test_a_recipe_that_makes_nothing_finds_nothing(folder):
    recipe = load_recipe("digits", overrides=parse_overrides(["data.make="])).recipe
    source = found(folder, "", recipe.data.make)
    assert not source.is_found and source.problem.startswith("no shards of 'digits' were found. Searched for\n")


def test_missing_data_names_the_searched_files(rsb):
    where = f"{rsb.cwd}/data/imagenet-1k/train/index.npz"
    said = rsb.error("submit", "--recipe", "a3", "--job", "local", code=1)
    assert f"no shards of 'imagenet-1k' were found. Searched for\n  {where}\nName their folder with --data" in said
    said = rsb.error("submit", "--recipe", "a3", "--job", "local", "--data", "here", code=1)
    assert f"Searched for\n  {rsb.cwd}/here/train/index.npz\n  {rsb.cwd}/here/imagenet-1k/train/index.npz\n" in said
    assert list(rsb.cwd.iterdir()) == []


def test_another_number_of_samples_is_refused_with_the_right_one(rsb, digits):
    said = rsb.error("submit", "--recipe", "digits", "--data", str(digits), "--set", "data.train_samples=1400")
    assert f"{digits}/train holds 1438 samples, but the recipe has data.train_samples = 1400." in said
    assert said.endswith("If this is the right data, add --set data.train_samples=1438.\n")
    said = rsb.error("submit", "--recipe", "digits", "--data", str(digits), "--set", "data.num_classes=9")
    assert "has a sample of class 9, but the recipe has data.num_classes = 9. Use --set data.num_classes=10." in said


def test_parts_with_contradictory_class_names_are_refused(rsb, digits):
    swapped = rsb.cwd / "swapped"
    shutil.copytree(digits, swapped)
    names = ["0", "2", "1", *map(str, range(3, 10))]
    (swapped / "val" / "classes.json").write_text(json.dumps(names))
    build_index(Store(swapped / "val"))
    for how in ((), ("--dry-run",)):
        said = rsb.error("submit", "--recipe", "digits", "--job", "local", "--data", "swapped", *how)
        assert f"class 1 is '1' for {swapped}/train and '2' in {swapped}/val: the predictions would be misread" in said
        assert f"run: rsb-cluster shards index {swapped}/val\n" in said
    (swapped / "val" / "classes.json").unlink()  # unnamed classes contradict nothing
    build_index(Store(swapped / "val"))
    assert find_data("digits", "swapped", load_job("local")[0]).check(load_recipe("digits").recipe) is None


def test_a_set_without_its_validation_part_is_named(rsb, digits):
    shutil.copytree(digits / "train", rsb.cwd / "half" / "train")
    said = rsb.error("submit", "--recipe", "fashion-mnist", "--job", "local", "--data", "half", code=1)
    assert f"there is no {rsb.cwd}/half/val/index.npz" in said


# --- some classes only ----------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_chosen_classes_and_the_digest_is_their_own(digits):
    whole = find_data("digits", str(digits), load_job("local")[0])
    some = whole.choose(("3", "8"))
    assert whole.choose(()).digest == whole.digest != some.digest != whole.choose(("8", "3")).digest
    assert (some.train.num_samples, some.val.num_samples) == tuple(
        sum(index.class_names[label] in "38" for label in index.labels) for index in (whole.train, whole.val)
    )
    options = ["data.classes=3,8", "data.num_classes=2"]
    with pytest.raises(
        ConfigError, match=rf"holds {some.train.num_samples} samples.*= 1438.*--set data\.train_samples="
    ):
        some.check(load_recipe("digits", overrides=parse_overrides(options)).recipe)
    options += [f"data.train_samples={some.train.num_samples}", f"data.val_samples={some.val.num_samples}"]
    some.check(load_recipe("digits", overrides=parse_overrides([*options, "train.global_batch=16"])).recipe)
    with pytest.raises(ConfigError, match="has no class 'nine'"):
        whole.choose(("nine",))


def test_shards_that_a_recipe_makes_are_made_whole_and_used_in_part(folder):
    location = found(folder).choose(("3", "8"))
    assert make_missing_shards([location, found(folder)]) == [location.url]
    made = find_data("digits", location.url, load_job("local")[0])
    assert made.train.num_samples == 1438
    assert made.choose(("3", "8")).digest == location.digest


def test_shards_that_are_missing_are_refused_before_a_job_waits_for_them(folder):
    put(folder / "own", **TARS)
    for part in ("train", "val"):
        build_index(Store(folder / "own" / part))
    recipe = load_recipe(
        "a3",
        overrides=parse_overrides(
            ["data.train_samples=2", "data.val_samples=1", "train.global_batch=2", "train.virtual_ranks=1"]
        ),
    ).recipe
    location = found(folder, folder / "own")
    location.check(recipe)
    (folder / "own" / "train" / "own-0.tar").unlink()
    with pytest.raises(DataError, match=r"own/train lacks 1 of the 1 shards in its index: own-0\.tar\. Copy"):
        location.check(recipe)


def test_a_part_in_place_of_its_set_is_told(folder):
    put(folder / "own", **TARS)
    build_index(Store(folder / "own" / "train"))
    problem = found(folder, folder / "own" / "train", make="").problem
    assert "own/train is one part of a set: name the folder with train/ and val/." in problem
