"""Which URLs are accepted: folders of this machine, buckets on S3, and what is only read as data."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rsb_cluster.errors import ConfigError, expand_home

S3_SCHEMES = ("s3", "s3a")
# What is only read, through fsspec: the package that it needs for the scheme.
PACKAGES = {"hf": "huggingface-hub", "gs": "gcsfs", "az": "adlfs", "http": "aiohttp", "https": "aiohttp"}

# 's3:/bucket' as well, which a shell script or a path library makes of 's3://bucket'.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//?)(.*)", re.DOTALL)


def normalise(url: str | Path) -> str:
    """Return the absolute path of a folder of this machine, or a URL, without a slash at the end.

    Raises:
        ConfigError: It is neither a path nor a URL of a known kind.
    """
    text = str(url)
    if not text:
        raise ConfigError("the path of a folder is empty. Name one; the current folder is '.'.")
    found = _SCHEME.fullmatch(text)
    if found is None:
        return _without_slash(str(expand_home(text).absolute()))
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    if scheme == "file" and slashes == "//" and rest.startswith("/"):
        return _without_slash(unquote(rest))
    if scheme not in (*S3_SCHEMES, *PACKAGES):
        raise ConfigError(
            f"cannot use {text}: '{scheme}:' is none of s3://, file:///, {', '.join(f'{s}://' for s in PACKAGES)}. "
            f"Write ./{text} if it is a folder here."
        )
    where = rest.strip("/")
    if slashes != "//" or rest.startswith("/") or not where:
        raise ConfigError(
            f"cannot use {text}: two slashes and a name belong behind the colon, as {scheme}://{where or 'NAME'}."
        )
    if scheme in ("http", "https") and (urlsplit(text).query or urlsplit(text).fragment):
        raise ConfigError(f"cannot use {text}: a folder's URL has no '?' and no '#'. Give the URL up to there.")
    return f"{scheme}://{rest.rstrip('/')}"


def scheme_of(url: str) -> str:
    """Return the scheme of a normalised URL; empty for a path."""
    return url.partition("://")[0] if "://" in url else ""


def is_s3(url: str) -> bool:
    """Whether a normalised URL is on S3."""
    return scheme_of(url) in S3_SCHEMES


def bucket_of(url: str) -> str:
    """Return the bucket of a normalised URL on S3."""
    return url.partition("://")[2].partition("/")[0]


def refuse_read_only(url: str, what: str) -> None:
    """Refuse a normalised URL that is only read.

    Args:
        url: The URL.
        what: What would be written there, in the plural: ``runs``.

    Raises:
        ConfigError: It is only read.
    """
    if (scheme := scheme_of(url)) in PACKAGES:
        raise ConfigError(
            f"cannot keep {what} at {url}: {scheme}:// is only read, as data. Use a folder or s3://bucket/folder."
        )


def _without_slash(path: str) -> str:
    return path.rstrip("/") or "/"
