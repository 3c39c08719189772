"""Streams S3 objects through botocore's plain client, which needs a fraction of the CPU time of s3fs.

A response that breaks off is resumed with a range request from that byte. Retries are made here and in no layer below,
so that they are bounded, logged, and can be cancelled from another thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

from rsb_cluster.errors import StorageError
from rsb_cluster.storage.transfer import Transfer

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30  # without a byte
MAX_ATTEMPTS = 9  # in a row, without PROGRESS_BYTES in between
PROGRESS_BYTES = 1 << 20
FIRST_BACKOFF_S = 0.5  # doubled after each attempt: 64 to 128 s in all, so a server may be unreachable for a minute

_TRANSIENT_STATUS = (429, 500, 502, 503, 504)
_TRANSIENT_CODES = ("InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/")

_local = threading.local()  # .transfer: the transfer whose request this thread is sending
_lock = threading.Lock()


def endpoint_url() -> str | None:
    """Return the S3 endpoint set in the environment; None for Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


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
    from s3fs.errors import translate_boto_error

    url = f"s3://{bucket}/{key}"
    position, last_progress, attempts = start, start, 0
    etag: str | None = None
    while stop is None or position < stop:
        body = None
        try:
            transfer.check()
            response = _get(bucket, key, position, stop, transfer)
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
            if attempts >= MAX_ATTEMPTS or not _is_transient(error):
                if isinstance(error, ClientError):  # as s3fs raises it, so that the store handles one kind of error
                    raise translate_boto_error(error) from error
                raise
            backoff_s = _backoff_s(attempts)
            # Only the code: botocore's message claims that there were no retries.
            reason = error.response["Error"].get("Code") if isinstance(error, ClientError) else error
            where = f"{url} failed at byte {position} ({reason})"
            log.warning("%s. Attempt %d of %d in %.1f s", where, attempts + 1, MAX_ATTEMPTS, backoff_s)
            transfer.retries += 1
            transfer.sleep(backoff_s)
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
    from s3fs.errors import translate_boto_error

    client = _client(endpoint_url())
    attempts = 0
    while True:
        try:
            try:
                client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
            except ClientError as error:
                code = error.response["Error"].get("Code")
                if code == "NotImplemented":
                    return None
                # 409: another writer is writing the object at this moment.
                if code not in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                    raise
            # A retried request may find the object that it wrote; and a server may have ignored the condition.
            stored: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
            return stored == content
        except Exception as error:
            attempts += 1
            if attempts >= MAX_ATTEMPTS or not _is_transient(error):
                if isinstance(error, ClientError):
                    raise translate_boto_error(error) from error
                raise
            time.sleep(_backoff_s(attempts))


def _backoff_s(attempts: int) -> float:
    """Return the pause after a number of failed attempts, with jitter so that readers do not retry in step."""
    return FIRST_BACKOFF_S * 2.0 ** (attempts - 1) * random.uniform(0.5, 1)


def _get(
    bucket: str, key: str, position: int, stop: int | None, transfer: Transfer
) -> tuple[Any, int, str | None] | None:
    """Request a range; return its body, the byte after its last, and the ETag. None if the object ends before it."""
    from botocore.exceptions import ClientError

    transfer.requests += 1
    _local.transfer = transfer
    try:
        last = "" if stop is None else stop - 1
        response = _client(endpoint_url()).get_object(Bucket=bucket, Key=key, Range=f"bytes={position}-{last}")
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


def _replaced_error(url: str) -> StorageError:
    return StorageError(f"{url} was replaced while it was read. Wait until it is no longer written, then try again.")


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    import urllib3.exceptions
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in _TRANSIENT_STATUS or error.response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    broken = (
        exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.IncompleteReadError,
        exceptions.CredentialRetrievalError, urllib3.exceptions.HTTPError, OSError,
    )  # fmt: skip
    return isinstance(error, broken)


def _client(endpoint: str | None) -> Any:
    with _lock:  # creating a client is not thread-safe; using one is
        return _new_client(endpoint, os.environ.get("AWS_PROFILE"), os.getpid())


@cache
def _new_client(endpoint: str | None, profile: str | None, pid: int) -> Any:
    """One client per endpoint and process: connections do not survive a fork."""
    import botocore.session
    from botocore.awsrequest import (
        AWSHTTPConnection,
        AWSHTTPConnectionPool,
        AWSHTTPSConnection,
        AWSHTTPSConnectionPool,
    )
    from botocore.config import Config

    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint,
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            retries={"total_max_attempts": 1},  # stream_object() retries
            max_pool_connections=64,
        ),
    )

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
