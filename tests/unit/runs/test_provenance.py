"""What is recorded of the code: always which it was, and its text only when asked for."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.runs import provenance
from rsb_cluster.runs.lookup import list_folders
from rsb_cluster.storage.store import Store


def git(folder: Path, *args: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    names = {f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return subprocess.run(
        ["git", *args], cwd=folder, env=os.environ | names, check=True, capture_output=True, **options
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout with one commit."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "a.py").write_text("one\n")
    git(folder, "init", "-q")
    git(folder, "add", "a.py")
    git(folder, "commit", "-qm", "first")
    return folder


def test_a_clean_checkout_is_its_commit(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD").stdout.decode().strip()
    assert provenance.describe_checkout(repository) == {"commit": head, "uncommitted": ""}


def test_of_changes_the_digest_and_the_files_are_recorded_and_no_text(repository: Path) -> None:
    """Whatever bytes they have, and however many."""
    (repository / "a.py").write_bytes(b"password\nna\xefve\n" + b"x\n" * 1_000_000)
    for number in range(150):
        (repository / f"f{number}.py").write_text("new\n")
    git(repository, "add", "--intent-to-add", ".")
    git(repository, "config", "color.ui", "always")
    described = provenance.describe_checkout(repository)
    diff = provenance.read_diff(repository)
    assert diff is not None and b"+na\xefve\n" in diff and b"\x1b" not in diff
    assert described["uncommitted"] == hashlib.sha256(diff).hexdigest()
    assert "a.py" in described["changes"] and "151 files changed" in described["changes"]
    assert len(described["changes"].splitlines()) <= provenance.STAT_LINES + 2 and "password" not in str(described)


def test_the_text_is_saved_once_where_it_is_asked_for(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "checkout", lambda: repository)
    runs = Store(tmp_path / "runs")
    assert provenance.save_diff(runs) == "" and not runs.names()
    (repository / "a.py").write_bytes(b"na\xefve\n")
    (repository / "b").write_bytes(bytes(range(256)))
    git(repository, "add", "b")
    name = provenance.save_diff(runs)
    assert name == provenance.save_diff(runs)
    assert name == f"diffs/{provenance.describe_checkout(repository)['uncommitted']}.diff"
    assert runs.names("diffs") == [name.removeprefix("diffs/")] and list_folders(runs.url) == []
    assert (tmp_path / "runs" / "diffs").stat().st_mode & 0o077 == 0
    git(repository, "reset", "-q", "--hard")
    git(repository, "apply", "-", input=runs.read_bytes(name))
    assert (repository / "a.py").read_bytes() == b"na\xefve\n"
    assert (repository / "b").read_bytes() == bytes(range(256))


def test_a_large_text_is_compressed(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "checkout", lambda: repository)
    (repository / "a.py").write_bytes(b"x\n" * provenance.COMPRESSED_FROM)
    name = provenance.save_diff(Store(tmp_path))
    assert name.endswith(".diff.gz")
    content = Store(tmp_path).read_bytes(name)
    assert len(content) < 100_000 and hashlib.sha256(gzip.decompress(content)).hexdigest() in name


def test_without_a_checkout_there_is_nothing_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "checkout", lambda: None)
    with pytest.raises(ConfigError, match="--save-diff: rsb-cluster does not run from a git checkout"):
        provenance.save_diff(Store(tmp_path))
    assert "commit" not in provenance.describe_code()


def test_code_that_an_earlier_version_recorded_with_its_text_is_known_by_its_digest() -> None:
    text = "diff --git a/a.py b/a.py\n+é\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    brief = provenance.brief_code({"version": "1", "uncommitted": text})
    assert brief == {"version": "1", "uncommitted": digest[:12]}
    assert provenance.brief_code(brief) == brief
    assert provenance.brief_code({"version": "1", "uncommitted": digest, "changes": " a.py | 1 +"}) == brief
    assert provenance.brief_code({"version": "1"}) == {"version": "1"}
