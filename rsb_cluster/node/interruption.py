"""Interruption notices: how a cloud tells a preemptible machine that it will take it back.

Each cloud says so in the metadata that only the machine itself can read, at one link-local address. What was published:

- AWS, EC2 user guide, "Spot Instance interruption notices": two minutes ahead, on a best-effort basis; IMDSv2 needs a
  token; 404 until there is a notice.
- Google Cloud, Compute Engine, "Spot VMs": 30 seconds between the notice and the end.
- Azure, "Scheduled Events for Linux VMs": 30 seconds at least; a machine sees the events of its whole scale set.

Standard library only: this runs beside training, and on machines where little else does.
"""

from __future__ import annotations

import email.utils
import http.client
import json
import os
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, ClassVar

METADATA_URL = "http://169.254.169.254"
# A test's own metadata service.
METADATA_ENV = "RSB_METADATA_URL"
ANSWER_S = 2.0
# A notice whose time is over for so long did not come true: the machine was stopped and started again, or spared.
STALE_S = 300.0

# Metadata must not go through a proxy, whatever the environment says.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Notice:
    """The word of a cloud that it will take this machine back.

    Attributes:
        source: Which cloud.
        deadline: When the machine goes, Unix time.
        text: What the cloud said.
    """

    source: str
    deadline: float
    text: str


class NoticeSource(ABC):
    """Where one cloud announces it.

    Args:
        url: Base of the metadata service; empty: the clouds' own address.
    """

    name: ClassVar[str]
    # The least that the cloud leaves from the notice to the end, where the notice does not say it.
    lead_s: ClassVar[float]

    def __init__(self, url: str = "") -> None:
        self._url = url or os.environ.get(METADATA_ENV) or METADATA_URL

    @abstractmethod
    def is_here(self) -> bool:
        """Whether this machine is that cloud's."""

    @abstractmethod
    def _ask(self) -> str:
        """Return what the cloud says now; empty where it says nothing."""

    @abstractmethod
    def _parse(self, text: str) -> float | None:
        """Return when the machine goes; 0 where that is not said, None where nothing is announced.

        Raises:
            ValueError: It is not what this cloud says.
        """

    def poll(self) -> Notice | None:
        """Return the notice for this machine, if there is one now; no answer, or one that makes no sense, is none."""
        return self.read(self._ask())

    def read(self, text: str) -> Notice | None:
        """Return the notice in what the cloud said, if it is one for this machine and still to come true."""
        try:
            deadline = self._parse(text)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return None
        if deadline is None or 0 < deadline < time.time() - STALE_S:
            return None
        return Notice(self.name, deadline or time.time() + self.lead_s, text)

    def _get(self, path: str, headers: Mapping[str, str], method: str = "GET") -> str:
        """Ask the metadata service; empty where it does not answer, or has nothing at that path."""
        request = urllib.request.Request(self._url + path, headers=dict(headers), method=method)
        try:
            with _OPENER.open(request, timeout=ANSWER_S) as answer:
                content: bytes = answer.read(1 << 20)
        except (OSError, http.client.HTTPException):
            return ""
        return content.decode(errors="replace")


class Aws(NoticeSource):
    """EC2's instance metadata, version 2."""

    name = "aws"
    lead_s = 120.0

    def is_here(self) -> bool:
        """Whether it gives a token."""
        return bool(self._token())

    def _token(self) -> str:
        return self._get("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")

    def _ask(self) -> str:
        token = self._token()
        path = "/latest/meta-data/spot/instance-action"
        return self._get(path, {"X-aws-ec2-metadata-token": token}) if token else ""

    def _parse(self, text: str) -> float | None:
        said = json.loads(text)
        if said["action"] not in ("terminate", "stop", "hibernate"):
            return None
        return _of_iso(said["time"]) if "time" in said else 0.0


class Gcp(NoticeSource):
    """Compute Engine's metadata server."""

    name = "gcp"
    lead_s = 30.0

    def is_here(self) -> bool:
        """Whether it knows the question."""
        return self._ask().strip() in ("TRUE", "FALSE")

    def _ask(self) -> str:
        return self._get("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})

    def _parse(self, text: str) -> float | None:
        return 0.0 if text.strip() == "TRUE" else None


class Azure(NoticeSource):
    """Azure's scheduled events. The first question switches them on, which may take minutes."""

    name = "azure"
    lead_s = 30.0

    def __init__(self, url: str = "") -> None:
        super().__init__(url)
        self._machine = ""

    def is_here(self) -> bool:
        """Whether it tells the machine's name."""
        return bool(self._name())

    def _name(self) -> str:
        if not self._machine:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._machine = self._get(path, {"Metadata": "true"}).strip()
        return self._machine

    def _ask(self) -> str:
        return self._get("/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})

    def _parse(self, text: str) -> float | None:
        """Look for this machine among those of all events."""
        name = self._name()
        for event in json.loads(text)["Events"]:
            if event["EventType"] == "Preempt" and name in event["Resources"]:
                return _of_http(event.get("NotBefore") or "")
        return None


SOURCES: dict[str, type[NoticeSource]] = {source.name: source for source in (Aws, Gcp, Azure)}


def find_source(name: str, url: str = "") -> NoticeSource | None:
    """Return the source of notices of this machine.

    Args:
        name: ``aws``, ``gcp`` or ``azure``; ``auto``: whichever of them it is.
        url: Base of the metadata service; empty: the clouds' own address.

    Returns:
        None where the machine is not that cloud's, as far as its metadata service says.
    """
    kinds = SOURCES.values() if name == "auto" else [SOURCES[name]]
    return next((source for kind in kinds if (source := kind(url)).is_here()), None)


def _of_iso(text: Any) -> float:
    """Return the Unix time of ``2026-09-18T08:22:00Z``."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _of_http(text: str) -> float:
    """Return the Unix time of ``Mon, 19 Sep 2026 18:29:47 GMT``; 0 of an empty text: it has begun."""
    return email.utils.parsedate_to_datetime(text).timestamp() if text else 0.0
