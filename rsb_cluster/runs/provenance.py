"""The provenance of a result: the version of this package, its git commit, and the versions of other packages."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store

PACKAGES = (
    "rsb-cluster",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "webdataset",
    "fsspec",
    "s3fs",
    "submitit",
)

DIGEST_DIGITS = 12
STAT_LINES = 100  # of ``git diff --stat``
GIT_S = 60.0

# The folder of uncommitted changes (`save_diff`), beside the runs.
DIFFS = "diffs"
COMPRESSED_FROM = 1 << 20  # bytes


def checkout() -> Path | None:
    """Return the git checkout that this package runs from, or None if it is installed otherwise."""
    import rsb_cluster

    root = Path(rsb_cluster.__file__).parent.parent
    return root if (root / ".git").exists() else None


def describe_code() -> dict[str, str]:
    """Return the version of this package and, if it runs from a git checkout, its commit and uncommitted changes."""
    import rsb_cluster

    described = {"version": rsb_cluster.__version__, "python": sys.version.split()[0], "platform": platform.platform()}
    root = checkout()
    return described | (describe_checkout(root) if root else {})


def describe_checkout(root: Path) -> dict[str, str]:
    """Return the commit of a git checkout, and the SHA-256 and a summary of its uncommitted changes, as far as known.

    Their text is not part of it: it can be large, and hold what is to stay on this machine.
    """
    described = {}
    if (head := _git(root, "rev-parse", "HEAD")) is not None:
        described["commit"] = head.decode().strip()
    if (diff := read_diff(root)) is not None:
        described["uncommitted"] = hashlib.sha256(diff).hexdigest() if diff else ""
    if diff and (stat := _git(root, *_DIFF, f"--stat={STAT_LINES}", f"--stat-count={STAT_LINES}")):
        described["changes"] = stat.decode(errors="replace").rstrip()
    return described


def read_diff(root: Path) -> bytes | None:
    """Return the uncommitted changes of a git checkout, for ``git apply``; None if git does not tell them."""
    return _git(root, *_DIFF, "--binary")


def save_diff(store: Store) -> str:
    """Write the uncommitted changes of this package's checkout into a folder of runs, under their SHA-256.

    Returns:
        The file's name, which ends in ``.gz`` for large changes; empty if there are no changes.

    Raises:
        ConfigError: The package does not run from a git checkout, or git does not tell the changes.
    """
    root = checkout()
    diff = read_diff(root) if root else None
    if diff is None:
        raise ConfigError("--save-diff: rsb-cluster does not run from a git checkout here. Leave the option out.")
    if not diff:
        return ""
    name = f"{DIFFS}/{hashlib.sha256(diff).hexdigest()}.diff"
    if len(diff) >= COMPRESSED_FROM:
        name, diff = f"{name}.gz", gzip.compress(diff, mtime=0)
    store.child(DIFFS).make_folder(0o700)
    store.create_bytes(name, diff)
    return name


# Without the settings of the user that change the text.
_DIFF = ("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color")


def _git(root: Path, *args: str) -> bytes | None:
    """Return the output of a git command; None if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, timeout=GIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


def brief_code(code: dict[str, str]) -> dict[str, str]:
    """Return a description of the code with only the first digits of the digest of its uncommitted changes."""
    diff = code.get("uncommitted", "")
    if "\n" in diff:  # earlier versions recorded the text
        diff = hashlib.sha256(diff.encode()).hexdigest()
    brief = {key: value for key, value in code.items() if key != "changes"}
    return brief | ({"uncommitted": diff[:DIGEST_DIGITS]} if "uncommitted" in code else {})


def describe_packages() -> dict[str, str]:
    """Return the versions of the packages that can change a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
