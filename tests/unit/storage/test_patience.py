"""At a terminal a server that nobody can connect to costs seconds, once; nodes wait, and who has had an answer."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from click.testing import CliRunner

from rsb_cluster.cli import main
from rsb_cluster.errors import StorageError
from rsb_cluster.storage import patience
from rsb_cluster.storage import s3 as s3_module
from rsb_cluster.storage.store import Store
from tests.servers.daemons import free_ports

PATIENT = list(range(1, s3_module.MAX_ATTEMPTS))


@pytest.fixture
def pauses(monkeypatch):
    """After how many attempts there was a pause."""
    made = []
    monkeypatch.setattr(s3_module, "backoff_s", lambda first_s, attempts: made.append(attempts) or 0)
    return made


@pytest.fixture(autouse=True)
def port(monkeypatch):
    """The port of the endpoint, on which nobody listens. What was said of it is kept, however slow the machine is."""
    monkeypatch.setattr(patience, "KEPT_S", 1e9)
    (number,) = free_ports(1)
    keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "geheim", "AWS_CONFIG_FILE": "/dev/null"}
    for name, value in (keys | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{number}"}).items():
        monkeypatch.setenv(name, value)
    return number


def fail(port, action, *arguments):
    with pytest.raises(StorageError) as caught:
        list(getattr(Store("s3://bucket/x"), action)(*arguments))
    assert f"127.0.0.1:{port}" in str(caught.value) and "Check AWS_ENDPOINT_URL" in str(caught.value)


ACTIONS = [("names",), ("stream", "f"), ("create_bytes", "f", b""), ("exists",), ("read_bytes", "f"), ("files",)]


@pytest.mark.parametrize("action", ACTIONS, ids=[action[0] for action in ACTIONS])
def test_one_who_waits_tries_twice_and_is_told_the_same_again(port, pauses, action):
    with patience.brief():
        for following in (action, *ACTIONS):
            fail(port, *following)
    assert pauses == [1]


def test_one_who_keeps_watching_asks_again_after_a_while(port, pauses, monkeypatch):
    monkeypatch.setattr(patience, "KEPT_S", 0)
    with patience.brief():
        fail(port, "names")
        fail(port, "names")
    assert pauses == [1, 1]


@pytest.mark.parametrize("action", [("names",), ("stream", "f")], ids=["names", "stream"])
def test_a_node_is_patient(port, pauses, action):
    with patience.brief():
        fail(port, *action)
    pauses.clear()
    fail(port, *action)
    assert pauses == PATIENT


@pytest.mark.parametrize("action", [("names",), ("stream", "f"), ("exists", "f")], ids=["names", "stream", "exists"])
def test_a_server_that_has_answered_is_waited_for(port, pauses, action):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with patience.brief():
        with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            with pytest.raises(StorageError):
                list(getattr(Store("s3://bucket/x"), action[0])(*action[1:]))
            server.shutdown()
            thread.join()
        assert pauses == []
        fail(port, "names")
    assert pauses == PATIENT


def test_commands_are_brief(port, pauses):
    done = CliRunner().invoke(main, ["status", "--runs", "s3://bucket/runs"])
    assert done.exit_code == 1 and f"127.0.0.1:{port}" in done.output and "Check AWS_ENDPOINT_URL" in done.output
    assert pauses == [1]
    pauses.clear()
    fail(port, "names")
    assert pauses == PATIENT, "the command's haste ended with it"
