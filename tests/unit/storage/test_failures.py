"""What goes wrong at a server is named, with what to set."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rsb_cluster.errors import AccessError, MissingError, StorageError
from rsb_cluster.storage import file_systems
from rsb_cluster.storage import s3 as s3_module
from rsb_cluster.storage.store import Store
from tests.servers.proxy import Fault, FaultyProxy
from tests.servers.tls import make_certificate

READS = ("read_json", "names", "exists", "stream", "create_bytes")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Credentials of nobody, and few attempts."""
    keys = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "geheim", "AWS_CONFIG_FILE": "/dev/null"}
    for name, value in (keys | {"AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(file_systems, "S3_CLIENT", {"retries": {"total_max_attempts": 1}})
    monkeypatch.setattr(s3_module, "MAX_ATTEMPTS", 2)


@pytest.fixture
def web_server():
    """The port of a server that speaks http and no S3."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def broken(web_server):
    """A server of which every answer is the proxy's own."""
    with FaultyProxy(f"http://127.0.0.1:{web_server}", methods=("GET", "PUT", "HEAD")) as proxy:
        yield proxy


def error_of(action: str) -> StorageError:
    store = Store("s3://bucket/x")
    arguments = {"names": (), "create_bytes": ("f", b"1")}.get(action, ("f",))
    with pytest.raises(StorageError) as caught:
        found = getattr(store, action)(*arguments)
        list(found)
    assert "geheim" not in str(caught.value) and "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("status", "code", "kind", "advice"),
    [
        (404, "NoSuchBucket", MissingError, "There is no bucket 'bucket' at http://127.0.0.1:"),
        (400, "ExpiredToken", AccessError, "the credentials have expired. Renew them (AWS_SESSION_TOKEN"),
        (400, "AuthorizationHeaderMalformed", StorageError, "another region. Set AWS_REGION to the bucket's."),
        (301, "PermanentRedirect", StorageError, "another region. Set AWS_REGION to the bucket's."),
        (403, "RequestTimeTooSkewed", AccessError, "Set the clock."),
        (403, "AccessDenied", AccessError, "Set RSB_S3_ANONYMOUS if the bucket is public, or RSB_S3_REQUESTER_PAYS if"),
    ],
)
@pytest.mark.parametrize("action", [name for name in READS if name != "exists"])
def test_what_s3_says_is_told_with_what_to_do(broken, monkeypatch, action, status, code, kind, advice):
    broken.always = Fault(status=status, code=code)
    monkeypatch.setenv("AWS_ENDPOINT_URL", broken.url)
    error = error_of(action)
    assert type(error) is kind and advice in str(error)


def test_a_head_that_says_400_may_be_the_region_or_the_token(broken, monkeypatch):
    broken.always = Fault(status=400)
    monkeypatch.setenv("AWS_ENDPOINT_URL", broken.url)
    error = error_of("exists")
    assert "Check AWS_REGION." in str(error) and "whether the credentials have expired" in str(error)


@pytest.mark.parametrize("action", READS)
def test_a_certificate_that_nobody_knows(monkeypatch, tmp_path, web_server, action):
    with FaultyProxy(f"http://127.0.0.1:{web_server}", certificate=make_certificate(tmp_path)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        said = str(error_of(action))
    assert f"the certificate of {proxy.url} is not trusted" in said
    assert said.endswith("Set AWS_CA_BUNDLE to the PEM file of the authority that signed it.")


@pytest.mark.parametrize("action", READS)
def test_https_to_a_port_that_speaks_http(monkeypatch, web_server, action):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{web_server}")
    assert f"https://127.0.0.1:{web_server} does not speak https" in str(error_of(action))


@pytest.mark.parametrize("action", READS)
def test_a_port_on_which_nobody_listens(monkeypatch, action):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    said = str(error_of(action))
    assert "127.0.0.1:9" in said and said.endswith("Check AWS_ENDPOINT_URL, the credentials and the network.")


def test_no_credentials_for_what_is_not_public(broken, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", broken.url)
    broken.always = Fault(status=403, code="AccessDenied")
    for action in READS:
        error = error_of(action)
        assert type(error) is StorageError, "a start is repeated: a role's credentials may come a moment later"
        assert "no credentials were found. Set AWS_PROFILE, or AWS_ACCESS_KEY_ID" in str(error)


def test_a_profile_that_is_not_there(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nonesuch")
    for action in READS:
        assert "nonesuch" in str(error_of(action))
