"""A real S3 server: Ceph's object gateway on a one-node Ceph (monitor, manager, one OSD), all on loopback."""

from __future__ import annotations

import contextlib
import json
import uuid
from pathlib import Path
from typing import Any

import botocore.session
import s3fs

from tests.servers.daemons import Server, free_ports, listening, missing_tools
from tests.servers.tls import make_certificate

TOOLS = ("ceph-mon", "ceph-mgr", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "setpriv", "openssl")

# One copy of all data, few placement groups, no dynamic resharding: an idle cluster in seconds.
CEPH_CONF = """\
[global]
fsid = {fsid}
mon host = {mon_host}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {root}/keyring
run dir = {root}
crash dir = {root}/crash
admin socket = {root}/$name.asok
pid file = {root}/$name.pid
log file = {root}/log/$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
paxos propose interval = 0.05
paxos min wait = 0.01
mon data avail crit = 0
mon data avail warn = 0
bluestore block size = 21474836480
osd memory target = 939524096
rgw dynamic resharding = false
rgw run sync thread = false
rgw gc max objs = 1
rgw thread pool size = 64
[mon.a]
mon data = {root}/mon
host = localhost
[mgr.x]
mgr data = {root}/mgr
[osd.0]
osd data = {root}/osd
[client.rgw]
rgw data = {root}/rgw
rgw frontends = beast endpoint={address}:{port} {tls}
"""
TLS = "ssl_endpoint={address}:{port} ssl_certificate={certificate.path} ssl_private_key={certificate.key}"


class S3Server(Server):
    """An S3 endpoint with one user. ``env`` makes botocore, aiobotocore and s3fs talk to it.

    It is asked by https, as most servers are; its certificate's authority is known from ``env`` alone. What cannot know
    it (a proxy that looks into requests, another machine) asks ``plain_endpoint`` by http, as ``plain_env`` says.

    Args:
        address: Where it listens: one of this machine's own.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__("rsb-s3-")
        self._address = address
        self._port, self._tls_port, *self._mon_ports = free_ports(4)
        self.endpoint = f"https://{address}:{self._tls_port}"
        self.plain_endpoint = f"http://{address}:{self._port}"
        self.certificate = make_certificate(self.root, address)
        self.plain_env = {
            "AWS_ENDPOINT_URL": self.plain_endpoint,
            "AWS_ACCESS_KEY_ID": "rsbtest",
            "AWS_SECRET_ACCESS_KEY": "rsbtestsecret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",  # a developer's own profile has no say
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }
        self.env = self.plain_env | {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_CA_BUNDLE": str(self.certificate.authority),
        }

    @staticmethod
    def unavailable() -> list[str]:
        """What this machine lacks for the server; empty if it can run one."""
        return missing_tools(TOOLS)

    def daemon_env(self) -> dict[str, str]:
        """Add CEPH_CONF, which daemons and tools read instead of /etc/ceph/ceph.conf."""
        return super().daemon_env() | {"CEPH_CONF": str(self.root / "ceph.conf")}

    def start(self) -> None:
        """Make a new Ceph, start its daemons, and create the user."""
        fsid, osd_id = str(uuid.uuid4()), str(uuid.uuid4())
        mon_host = "[v2:127.0.0.1:{},v1:127.0.0.1:{}]".format(*self._mon_ports)
        tls = TLS.format(address=self._address, port=self._tls_port, certificate=self.certificate)
        places = {"root": self.root, "address": self._address, "port": self._port}
        conf = CEPH_CONF.format(**places, fsid=fsid, mon_host=mon_host, tls=tls)
        (self.root / "ceph.conf").write_text(conf)
        for name in ("mon", "mgr", "osd", "rgw", "crash"):
            (self.root / name).mkdir()
        keyring, monmap = f"{self.root}/keyring", f"{self.root}/monmap"
        self.command("monmaptool", "--create", "--fsid", fsid, "--addv", "a", mon_host, monmap)
        self.command("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        caps = [word for kind in ("mon", "osd", "mgr") for word in ("--cap", kind, "allow *")]
        for name in ("client.admin", "client.rgw", "osd.0", "mgr.x"):
            self.command("ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
        self.command("ceph-mon", "-i", "a", "--mkfs", "--keyring", keyring, "--monmap", monmap)
        self.spawn("mon.a", "ceph-mon", "-f", "-i", "a")
        self.wait_daemon("mon.a", lambda: listening(self._mon_ports[0]))
        self.spawn("mgr.x", "ceph-mgr", "-f", "-i", "x")
        self.command("ceph", "osd", "new", osd_id, "0")
        self.command("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_id)
        self.spawn("osd.0", "ceph-osd", "-f", "-i", "0")
        self.spawn("client.rgw", "radosgw", "-f", "-n", "client.rgw")
        self.wait_daemon("client.rgw", lambda: listening(self._port, self._address))
        self.make_user("rsbtest")

    def client(self) -> Any:
        """Return a client of the user's; to be closed."""
        return botocore.session.Session().create_client(
            "s3",
            region_name=self.env["AWS_DEFAULT_REGION"],
            endpoint_url=self.plain_endpoint,
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
        )

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its name."""
        with contextlib.closing(self.client()) as client:
            client.create_bucket(Bucket=name)
        return name

    def upload(self, folder: Path, url: str) -> None:
        """Put what is in a folder at a URL; by http, as s3fs by itself sends checksums that the server refuses."""
        keys = {"key": self.env["AWS_ACCESS_KEY_ID"], "secret": self.env["AWS_SECRET_ACCESS_KEY"]}
        s3fs.S3FileSystem(endpoint_url=self.plain_endpoint, **keys).put(f"{folder}/", f"{url}/", recursive=True)

    def make_public(self, bucket: str, *, requester_pays: bool = False) -> None:
        """Let everybody list and read a bucket, or everybody who pays."""
        statement = {
            "Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"],
            "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
        }  # fmt: skip
        with contextlib.closing(self.client()) as client:
            client.put_bucket_policy(
                Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]})
            )
            if requester_pays:
                payer = {"Payer": "Requester"}
                client.put_bucket_request_payment(Bucket=bucket, RequestPaymentConfiguration=payer)

    def make_user(self, name: str) -> dict[str, str]:
        """Create another user, and return its credentials as variables."""
        keys = {"AWS_ACCESS_KEY_ID": name, "AWS_SECRET_ACCESS_KEY": f"{name}secret"}
        self.command(
            "radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}",
            f"--access-key={keys['AWS_ACCESS_KEY_ID']}", f"--secret-key={keys['AWS_SECRET_ACCESS_KEY']}",
        )  # fmt: skip
        return keys
