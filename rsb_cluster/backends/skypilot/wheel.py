"""The code for the nodes: this package as it is imported here, as a wheel, and the versions of its dependencies.

The wheel is made from the package's files without a build tool. So the nodes run the same code as the login node,
including uncommitted changes, be it a checkout or an installed wheel. It needs no network, and is reproducible.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import re
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import rsb_cluster
from rsb_cluster.config import catalog
from rsb_cluster.errors import ConfigError

NAME = "rsb-cluster"
_TIME = (1980, 1, 1, 0, 0, 0)  # modification time of every file: the earliest that a ZIP file can hold
_WHEEL = "Wheel-Version: 1.0\nGenerator: rsb-cluster\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@dataclass(frozen=True)
class BuiltWheel:
    """A wheel in memory.

    Attributes:
        filename: File name with the tags that pip requires.
        content: The archive.
    """

    filename: str
    content: bytes

    @cached_property
    def sha256(self) -> str:
        """The digest of the archive."""
        return hashlib.sha256(self.content).hexdigest()


def build() -> BuiltWheel:
    """Return this package as a wheel.

    Raises:
        ConfigError: The package is not installed, or its installation is older than cloud runs.
    """
    files = _package_files()
    meta = _distribution()
    version = meta.version
    entry_points = meta.read_text("entry_points.txt") or ""
    if "SkyJobEnvironment" not in entry_points:
        raise ConfigError(f"the installation of {NAME} {version} is older than its cloud runs. Install it again.")
    info = f"rsb_cluster-{version}.dist-info"
    files[f"{info}/METADATA"] = (meta.read_text("METADATA") or "").encode()
    files[f"{info}/WHEEL"] = _WHEEL.encode()
    files[f"{info}/entry_points.txt"] = entry_points.encode()
    record = [f"{name},sha256={_record_hash(files[name])},{len(files[name])}" for name in sorted(files)]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as made:
        for name in sorted(files, key=lambda name: (name.startswith(info), name)):  # its metadata comes last (PEP 427)
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            made.writestr(entry, files[name])
    return BuiltWheel(f"rsb_cluster-{version}-py3-none-any.whl", archive.getvalue())


def pins() -> tuple[str, ...]:
    """Return the installed versions of all direct and indirect dependencies, as ``torch==2.6.0``.

    A local version label (``2.6.0+cpu``) is left out: a login node without a GPU has another build of the same version.
    """
    found: dict[str, str] = {}
    todo = [NAME]
    while todo:
        for requirement in importlib.metadata.requires(todo.pop()) or []:
            name = _normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0])
            if name in found or name == NAME or "extra ==" in requirement:
                continue
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue  # not required on this platform
            found[name] = version.partition("+")[0]
            todo.append(name)
    return tuple(f"{name}=={found[name]}" for name in sorted(found))


def _package_files() -> dict[str, bytes]:
    """Return the package's files by their names in the archive, with the bundled recipes and jobs."""
    root = Path(rsb_cluster.__file__).parent
    folders = [(root, "rsb_cluster")]
    folders += [(catalog.bundled_dir(kind), f"rsb_cluster/_bundled/{kind}") for kind in ("recipes", "jobs")]
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for folder, prefix in folders
        for path in folder.rglob("*")
        if path.is_file() and not _is_excluded(path.relative_to(folder))
    }


def _is_excluded(path: Path) -> bool:
    return path.suffix == ".pyc" or path.parts[0] == "_bundled" or any(part.startswith(".") for part in path.parts)


def _distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(f"{NAME} is not installed, so its dependencies are unknown. Use 'pip install .'") from error


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
