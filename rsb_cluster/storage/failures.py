"""Translates the errors of file systems and of clients of object stores to ours, with what to do next."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rsb_cluster.errors import AccessError, MissingError, RsbError, StorageError
from rsb_cluster.storage.local_files import describe_access
from rsb_cluster.storage.location import PACKAGES, bucket_of, is_s3, scheme_of
from rsb_cluster.storage.redact import redact
from rsb_cluster.storage.s3_settings import ANONYMOUS, REQUESTER_PAYS, endpoint_url, forget_credentials, s3_settings
from rsb_cluster.storage.transfer import TransferCancelled

_ODD = dict.fromkeys((errno.ENXIO, errno.ELOOP), "It is a pipe, a socket or a link to itself: remove it.")
_HINTS = (
    _ODD
    | dict.fromkeys(
        (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENAMETOOLONG), "Choose another folder."
    )
    | dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "Free some space, or choose another folder.")
)

# What S3 says by a code: our error, and what to do.
_RENEW = (AccessError, "the credentials have expired. Renew them (AWS_SESSION_TOKEN, 'aws sso login').")
_REGION = (StorageError, "the bucket is in another region. Set AWS_REGION to the bucket's.")
_CODES: dict[str, tuple[type[StorageError], str]] = (
    dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"), _RENEW)
    | dict.fromkeys(("AuthorizationHeaderMalformed", "PermanentRedirect", "301", "IllegalLocationConstraint"), _REGION)
    | {"RequestTimeTooSkewed": (AccessError, "this machine's clock differs from the server's. Set the clock.")}
)
_CLIENTS = ("botocore", "aiobotocore", "s3fs", "aiohttp")


@contextmanager
def translated_errors(url: str) -> Iterator[None]:
    """Translate the errors of a block that uses a URL; an error of ours, and a bug, is raised as it is."""
    try:
        yield
    except (RsbError, TransferCancelled):
        raise
    except Exception as error:
        translated = _translate(url, error)
        if translated is None:
            raise
        raise translated from error


def _translate(url: str, error: Exception) -> StorageError | None:
    """Return our error for one of a library; None for a bug."""
    if is_s3(url) and (found := _s3_error(url, error)) is not None:
        return found
    if isinstance(error, FileNotFoundError):
        on_s3 = " (and, on S3, the bucket's name)" if is_s3(url) else ""
        return MissingError(f"there is nothing at {url}. Check the path{on_s3}.")
    if isinstance(error, PermissionError):
        return AccessError(f"not allowed to use {url}: {redact(str(error))}. {_access_hint(url)}")
    if scheme_of(url) in PACKAGES:  # of many libraries, each with errors of its own
        return StorageError(f"cannot read {url}: {redact(str(error)) or type(error).__name__}. Check the URL.")
    if isinstance(error, OSError):
        hint = _HINTS.get(error.errno or 0, "Try again later.")
        return StorageError(f"cannot use {url}: {redact(str(error))}. {hint}")
    if type(error).__module__.partition(".")[0] in _CLIENTS:
        return StorageError(
            f"cannot use {url}: {redact(str(error))}. Check AWS_ENDPOINT_URL, the credentials and the network."
        )
    return None


def _s3_error(url: str, error: Exception) -> StorageError | None:
    """Return the error for what is known to go wrong with S3; None for anything else."""
    code, text = error_code(error), redact(str(error))
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return StorageError(
            f"cannot use {url}: the certificate of {endpoint_url() or 'S3'} is not trusted ({_reason(text)}). Set "
            "AWS_CA_BUNDLE to the PEM file of the authority that signed it."
        )
    if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
        return StorageError(
            f"cannot use {url}: {endpoint_url()} does not speak https. Set AWS_ENDPOINT_URL to http://, or to another "
            "port."
        )
    if "ResponseParserError" in _kinds(error):
        return StorageError(
            f"cannot use {url}: what answers at {endpoint_url()} is not S3. Check host and port of AWS_ENDPOINT_URL."
        )
    if code == "NoSuchBucket":
        where = endpoint_url() or "S3"
        return MissingError(
            f"there is nothing at {url}. There is no bucket '{bucket_of(url)}' at {where}: create it, or check "
            "its name and AWS_ENDPOINT_URL."
        )
    if isinstance(error, RecursionError):  # botocore follows redirects to other regions without an end
        code = "PermanentRedirect"
    if code in _CODES:
        kind, advice = _CODES[code]
        what = "not allowed to" if kind is AccessError else "cannot"
        return kind(f"{what} use {url}: S3 says {code}, {text}: {advice}")
    if isinstance(error, PermissionError) and s3_settings(bucket_of(url)).lacks_credentials:
        forget_credentials()
        return StorageError(
            f"cannot use {url}: it is not public, and no credentials were found. Set AWS_PROFILE, or AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY."
        )
    if isinstance(error, OSError) and error.errno == errno.EINVAL and (code == "400" or "Bad Request" in text):
        # S3's response to HEAD has no body that could say ExpiredToken, InvalidToken or that the region is wrong.
        return AccessError(f"not allowed to use {url}: S3 says 400, Bad Request. Check AWS_REGION. {_access_hint(url)}")
    return None


def error_code(error: BaseException | None) -> str:
    """Return S3's code of an error, or of that which caused it; empty if it has none."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code", ""))
        error = error.__cause__
    return ""


def _kinds(error: BaseException | None) -> list[str]:
    kinds = []
    while error is not None:
        kinds.append(type(error).__name__)
        error = error.__cause__ or error.__context__
    return kinds


def _reason(text: str) -> str:
    """Return OpenSSL's reason in a message: ``self-signed certificate in certificate chain``."""
    return text.rpartition("certificate verify failed: ")[2].partition(" (_ssl")[0]


def _access_hint(url: str) -> str:
    if "://" not in url:
        return f"Check the permissions: {describe_access(Path(url))}."
    if not is_s3(url):
        return "Check the credentials."
    return (
        f"Set {ANONYMOUS} if the bucket is public, or {REQUESTER_PAYS} if its readers pay. "
        "Check AWS_PROFILE, whether the credentials have expired, and the bucket's policy."
    )
