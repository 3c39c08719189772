"""A path or a URL of a known kind, or a sentence: never a folder with the name of a URL."""

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.location import PACKAGES
from rsb_cluster.storage.store import Store


def test_urls_of_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for url in ("x", "./x", "x/", f"{tmp_path}/x", f"file://{tmp_path}/x/", "~/x", tmp_path / "x"):
        assert Store(url).url == f"{tmp_path}/x"
        assert Store(url).is_local
    assert Store("/").url == "/"
    assert not Store("s3://bucket/x/").is_local
    assert Store("s3://bucket/x/").url == "s3://bucket/x"


def test_the_url_that_pathlib_makes_of_a_folder_works(tmp_path):
    folder = tmp_path / "a b%20#é"
    assert Store(folder.as_uri()).url == str(folder)


def test_a_home_that_the_system_does_not_know_is_an_error(monkeypatch):
    """Another user's, or one's own in a container that has neither HOME nor an entry in /etc/passwd."""
    for use in (Store, lambda url: Run.at(url, "r")):
        with pytest.raises(
            ConfigError, match="cannot use ~nobody-here/x: this system knows no home folder for ~nobody"
        ):
            use("~nobody-here/x")


@pytest.mark.parametrize(
    "url",
    ["s3:/x", "s3:/bucket/x", "s3://", "s3:///x", "S3:/x", "nonsense://x", "memory://x", "ftp://x/y", "http:/x", "https://",
     "file:/x", "file://host/x", "http://host/x?token=1", "http://host/x#y"],
)  # fmt: skip
def test_what_is_neither_a_path_nor_a_url_is_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (Store, lambda url: Run.at(url, "r")):
        with pytest.raises(ConfigError) as caught:
            use(url)
        assert str(caught.value).startswith(f"cannot use {url}: ")
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_path_is_not_the_current_folder():
    with pytest.raises(ConfigError, match=r"path of a folder is empty\. Name one; the current folder is '\.'"):
        Store("")


@pytest.mark.parametrize("name", ["a:b", "./s3:/x", "x y:z", "10:/x"])
def test_a_colon_may_be_in_a_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store(name).is_local


@pytest.mark.parametrize("scheme", PACKAGES)
def test_nothing_is_written_where_data_are_read(scheme):
    store = Store(f"{scheme}://a/b/")
    assert store.url == f"{scheme}://a/b" and store.child("c").url == f"{scheme}://a/b/c"
    writes = [
        lambda: store.write_bytes("f", b""), lambda: store.create_bytes("f", b""), lambda: store.delete("f"),
        lambda: store.delete_file("f"), lambda: store.move("f", "g"), lambda: store.make_folder(0o700),
        store.check_writable, lambda: Run.at(store.url, "r"),
    ]  # fmt: skip
    for write in writes:
        with pytest.raises(ConfigError, match=rf"{scheme}:// is only read, as data\. Use a folder or s3://bucket"):
            write()
