"""A web server of the files in a folder, with range requests, that can lack what such a server may lack."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class HttpServer:
    """A server on a free loopback port while the context lasts.

    Args:
        handler: Answers the requests.
    """

    def __init__(self, handler: Callable[..., BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class WebServer(HttpServer):
    """A context manager.

    Args:
        folder: What it serves.

    Attributes:
        url: Its address.
        ranges: Whether it answers range requests.
        listings: Whether it shows what is in a folder; else that is forbidden.
        broken: How many answers with content to break off in the middle.
        requests: Method, path and range of each request.
    """

    def __init__(self, folder: Path) -> None:
        self.ranges, self.listings, self.broken = True, True, 0
        self.requests: list[tuple[str, str, str]] = []
        super().__init__(partial(_Handler, self, directory=str(folder)))


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, web: WebServer, *args: Any, **options: Any) -> None:
        self._web = web
        super().__init__(*args, **options)

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._note()
        super().do_HEAD()

    def do_GET(self) -> None:
        self._note()
        path, wanted = Path(self.translate_path(self.path)), re.fullmatch(r"bytes=(\d+)-(\d*)", self._range())
        if not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if wanted and self._web.ranges:
            first, last = int(wanted[1]), min(last, int(wanted[2] or last))
            if first > last:
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        part = content[first : last + 1]
        if self._web.broken:
            self._web.broken -= 1
            part, self.close_connection = part[: len(part) // 2], True
        self.wfile.write(part)

    def list_directory(self, path: Any) -> Any:
        if not self._web.listings:
            return self.send_error(403)
        return super().list_directory(path)

    def _range(self) -> str:
        return str(self.headers.get("Range", ""))

    def _note(self) -> None:
        self._web.requests.append((self.command, self.path, self._range()))
