"""What the tests of the commands for shards share; in this process, for each costs a second of imports otherwise."""

import pytest

from rsb_cluster.cli import main
from tests.unit import formats


@pytest.fixture
def shards(tmp_path, monkeypatch, capsys):
    """Runs ``rsb-cluster shards ...`` in a folder of its own; gives what it prints, or what it says as it fails."""
    monkeypatch.chdir(tmp_path)

    def run(*args, code=0):
        with pytest.raises(SystemExit) as ended:
            main(["shards", *map(str, args)], prog_name="rsb-cluster")
        out, err = capsys.readouterr()
        assert ended.value.code == code, (out, err)
        return out if code == 0 else out + err

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with train/ and val/ of two classes; one image of val is also in train."""
    folder = tmp_path_factory.mktemp("images")
    for part, count, seed in (("train", 20, 0), ("val", 3, 500)):
        formats.class_folders(folder / part, ("cat", "dog"), count, seed=seed, suffix="jpg")
    formats.write(folder / "val" / "cat" / "leak.jpg", formats.picture(0))
    return folder
