"""The provenance of a result: the version of this package, its git commit, and the versions of other packages."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "rsb-cluster",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "webdataset",
    "fsspec",
    "s3fs",
    "submitit",
)

DIGEST_DIGITS = 12


def describe_code() -> dict[str, str]:
    """Return the version of this package and, if it runs from a git checkout, its commit and uncommitted changes."""
    import rsb_cluster

    described = {"version": rsb_cluster.__version__, "python": sys.version.split()[0], "platform": platform.platform()}
    root = Path(rsb_cluster.__file__).parent.parent
    if (root / ".git").exists():
        git = ["git", "-C", str(root)]
        try:
            head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
            diff = subprocess.run([*git, "diff", "HEAD"], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return described
        if head.returncode == 0:
            described |= {"commit": head.stdout.strip(), "uncommitted": diff.stdout}
    return described


def brief_code(code: dict[str, str]) -> dict[str, str]:
    """Return a description of the code with its uncommitted changes replaced by a digest."""
    diff = code.get("uncommitted", "")
    if len(diff) <= DIGEST_DIGITS:
        return code
    return code | {"uncommitted": hashlib.sha256(diff.encode()).hexdigest()[:DIGEST_DIGITS]}


def describe_packages() -> dict[str, str]:
    """Return the versions of the packages that can change a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
