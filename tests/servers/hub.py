"""A folder as a data set of a Hugging Face Hub: the few requests of its API that reading ``hf://`` makes."""

from __future__ import annotations

import json
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.servers.web import HttpServer

NAME = "someone/set"
COMMIT = "0" * 40


class Hub(HttpServer):
    """A context manager.

    Args:
        folder: What is in the data set, which ``hf://datasets/someone/set`` names.

    Attributes:
        env: What makes ``huggingface_hub`` talk to it.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(partial(_Handler, folder))
        self.env = {"HF_ENDPOINT": self.url}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, *args: Any) -> None:
        self._folder = folder
        super().__init__(*args)

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        file, tree = f"/datasets/{NAME}/resolve/main/", f"/api/datasets/{NAME}/tree/main"
        if path == f"/api/datasets/{NAME}":
            self._answer(200, json.dumps({"id": NAME, "sha": COMMIT}).encode(), {})
        elif path.startswith(file) and (found := self._folder / path.removeprefix(file)).is_file():
            self._file(found.read_bytes())
        elif path.startswith(tree) and (found := self._folder / path.removeprefix(tree).strip("/")).is_dir():
            self._answer(200, json.dumps([self._entry(inside) for inside in sorted(found.iterdir())]).encode(), {})
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound" if NAME in path else "RepoNotFound"})

    def _entry(self, path: Path) -> dict[str, Any]:
        kind = "directory" if path.is_dir() else "file"
        return {"type": kind, "path": str(path.relative_to(self._folder)), "size": path.stat().st_size, "oid": COMMIT}

    def _file(self, content: bytes) -> None:
        if "Range" not in self.headers:
            self._answer(200, content, {})
            return
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self._answer(206, part, {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
