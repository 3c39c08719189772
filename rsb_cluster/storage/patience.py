"""How long a request waits for an S3 server that nobody can connect to: minutes on nodes, seconds at a terminal.

A node may start before its network does, and a training outlives the restart of a server. A command whose user waits
asks a server that has never answered it twice; whatever it asks next fails at once, with the same error. Once the
server has answered, a command is as patient as a node.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager

ATTEMPTS = 2
# How long the error is repeated without another try, s: a watching command notices that the server is there again.
KEPT_S = 10.0

_is_brief = False
_answered: set[str | None] = set()
_errors: dict[str | None, tuple[float, Exception]] = {}


@contextmanager
def brief() -> Iterator[None]:
    """Wait for seconds only, in all threads of this process, while the block runs."""
    global _is_brief
    _is_brief = True
    try:
        yield
    finally:
        _is_brief = False
        _answered.clear()
        _errors.clear()


def needs_answer(endpoint: str | None) -> bool:
    """Whether requests to an endpoint (None: Amazon's own) are brief: it has not answered this command yet."""
    return _is_brief and endpoint not in _answered


def check(endpoint: str | None) -> None:
    """Raise the error of the last attempts to connect, if they are not long past."""
    if needs_answer(endpoint) and endpoint in _errors:
        when, error = _errors[endpoint]
        if time.monotonic() < when + KEPT_S:
            raise copy.copy(error)


def note_answer(endpoint: str | None) -> None:
    """Note that the endpoint has answered, whatever it said."""
    if _is_brief:
        _answered.add(endpoint)


def is_spent(endpoint: str | None, error: Exception, attempts: int, most: int) -> bool:
    """Whether a request that has failed is not to be repeated.

    Args:
        endpoint: Where it was sent.
        error: The last error.
        attempts: The attempts so far.
        most: How many there are where nobody is brief.
    """
    if not is_unreachable(error):
        note_answer(endpoint)
    if not needs_answer(endpoint):
        return attempts >= most
    if attempts < min(ATTEMPTS, most):
        return False
    _errors[endpoint] = time.monotonic(), error
    return True


def is_unreachable(error: Exception) -> bool:
    """Whether no connection was made: no such name, no route, refused, or no answer in time."""
    from botocore import exceptions

    # Others, such as a response that breaks off, come from a server that is there.
    kinds = (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError, exceptions.ProxyConnectionError)
    return isinstance(error, kinds)
