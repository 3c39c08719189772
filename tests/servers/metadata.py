"""A stand-in for the metadata service of a cloud's machine: interruption notices, and on AWS the machine's role.

Amazon's answers are those of its user guide: 401 without a token, 404 while there is no notice. Standard library only:
``python metadata.py CLOUD FOLDER`` is the service of one host, at the clouds' own address.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

MACHINE = "vmss_3"
# What the service says, if there is anything to say; and the access key of the machine's role, as JSON.
NOTICE, ROLE = "notice", "role"
_ROLES = "/latest/meta-data/iam/security-credentials/"


def aws_notice(time: str) -> str:
    return json.dumps({"action": "terminate", "time": time})


def azure_notice(not_before: str, machine: str = MACHINE, kind: str = "Preempt") -> str:
    event = {
        "EventId": "A123BC45-1234-5678-AB90-ABCDEF123456", "EventStatus": "Scheduled", "EventType": kind,
        "ResourceType": "VirtualMachine", "Resources": ["vmss_1", machine], "NotBefore": not_before,
    }  # fmt: skip
    return json.dumps({"DocumentIncarnation": 2, "Events": [event]})


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        if self.server.cloud != "aws" or self.path != "/latest/api/token":
            return self._answer(404)
        if not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
            return self._answer(400)
        return self._answer(200, self.server.token)

    def do_GET(self) -> None:
        path, notice = self.path.partition("?")[0], self.server.notice()
        if self.server.cloud == "aws":
            if self.headers.get("X-aws-ec2-metadata-token") != self.server.token:
                return self._answer(401)
            if path == "/latest/meta-data/spot/instance-action" and notice:
                return self._answer(200, notice)
            if path == _ROLES and self.server.role():
                return self._answer(200, ROLE)
            if path == _ROLES + ROLE:
                return self._answer(200, self.server.role())
        elif self.server.cloud == "gcp":
            if self.headers.get("Metadata-Flavor") != "Google":
                return self._answer(403)
            if path == "/computeMetadata/v1/instance/preempted":
                return self._answer(200, notice or "FALSE")
        elif self.server.cloud == "azure":
            if self.headers.get("Metadata") != "true" or "api-version=" not in self.path:
                return self._answer(400)
            if path == "/metadata/instance/compute/name":
                return self._answer(200, MACHINE)
            if path == "/metadata/scheduledevents":
                return self._answer(200, notice or '{"DocumentIncarnation":1,"Events":[]}')
        return self._answer(404)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, cloud: str, folder: Path, address: tuple[str, int]) -> None:
        self.cloud, self._folder, self.token = cloud, folder, secrets.token_hex(8)
        super().__init__(address, _Handler)

    def notice(self) -> str:
        return self._read(NOTICE)

    def role(self) -> str:
        return self._read(ROLE)

    def _read(self, name: str) -> str:
        path = self._folder / name
        return path.read_text() if path.exists() else ""


class Metadata:
    """The service on a free port of this machine; a context manager."""

    def __init__(self, cloud: str, folder: Path) -> None:
        self._server = _Server(cloud, folder, ("127.0.0.1", 0))
        self._file = folder / NOTICE
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def announce(self, text: str) -> None:
        """Say this from now on; nothing where it is empty."""
        self._file.with_suffix(".tmp").write_text(text)
        self._file.with_suffix(".tmp").replace(self._file)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


if __name__ == "__main__":
    _Server(sys.argv[1], Path(sys.argv[2]), ("169.254.169.254", 80)).serve_forever()
