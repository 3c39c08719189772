"""What the environment and the profile say is what both clients do, and no server is sent what it may not know."""

import pytest

from rsb_cluster.errors import StorageError
from rsb_cluster.storage.s3_settings import endpoint_url, s3_settings
from rsb_cluster.storage.store import Store
from tests.servers.proxy import FaultyProxy


@pytest.fixture
def set_environment(monkeypatch):
    def set_(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_


@pytest.fixture
def profile(tmp_path, set_environment):
    """Write a configuration file, and choose the profile 'mine' in it."""

    def write(text: str) -> None:
        (tmp_path / "config").write_text(text)
        set_environment({"AWS_CONFIG_FILE": f"{tmp_path}/config", "AWS_PROFILE": "mine"})

    return write


@pytest.fixture
def recorder(s3, set_environment):
    """A proxy by https in front of the server, which notes the requests as they came."""
    with FaultyProxy(s3.plain_endpoint, certificate=s3.certificate) as proxy:
        set_environment(s3.env | {"AWS_ENDPOINT_URL": proxy.url})
        yield proxy


def write_all_ways(store: Store) -> None:
    store.write_bytes("small", b"content")
    assert store.create_bytes("created", b"content")
    store.write_bytes("large", bytes(33 << 20))
    store.move("small", "moved")
    assert store.read_bytes("moved") == b"".join(store.stream("created")) == b"content"
    store.delete("moved")


@pytest.mark.s3
def test_no_checksum_and_no_chunks_are_sent_to_an_endpoint_by_https(recorder, s3_bucket):
    write_all_ways(Store(f"s3://{s3_bucket}/x"))
    assert {request.method for request in recorder.requests} >= {"PUT", "POST", "GET", "DELETE"}
    sent = "".join(request.headers for request in recorder.requests)
    assert [word for word in ("aws-chunked", "trailer", "x-amz-checksum", "x-amz-sdk-checksum") if word in sent] == []


@pytest.mark.s3
@pytest.mark.parametrize("write", ["write_bytes", "create_bytes"])
@pytest.mark.parametrize("where", ["environment", "profile"])
def test_the_users_own_choice_of_checksums_stays(recorder, s3, s3_bucket, set_environment, profile, where, write):
    if where == "environment":
        set_environment({"AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported"})
    else:
        profile("[profile mine]\nrequest_checksum_calculation = when_supported\n")
    with pytest.raises(StorageError):  # the server is one of those that refuse it
        getattr(Store(f"s3://{s3_bucket}/x"), write)("f", b"content")
    assert "aws-chunked" in recorder.requests[0].headers


@pytest.mark.parametrize(
    "environment",
    [{"AWS_ENDPOINT_URL": "https://e"}, {"AWS_ENDPOINT_URL_S3": "https://e", "AWS_ENDPOINT_URL": "https://other"}],
)
def test_an_endpoint_of_the_environment(environment, set_environment):
    set_environment(environment | {"AWS_EC2_METADATA_DISABLED": "true"})
    assert endpoint_url() == "https://e"
    assert dict(s3_settings("b").checksums) == dict.fromkeys(
        ("request_checksum_calculation", "response_checksum_validation"), "when_required"
    )


@pytest.mark.parametrize(
    "text",
    [
        "endpoint_url = https://e",
        "endpoint_url = https://other\nservices = s\n[services s]\ns3 =\n  endpoint_url = https://e",
    ],
)
def test_an_endpoint_of_the_profile(text, profile, set_environment):
    profile(f"[profile mine]\nregion = there\n{text}\n")
    assert endpoint_url() == "https://e"
    assert s3_settings("b").config()["request_checksum_calculation"] == "when_required"
    assert s3_settings("b").region == "there"
    set_environment({"AWS_REGION": "here"})
    assert s3_settings("b").region == "here"
    set_environment({"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"})
    assert endpoint_url() is None
    assert s3_settings("b").config() == {}, "Amazon's own knows what it sent"


@pytest.mark.s3
def test_a_profile_is_enough_for_both_clients(s3, s3_bucket, profile, set_environment):
    set_environment({"AWS_EC2_METADATA_DISABLED": "true"})
    keys = (
        f"aws_access_key_id = {s3.env['AWS_ACCESS_KEY_ID']}\naws_secret_access_key = {s3.env['AWS_SECRET_ACCESS_KEY']}"
    )
    address = f"endpoint_url = {s3.env['AWS_ENDPOINT_URL']}\nca_bundle = {s3.certificate.authority}"
    profile(f"[profile mine]\n{keys}\n{address}\n")
    write_all_ways(Store(f"s3://{s3_bucket}/x"))


def test_secrets_are_not_shown(set_environment):
    set_environment({"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "geheim"})
    assert "geheim" not in repr(s3_settings("b"))


# --- buckets of others -----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket_of_others(s3, s3_bucket):
    """A bucket that the server's user has filled."""
    with pytest.MonkeyPatch.context() as owner:
        for name, value in s3.env.items():
            owner.setenv(name, value)
        Store(f"s3://{s3_bucket}/x").write_bytes("f", b"content")
    return s3_bucket


def anonymous(s3) -> dict[str, str]:
    return {name: value for name, value in s3.env.items() if "KEY" not in name}


def read_all_ways(store: Store) -> None:
    assert store.names() == store.files() == ["f"]
    assert store.exists("f") and not store.exists("g")
    with store.open("f") as file:
        assert store.read_bytes("f") == b"".join(store.stream("f")) == file.read() == b"content"


@pytest.mark.s3
@pytest.mark.parametrize("how", ["without credentials", "with credentials of another server"])
def test_a_public_bucket_is_read_by_both_clients(s3, bucket_of_others, set_environment, how):
    s3.make_public(bucket_of_others)
    set_environment(anonymous(s3))
    if how == "with credentials of another server":
        keys = {"AWS_ACCESS_KEY_ID": "other", "AWS_SECRET_ACCESS_KEY": "other"}
        set_environment(keys | {"RSB_S3_ANONYMOUS": f"elsewhere,{bucket_of_others[:8]}*"})
    store = Store(f"s3://{bucket_of_others}/x")
    read_all_ways(store)
    with pytest.raises(StorageError):
        store.write_bytes("g", b"")


@pytest.mark.s3
def test_a_bucket_whose_readers_pay(s3, bucket_of_others, set_environment):
    s3.make_public(bucket_of_others, requester_pays=True)
    set_environment(s3.env | s3.make_user("reader"))
    store = Store(f"s3://{bucket_of_others}/x")
    with pytest.raises(StorageError, match=r"not allowed .* RSB_S3_REQUESTER_PAYS"):
        list(store.stream("f"))
    set_environment({"RSB_S3_REQUESTER_PAYS": bucket_of_others})
    read_all_ways(store)
