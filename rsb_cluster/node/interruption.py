"""Interruption notices: how a cloud announces to a preemptible machine that it will reclaim it.

Each cloud publishes its notice in the instance metadata, which only the machine itself can read, at a link-local
address. The clouds document:

- AWS, EC2 user guide, "Spot Instance interruption notices": two minutes ahead, on a best-effort basis; IMDSv2 needs a
  token; 404 until there is a notice.
- Google Cloud, Compute Engine, "Spot VMs": 30 seconds ahead.
- Azure, "Scheduled Events for Linux VMs": at least 30 seconds ahead; a machine sees the events of its whole scale set.
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
# Overrides the address, for tests.
METADATA_ENV = "RSB_METADATA_URL"
TIMEOUT_S = 2.0
# A notice whose deadline passed this long ago is stale: the machine was stopped and restarted, or never reclaimed.
STALE_S = 300.0

# Metadata requests must not go through a proxy, whatever the environment says.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Notice:
    """A cloud's announcement that it will reclaim this machine.

    Attributes:
        source: Name of the cloud.
        deadline: When the machine is reclaimed, Unix time.
        text: The cloud's answer, verbatim.
    """

    source: str
    deadline: float
    text: str


class NoticeSource(ABC):
    """The metadata service of one cloud.

    Args:
        url: Base URL of the metadata service; empty: the clouds' own address.
    """

    name: ClassVar[str]
    # The cloud's minimum time between notice and reclaim, used if the notice has no deadline.
    lead_s: ClassVar[float]

    def __init__(self, url: str = "") -> None:
        self._url = url or os.environ.get(METADATA_ENV) or METADATA_URL

    @abstractmethod
    def is_here(self) -> bool:
        """Whether this machine belongs to the cloud."""

    @abstractmethod
    def _query(self) -> str:
        """Return the service's current answer; empty if there is none."""

    @abstractmethod
    def _parse(self, text: str) -> float | None:
        """Return the deadline of the notice in an answer; 0 if the notice has no deadline, None if there is no notice.

        Raises:
            ValueError: The answer is not in this cloud's format.
        """

    def poll(self) -> Notice | None:
        """Return the current notice for this machine; None if the service does not answer, or not in its format."""
        return self.read(self._query())

    def read(self, text: str) -> Notice | None:
        """Return the notice in an answer; None if it has none for this machine, or a stale one."""
        try:
            deadline = self._parse(text)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return None
        if deadline is None or 0 < deadline < time.time() - STALE_S:
            return None
        return Notice(self.name, deadline or time.time() + self.lead_s, text)

    def _get(self, path: str, headers: Mapping[str, str], method: str = "GET") -> str:
        """Return the metadata at a path; empty if the service does not answer, or has nothing there."""
        request = urllib.request.Request(self._url + path, headers=dict(headers), method=method)
        try:
            with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
                content: bytes = answer.read(1 << 20)
        except (OSError, http.client.HTTPException):
            return ""
        return content.decode(errors="replace")


class Aws(NoticeSource):
    """EC2's instance metadata, version 2."""

    name = "aws"
    lead_s = 120.0

    def is_here(self) -> bool:
        """Whether the service issues a token."""
        return bool(self._token())

    def _token(self) -> str:
        return self._get("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")

    def _query(self) -> str:
        token = self._token()
        path = "/latest/meta-data/spot/instance-action"
        return self._get(path, {"X-aws-ec2-metadata-token": token}) if token else ""

    def _parse(self, text: str) -> float | None:
        notice = json.loads(text)
        if notice["action"] not in ("terminate", "stop", "hibernate"):
            return None
        return _parse_iso_time(notice["time"]) if "time" in notice else 0.0


class Gcp(NoticeSource):
    """Compute Engine's metadata server."""

    name = "gcp"
    lead_s = 30.0

    def is_here(self) -> bool:
        """Whether the service knows the ``preempted`` key."""
        return self._query().strip() in ("TRUE", "FALSE")

    def _query(self) -> str:
        return self._get("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})

    def _parse(self, text: str) -> float | None:
        return 0.0 if text.strip() == "TRUE" else None


class Azure(NoticeSource):
    """Azure's scheduled events. The first query enables them, which may take minutes."""

    name = "azure"
    lead_s = 30.0

    def __init__(self, url: str = "") -> None:
        super().__init__(url)
        self._machine = ""

    def is_here(self) -> bool:
        """Whether the service returns the machine's name."""
        return bool(self._name())

    def _name(self) -> str:
        if not self._machine:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._machine = self._get(path, {"Metadata": "true"}).strip()
        return self._machine

    def _query(self) -> str:
        return self._get("/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})

    def _parse(self, text: str) -> float | None:
        """Return the deadline of this machine's event among those of its scale set."""
        name = self._name()
        for event in json.loads(text)["Events"]:
            if event["EventType"] == "Preempt" and name in event["Resources"]:
                return _parse_http_date(event.get("NotBefore") or "")
        return None


SOURCES: dict[str, type[NoticeSource]] = {source.name: source for source in (Aws, Gcp, Azure)}


def find_source(name: str, url: str = "") -> NoticeSource | None:
    """Return the notice source of this machine.

    Args:
        name: ``aws``, ``gcp`` or ``azure``; ``auto``: the first of them whose metadata service answers.
        url: Base URL of the metadata service; empty: the clouds' own address.

    Returns:
        None if no such metadata service answers.
    """
    kinds = SOURCES.values() if name == "auto" else [SOURCES[name]]
    return next((source for kind in kinds if (source := kind(url)).is_here()), None)


def _parse_iso_time(text: Any) -> float:
    """Return the Unix time of ``2026-09-18T08:22:00Z``."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _parse_http_date(text: str) -> float:
    """Return the Unix time of ``Mon, 19 Sep 2026 18:29:47 GMT``; 0 if the text is empty: the event has begun."""
    return email.utils.parsedate_to_datetime(text).timestamp() if text else 0.0
