"""Certificates of an authority that no machine knows, as of a server behind a company's own."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_NEW = ("openssl", "req", "-x509", "-nodes", "-days", "3650", "-newkey", "ec", "-pkeyopt")
_CURVE = "ec_paramgen_curve:prime256v1"


@dataclass(frozen=True)
class Certificate:
    """The certificate of a server, its key, and the certificate of the authority that signed it; PEM files."""

    path: Path
    key: Path
    authority: Path


def make_certificate(folder: Path, address: str = "127.0.0.1") -> Certificate:
    """Make an authority, and have it sign the certificate of a server at an address."""
    authority, signing = folder / "ca.pem", folder / "ca.key"
    made = Certificate(folder / "server.pem", folder / "server.key", authority)
    _openssl("/CN=rsb-cluster tests", authority, signing, "-addext", "keyUsage=critical,keyCertSign")
    _openssl(
        f"/CN={address}", made.path, made.key, "-CA", str(authority), "-CAkey", str(signing),
        "-addext", f"subjectAltName=IP:{address}", "-addext", "basicConstraints=critical,CA:FALSE",
    )  # fmt: skip
    return made


def _openssl(subject: str, path: Path, key: Path, *options: str) -> None:
    command = [*_NEW, _CURVE, "-subj", subject, "-keyout", str(key), "-out", str(path), *options]
    subprocess.run(command, check=True, capture_output=True)
