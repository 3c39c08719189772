"""Streams S3 objects through botocore's plain client, which needs a fraction of the CPU time of s3fs.

A response that breaks off is resumed with a range request from that byte. Retries are made here and in no layer below,
so that they are bounded, logged, and can be cancelled from another thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any, NoReturn, TypeVar

from rsb_cluster import __version__
from rsb_cluster.errors import StorageError
from rsb_cluster.storage import patience
from rsb_cluster.storage.s3_settings import S3Settings, s3_settings
from rsb_cluster.storage.transfer import Transfer, backoff_s

log = logging.getLogger(__name__)
T = TypeVar("T")

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30  # without a byte
MAX_ATTEMPTS = 9  # in a row, without PROGRESS_BYTES in between
PROGRESS_BYTES = 1 << 20
FIRST_BACKOFF_S = 0.5  # doubled after each attempt: 64 to 128 s in all, so a server may be unreachable for a minute

PAGE_KEYS = 1000  # of a listing, as many as S3 gives

_TRANSIENT_STATUS = (429, 500, 502, 503, 504)
_TRANSIENT_CODES = ("InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/")

_local = threading.local()  # .transfer: the transfer whose request this thread is sending
_lock = threading.Lock()


def stream_object(
    bucket: str, key: str, start: int, stop: int | None, *, chunk: int, transfer: Transfer
) -> Iterator[bytes]:
    """Yield the bytes ``[start, stop)`` of an object, fewer where it ends before, in pieces of at most ``chunk``.

    Raises:
        OSError, botocore.exceptions.BotoCoreError: All attempts failed, or the error is permanent.
        StorageError: The object was replaced after the first piece.
        TransferCancelled: ``transfer.cancel()`` was called.
    """
    from botocore.exceptions import ClientError, IncompleteReadError

    url = f"s3://{bucket}/{key}"
    position, last_progress, attempts = start, start, 0
    etag: str | None = None
    while stop is None or position < stop:
        body, settings = None, s3_settings(bucket)
        patience.check(settings.endpoint)
        try:
            transfer.check()
            response = _get(settings, bucket, key, position, stop, transfer)
            patience.note_answer(settings.endpoint)
            if response is None:  # the object ends before the range
                if etag is not None:
                    raise _replaced_error(url)
                return
            body, end, new_etag = response
            # Compared here, not by If-Match: Ceph 16 accepts that only without the quotes that the standard requires.
            if etag is not None and new_etag != etag:
                raise _replaced_error(url)
            etag = new_etag
            first = position
            while position < end:
                content = body.read(min(chunk, end - position))
                if not content:
                    raise IncompleteReadError(actual_bytes=position - first, expected_bytes=end - first)
                position += len(content)
                yield content
                transfer.check()
            return
        except Exception as error:
            transfer.check()  # the error may come from cancel(), which shuts the connection
            if position - last_progress >= PROGRESS_BYTES:
                attempts, last_progress = 0, position
            attempts += 1
            if patience.is_spent(settings.endpoint, error, attempts, MAX_ATTEMPTS) or not _is_transient(error):
                _raise_as_s3fs(error)
            pause_s = backoff_s(FIRST_BACKOFF_S, attempts)
            # Only the code: botocore's message claims that there were no retries.
            reason = error.response["Error"].get("Code") if isinstance(error, ClientError) else error
            where = f"{url} failed at byte {position} ({reason})"
            log.warning("%s. Attempt %d of %d in %.1f s", where, attempts + 1, MAX_ATTEMPTS, pause_s)
            transfer.retries += 1
            transfer.sleep(pause_s)
        finally:
            transfer.watch(None)
            if body is not None:
                body.close()


def create_object(bucket: str, key: str, content: bytes) -> bool | None:
    """Write an object if the key does not exist.

    Returns:
        False if another object exists; None if the server does not support ``If-None-Match``.
    """
    from botocore.exceptions import ClientError

    settings = s3_settings(bucket)
    client, payer = _client(settings), settings.request()

    def create() -> bool | None:
        try:
            client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*", **payer)
        except ClientError as error:
            code = error.response["Error"].get("Code")
            if code == "NotImplemented":
                return None
            # 409: another writer is writing the object at this moment.
            if code not in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                raise
        # A retried request may find the object that it wrote; and a server may have ignored the condition.
        stored: bytes = client.get_object(Bucket=bucket, Key=key, **payer)["Body"].read()
        return stored == content

    return _retry(bucket, create)


def list_objects(bucket: str, prefix: str) -> dict[str, str]:
    """Return the keys with a prefix, and the ETag of each: another one after the object was written again."""
    pages = _pages(bucket, Prefix=prefix)
    return {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", ())}


def list_folders(bucket: str, prefix: str, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return what `list_objects` does, for several folders below a prefix: neighbours share a page of a thousand keys.

    The keys of each folder are relative to it; a folder without any is an empty one.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    wanted = sorted((f"{prefix}{name}/" for name in found), key=str.encode)  # S3 sorts by bytes
    after = ""
    while wanted:
        # What lies between two folders is jumped over.
        page = next(_pages(bucket, Prefix=prefix, StartAfter=max(after, wanted[0], key=str.encode)))
        items = page.get("Contents", ())
        for item in items:
            name, _, rest = item["Key"][len(prefix) :].partition("/")
            if rest and name in found:
                found[name][rest] = item["ETag"]
        if not items or not page.get("IsTruncated"):
            break
        after = items[-1]["Key"]
        wanted = [folder for folder in wanted if folder.encode() > after.encode() or after.startswith(folder)]
    return found


def list_folder(bucket: str, prefix: str) -> list[tuple[str, bool]]:
    """Return the names directly below a prefix (empty, or with a slash at its end), and whether each is an object."""
    found = []
    for page in _pages(bucket, Prefix=prefix, Delimiter="/"):
        found += [(item["Prefix"][len(prefix) : -1], False) for item in page.get("CommonPrefixes", ())]
        found += [(item["Key"][len(prefix) :], True) for item in page.get("Contents", ())]
    return found


def _pages(bucket: str, **request: Any) -> Iterator[dict[str, Any]]:
    """Yield the pages of a listing."""
    settings = s3_settings(bucket)
    client = _client(settings)
    request |= {"Bucket": bucket, "MaxKeys": PAGE_KEYS, **settings.request()}
    while True:
        page: dict[str, Any] = _retry(bucket, partial(client.list_objects_v2, **request))
        yield page
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def require_answer(bucket: str) -> None:
    """Ask the bucket's server for a sign of life, if it owes one (`patience`): other clients know no such haste."""
    settings = s3_settings(bucket)
    if not patience.needs_answer(settings.endpoint):
        return
    client = _client(settings)
    try:
        _retry(bucket, partial(client.head_bucket, Bucket=bucket))
    except Exception as error:
        if patience.is_unreachable(error):
            raise
        patience.note_answer(settings.endpoint)


def _retry(bucket: str, request: Callable[[], T]) -> T:
    """Make a request, again after a transient error; raise an error of S3 as s3fs raises it."""
    endpoint, attempts = s3_settings(bucket).endpoint, 0
    while True:
        patience.check(endpoint)
        try:
            found = request()
            patience.note_answer(endpoint)
            return found
        except Exception as error:
            attempts += 1
            if patience.is_spent(endpoint, error, attempts, MAX_ATTEMPTS) or not _is_transient(error):
                _raise_as_s3fs(error)
            time.sleep(backoff_s(FIRST_BACKOFF_S, attempts))


def _get(
    settings: S3Settings, bucket: str, key: str, position: int, stop: int | None, transfer: Transfer
) -> tuple[Any, int, str | None] | None:
    """Request a range; return its body, the byte after its last, and the ETag. None if the object ends before it."""
    from botocore.exceptions import ClientError

    transfer.requests += 1
    _local.transfer = transfer
    try:
        part = f"bytes={position}-{'' if stop is None else stop - 1}"
        response = _client(settings).get_object(Bucket=bucket, Key=key, Range=part, **settings.request())
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
            return None
        raise
    finally:
        _local.transfer = None
    found = _CONTENT_RANGE.match(response.get("ContentRange", ""))
    if found is None or int(found[1]) != position:
        response["Body"].close()
        raise StorageError(f"s3://{bucket}/{key}: the server ignores range requests. Check AWS_ENDPOINT_URL.")
    return response["Body"], int(found[2]) + 1, response.get("ETag")


def _raise_as_s3fs(error: Exception) -> NoReturn:
    """Raise an error of S3 as s3fs does, so that the store handles one kind; any other as it is."""
    from botocore.exceptions import ClientError

    if isinstance(error, ClientError):
        from s3fs.errors import translate_boto_error  # takes half a second, which a command without errors saves

        raise translate_boto_error(error) from error
    raise error


def _replaced_error(url: str) -> StorageError:
    return StorageError(f"{url} was replaced while it was read. Wait until it is no longer written, then try again.")


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    import urllib3.exceptions
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _TRANSIENT_STATUS or error.response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    if any(reason in str(error) for reason in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")):
        return False
    broken = (
        exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError,
        exceptions.CredentialRetrievalError, urllib3.exceptions.HTTPError, OSError,
    )  # fmt: skip
    return isinstance(error, broken)


def _client(settings: S3Settings) -> Any:
    with _lock:  # creating a client is not thread-safe; using one is
        return _new_client(settings, os.getpid())


@cache
def _new_client(settings: S3Settings, pid: int) -> Any:
    """One client per settings and process: connections do not survive a fork."""
    import botocore.session
    from botocore import UNSIGNED
    from botocore.awsrequest import (
        AWSHTTPConnection,
        AWSHTTPConnectionPool,
        AWSHTTPSConnection,
        AWSHTTPSConnectionPool,
    )
    from botocore.config import Config

    client = botocore.session.Session().create_client(
        "s3",
        region_name=settings.region,
        endpoint_url=settings.endpoint,
        config=Config(
            signature_version=UNSIGNED if settings.is_anonymous else None,
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": 1},  # stream_object() retries
            max_pool_connections=64,
            user_agent=f"rsb-cluster/{__version__}",  # botocore's own takes a fifth of a request's CPU time
            **settings.config(),
        ),
    )

    client.meta.events.register("before-parse.s3.ListObjectsV2", _take_files)

    class Plain(_CancellableConnection, AWSHTTPConnection):  # type: ignore[misc]  # botocore is untyped
        pass

    class Secure(_CancellableConnection, AWSHTTPSConnection):  # type: ignore[misc]
        pass

    class PlainPool(AWSHTTPConnectionPool):  # type: ignore[misc]
        ConnectionCls = Plain

    class SecurePool(AWSHTTPSConnectionPool):  # type: ignore[misc]
        ConnectionCls = Secure

    # The one place that uses botocore's private parts: it cannot cancel a request from another thread. Without these
    # pools everything works, but a cancelled reader that waits for a response notices only at the timeout.
    with contextlib.suppress(AttributeError):
        client._endpoint.http_session._pool_classes_by_scheme.update(http=PlainPool, https=SecurePool)
    return client


def _take_files(response_dict: dict[str, Any], customized_response_dict: dict[str, Any], **_: Any) -> None:
    """Take the names and tags of files out of a page of a listing, whose other fields botocore parses for long."""
    from xml.etree import ElementTree

    if response_dict["status_code"] != 200:
        return
    try:
        page = ElementTree.fromstring(response_dict["body"])
    except ElementTree.ParseError:  # botocore says what is wrong
        return
    namespace = page.tag.rpartition("}")[0] + "}" if "}" in page.tag else ""
    files = [node for node in page if node.tag == f"{namespace}Contents"]
    if files:
        page[:] = [node for node in page if node.tag != f"{namespace}Contents"]
        response_dict["body"] = ElementTree.tostring(page)
        fields = ("Key", "ETag")
        customized_response_dict["Contents"] = [
            {name: node.findtext(f"{namespace}{name}") for name in fields} for node in files
        ]


class _CancellableConnection:
    """A connection that registers with the transfer it serves, so that cancel() can shut it."""

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self._register()

    def request(self, *args: Any, **kwargs: Any) -> Any:
        self._register()
        return super().request(*args, **kwargs)  # type: ignore[misc]

    def _register(self) -> None:
        transfer = getattr(_local, "transfer", None)
        if transfer is not None:
            transfer.watch(self)
