"""Streams objects of S3 through botocore's plain client: reading a shard costs a fraction of what s3fs takes for it.

An answer that breaks off is gone on with by a range from the byte where it broke. Retries are made here and nowhere
below, so that they are bounded, logged, and can be cut short from another thread.
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
TRIES = 9  # in a row, without PROGRESS_BYTES in between
PROGRESS_BYTES = 1 << 20
FIRST_PAUSE_S = 0.5  # doubled after each try: 64 to 128 s in all, so that a server may be gone for a minute

_TRANSIENT_STATUS = (429, 500, 502, 503, 504)
_TRANSIENT_CODES = ("InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/")

_local = threading.local()  # .transfer: whose request this thread is sending
_lock = threading.Lock()


def endpoint_url() -> str | None:
    """Return the S3 endpoint that the environment names; None for Amazon's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def stream_object(
    bucket: str, key: str, start: int, stop: int | None, *, chunk: int, transfer: Transfer
) -> Iterator[bytes]:
    """Yield the bytes ``[start, stop)`` of an object, fewer where it ends before, in pieces of at most ``chunk``.

    Raises:
        OSError, botocore.exceptions.BotoCoreError: All tries failed, or there is no sense in another.
        StorageError: The object was replaced after the first piece.
        TransferCancelled: ``transfer.cancel()`` was called.
    """
    from botocore.exceptions import ClientError, IncompleteReadError
    from s3fs.errors import translate_boto_error

    url = f"s3://{bucket}/{key}"
    position, marked, tries = start, start, 0
    etag: str | None = None
    while stop is None or position < stop:
        body = None
        try:
            transfer.check()
            answer = _get(bucket, key, position, stop, transfer)
            if answer is None:  # the object ends before the range
                if etag is not None:
                    raise _replaced(url)
                return
            body, end, new_etag = answer
            # Compared here, not by If-Match: Ceph 16 takes that only without the quotes that the standard asks for.
            if etag is not None and new_etag != etag:
                raise _replaced(url)
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
            transfer.check()  # the error may be but the connection that cancel() has shut
            if position - marked >= PROGRESS_BYTES:
                tries, marked = 0, position
            tries += 1
            if tries >= TRIES or not _is_transient(error):
                if isinstance(error, ClientError):  # as s3fs puts it, so that the store has one kind of error to know
                    raise translate_boto_error(error) from error
                raise
            pause_s = FIRST_PAUSE_S * 2 ** (tries - 1) * random.uniform(0.5, 1)  # not all readers in step
            # Without botocore's sentence around a refusal: it says that there were no retries.
            reason = error.response["Error"].get("Code") if isinstance(error, ClientError) else error
            log.warning("%s broke at byte %d (%s). Try %d in %.1f s", url, position, reason, tries + 1, pause_s)
            transfer.retries += 1
            transfer.sleep(pause_s)
        finally:
            transfer.watch(None)
            if body is not None:
                body.close()


def create_object(bucket: str, key: str, content: bytes) -> bool | None:
    """Write an object where none is.

    Returns:
        False where another one is already; None where the server does not know ``If-None-Match``.
    """
    from botocore.exceptions import ClientError
    from s3fs.errors import translate_boto_error

    client = _client(endpoint_url())
    tries = 0
    while True:
        try:
            try:
                client.put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
            except ClientError as error:
                code = error.response["Error"].get("Code")
                if code == "NotImplemented":
                    return None
                # 409: somebody else is writing it just now.
                if code not in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                    raise
            # A request that was sent twice finds its own object; and a server may have ignored the condition.
            there: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
            return there == content
        except Exception as error:
            tries += 1
            if tries >= TRIES or not _is_transient(error):
                if isinstance(error, ClientError):
                    raise translate_boto_error(error) from error
                raise
            time.sleep(FIRST_PAUSE_S * 2 ** (tries - 1) * random.uniform(0.5, 1))


def _get(
    bucket: str, key: str, position: int, stop: int | None, transfer: Transfer
) -> tuple[Any, int, str | None] | None:
    """Ask for a range: its body, the byte after its last, and the ETag. None where the object ends before it."""
    from botocore.exceptions import ClientError

    transfer.requests += 1
    _local.transfer = transfer
    try:
        last = "" if stop is None else stop - 1
        answer = _client(endpoint_url()).get_object(Bucket=bucket, Key=key, Range=f"bytes={position}-{last}")
    except ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
            return None
        raise
    finally:
        _local.transfer = None
    found = _CONTENT_RANGE.match(answer.get("ContentRange", ""))
    if found is None or int(found[1]) != position:
        answer["Body"].close()
        raise StorageError(f"s3://{bucket}/{key}: the server does not answer by ranges. Check AWS_ENDPOINT_URL.")
    return answer["Body"], int(found[2]) + 1, answer.get("ETag")


def _replaced(url: str) -> StorageError:
    return StorageError(f"{url} was replaced while it was read. Wait until nobody writes there, and try again.")


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
    with _lock:  # two threads must not both make one; a client itself is safe to share
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

    class Plain(_Watched, AWSHTTPConnection):  # type: ignore[misc]  # botocore is untyped
        pass

    class Secure(_Watched, AWSHTTPSConnection):  # type: ignore[misc]
        pass

    class PlainPool(AWSHTTPConnectionPool):  # type: ignore[misc]
        ConnectionCls = Plain

    class SecurePool(AWSHTTPSConnectionPool):  # type: ignore[misc]
        ConnectionCls = Secure

    # The one place that reaches into botocore: it has no way to end a request from outside. Without these pools all
    # works, but a cancelled reader that waits for an answer notices only at the time-out.
    with contextlib.suppress(AttributeError):
        client._endpoint.http_session._pool_classes_by_scheme.update(http=PlainPool, https=SecurePool)
    return client


class _Watched:
    """A connection that tells the transfer it serves, so that a cancel() can shut it."""

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self._tell()

    def request(self, *args: Any, **kwargs: Any) -> Any:
        self._tell()
        return super().request(*args, **kwargs)  # type: ignore[misc]

    def _tell(self) -> None:
        transfer = getattr(_local, "transfer", None)
        if transfer is not None:
            transfer.watch(self)
