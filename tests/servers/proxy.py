"""A proxy in front of an HTTP server that notes each request and breaks answers on demand."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Self

from tests.servers.tls import Certificate

ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>broken by the proxy</Message></Error>"


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    Attributes:
        status: Answer this instead of asking the server; 0 to ask it.
        code: S3's name of the error.
        wait_s: Wait before the answer's first byte.
        cut: Break the connection after so many bytes of the body: of the answer's, or of a PUT's own.
        reset: Break it by RST, not by FIN.
        stall_s: Wait so long after the ``cut`` bytes; then go on instead of breaking.
    """

    status: int = 0
    code: str = "SlowDown"
    wait_s: float = 0
    cut: int | None = None
    reset: bool = False
    stall_s: float = 0


@dataclass(frozen=True)
class Request:
    """One request as it came: ``GET``, the path, first and last byte of its range, and the headers in lower case."""

    method: str
    path: str
    first: int | None
    last: int | None
    headers: str = ""


class FaultyProxy:
    """A context manager. A request that fits takes the next fault in ``faults``; where there is none, ``always``.

    Args:
        target: The server's URL.
        matching: What the path of a request that fits holds.
        methods: Those of a request that fits.
        certificate: Clients come by https; the server is asked by http all the same.
    """

    def __init__(
        self,
        target: str,
        matching: str = "",
        methods: Collection[str] = ("GET",),
        certificate: Certificate | None = None,
    ) -> None:
        host, port = target.removeprefix("http://").split(":")
        self._target = (host, int(port))
        self._matching, self._methods = matching, methods
        self.always = Fault()
        self.requests: list[Request] = []
        self.body_bytes = 0  # that were sent to clients, all answers together
        self.faults: deque[Fault] = deque()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.port}"
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate.path, certificate.key)

    def __enter__(self) -> Self:
        self._start(self._accept, self._listener)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        self.refuse()
        for thread in self._threads:
            thread.join(10)

    def break_next(self, *faults: Fault) -> None:
        """Queue faults for the requests to come."""
        self.faults.extend(faults)

    def gets(self) -> list[Request]:
        """The matching GETs so far."""
        return [r for r in self.requests if r.method == "GET" and self._matching in r.path]

    def refuse(self) -> None:
        """Refuse new connections and break the open ones, until `accept_again`."""
        with self._lock:
            broken, self._sockets = [*self._sockets, self._listener], set()
            for sock in broken:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()

    def accept_again(self) -> None:
        """End a `refuse`."""
        self._listener = self._listen(self.port)
        self._start(self._accept, self._listener)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
        return listener

    def _start(self, function: object, *args: object) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                if listener.fileno() == -1:  # `refuse` came between: it would have missed this one, which lived on
                    client.close()
                    return
                self._sockets.add(client)
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        server = socket.create_connection(self._target, 30)
        with self._lock:
            self._sockets.add(server)
        try:
            if self._tls is not None:
                plain, client = client, self._tls.wrap_socket(client, server_side=True)
                with self._lock:
                    self._sockets = self._sockets - {plain} | {client}
            with client.makefile("rb") as from_client, server.makefile("rb") as from_server:
                while head := _read_head(from_client):
                    self._answer(head, client, server, from_client, from_server)
        except (OSError, ValueError, EOFError):
            pass
        finally:
            with self._lock:
                self._sockets -= {client, server}
            client.close()
            server.close()

    def _answer(self, head: bytes, client: socket.socket, server: socket.socket, from_client, from_server) -> None:  # type: ignore[no-untyped-def]
        method, path = head.split(b" ", 2)[:2]
        bounds = re.search(rb"\r\nRange: bytes=(\d+)-(\d*)\r", head, re.IGNORECASE)
        first, last = (int(b) if b else None for b in bounds.groups()) if bounds else (None, None)
        headers = head.decode("latin-1").partition("\r\n")[2].lower()
        request = Request(method.decode(), path.decode(), first, last, headers)
        with self._lock:
            self.requests.append(request)
            matches = request.method in self._methods and self._matching in request.path
            fault = (self.faults.popleft() if self.faults else self.always) if matches else Fault()
        if re.search(rb"\r\nExpect: 100-continue\r", head, re.IGNORECASE):
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.method == "PUT" and fault.cut is not None:
            from_client.read(min(fault.cut, _length(head)))
            raise EOFError
        body = from_client.read(_length(head))
        self._closing.wait(fault.wait_s)
        if fault.status:
            content = ERROR % fault.code.encode() if request.method != "HEAD" else b""
            client.sendall(b"HTTP/1.1 %d Broken\r\nContent-Length: %d\r\n\r\n" % (fault.status, len(content)) + content)
            return
        server.sendall(head + body)
        while (answer := _read_head(from_server)).startswith(b"HTTP/1.1 100 "):
            pass
        if re.search(rb"\r\nTransfer-Encoding: chunked\r", answer, re.IGNORECASE):
            client.sendall(answer)
            _pass_chunks(from_server, client)
            return
        left = 0 if request.method == "HEAD" else _length(answer)
        if fault.cut == 0 and not fault.stall_s:
            raise EOFError  # not even a header
        client.sendall(answer)
        sent = 0
        while left:
            if fault.cut is not None and sent >= fault.cut:
                self._closing.wait(fault.stall_s)
                if not fault.stall_s:
                    if fault.reset:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    raise EOFError
                fault = Fault()
            most = min(left, 1 << 18) if fault.cut is None else min(left, 1 << 18, fault.cut - sent)
            content = from_server.read(most)
            if not content:
                raise EOFError
            self.body_bytes += len(content)  # before, as the client may have all of it before this thread goes on
            client.sendall(content)
            sent += len(content)
            left -= len(content)


def _read_head(stream: Iterable[bytes]) -> bytes:
    """Read up to the empty line; an empty result is the connection's end."""
    head = b""
    for line in stream:
        head += line
        if line == b"\r\n":
            return head
    return b""


def _pass_chunks(source: BinaryIO, sink: socket.socket) -> None:
    """Hand on a body in chunks; listings come so. It is never cut."""
    size = 1
    while size:
        line = source.readline()
        size = int(line.split(b";")[0], 16)
        sink.sendall(line + source.read(size + 2))


def _length(head: bytes) -> int:
    found = re.search(rb"\r\nContent-Length: (\d+)\r", head, re.IGNORECASE)
    return int(found[1]) if found else 0
