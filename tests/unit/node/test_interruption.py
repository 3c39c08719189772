"""Interruption notices, from a stand-in for each cloud's metadata service."""

from __future__ import annotations

import email.utils
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsb_cluster.node import interruption
from rsb_cluster.node.interruption import SOURCES, STALE_S
from tests.servers.metadata import Metadata, aws_notice, azure_notice


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[[str], Metadata]]:
    """Start the metadata service of a cloud."""
    with ExitStack() as stack:
        yield lambda cloud: stack.enter_context(Metadata(cloud, tmp_path))


def iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def http_date(moment: float) -> str:
    return email.utils.formatdate(moment, usegmt=True)


def announced(cloud: str, moment: float) -> str:
    return {"aws": aws_notice(iso(moment)), "gcp": "TRUE", "azure": azure_notice(http_date(moment))}[cloud]


@pytest.mark.parametrize("cloud", SOURCES)
@pytest.mark.parametrize("asked", ["named", "auto"])
def test_a_notice_is_found_with_its_deadline(
    cloud: str, asked: str, service: Callable[[str], Metadata], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # nobody there
    metadata = service(cloud)
    source = interruption.find_source(cloud if asked == "named" else "auto", metadata.url)
    assert source is not None and source.name == cloud
    assert source.poll() is None
    deadline = time.time() + (30 if cloud == "gcp" else 90)  # Google's notice has none, so its minimum counts
    metadata.announce(announced(cloud, deadline))
    notice = source.poll()
    assert notice is not None and notice.source == cloud
    assert notice.deadline == pytest.approx(deadline, abs=10)
    assert notice.text == announced(cloud, deadline)


@pytest.mark.parametrize("cloud", SOURCES)
def test_a_machine_of_another_cloud_has_no_source(cloud: str, service: Callable[[str], Metadata]) -> None:
    url = service(cloud).url
    assert [name for name in SOURCES if interruption.find_source(name, url)] == [cloud]


def test_no_metadata_service_is_no_cloud() -> None:
    assert interruption.find_source("auto", "http://127.0.0.1:1") is None
    assert SOURCES["aws"]("http://127.0.0.1:1").poll() is None


def test_amazons_stand_in_wants_a_token(service: Callable[[str], Metadata]) -> None:
    """Else the test above would say nothing of the token's flow."""
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{service('aws').url}/latest/meta-data/spot/instance-action")


@pytest.mark.parametrize(
    "text",
    [
        azure_notice(http_date(time.time() + 60), machine="vmss_8"),
        azure_notice(http_date(time.time() + 60), kind="Reboot"),
    ],
    ids=["another machine of the scale set", "another kind of event"],
)
def test_azures_other_events_are_not_for_this_machine(text: str, service: Callable[[str], Metadata]) -> None:
    metadata = service("azure")
    metadata.announce(text)
    assert SOURCES["azure"](metadata.url).poll() is None


def test_an_event_that_has_begun_leaves_the_least_time(service: Callable[[str], Metadata]) -> None:
    metadata = service("azure")
    metadata.announce(azure_notice(""))
    notice = SOURCES["azure"](metadata.url).poll()
    assert notice is not None and notice.deadline == pytest.approx(time.time() + 30, abs=10)


@pytest.mark.parametrize("cloud", ["aws", "azure"])
def test_a_notice_that_did_not_come_true_is_none(cloud: str, service: Callable[[str], Metadata]) -> None:
    """A machine that was stopped and restarted may still show it; it would stop every attempt."""
    metadata = service(cloud)
    metadata.announce(announced(cloud, time.time() - STALE_S - 5))
    assert SOURCES[cloud](metadata.url).poll() is None
    metadata.announce(announced(cloud, time.time() - STALE_S + 60))
    assert SOURCES[cloud](metadata.url).poll() is not None


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["action", "time", "Events", "EventType", "Resources", "NotBefore"]), inner, max_size=4
        )
    ),
    max_leaves=8,
).map(lambda value: __import__("json").dumps(value))


@pytest.mark.parametrize("cloud", SOURCES)
@given(text=st.text(max_size=60) | _JSON)
def test_what_makes_no_sense_is_no_notice_and_no_error(cloud: str, text: str) -> None:
    source = SOURCES[cloud]("http://127.0.0.1:1")
    if text.strip() != "TRUE":
        assert source.read(text) is None
