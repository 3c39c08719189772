"""A real S3 server: Ceph's object gateway on a one-node Ceph (monitor, manager, one OSD), all on loopback."""

from __future__ import annotations

import uuid

import botocore.session

from tests.servers.daemons import Server, free_ports, listening, missing_tools

TOOLS = ("ceph-mon", "ceph-mgr", "ceph-osd", "radosgw", "radosgw-admin", "ceph", "ceph-authtool", "setpriv")

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
rgw frontends = beast endpoint={address}:{port}
"""


class S3Server(Server):
    """An S3 endpoint with one user. ``env`` makes botocore, aiobotocore and s3fs talk to it.

    Args:
        address: Where it listens: one of this machine's own.
    """

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__("rsb-s3-")
        self._address = address
        self._port, *self._mon_ports = free_ports(3)
        self.endpoint = f"http://{address}:{self._port}"
        self.env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "rsbtest",
            "AWS_SECRET_ACCESS_KEY": "rsbtestsecret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",  # a developer's own profile has no say
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
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
        conf = CEPH_CONF.format(root=self.root, fsid=fsid, mon_host=mon_host, address=self._address, port=self._port)
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
        self.command(
            "radosgw-admin", "user", "create", "--uid=rsbtest", "--display-name=rsbtest",
            f"--access-key={self.env['AWS_ACCESS_KEY_ID']}", f"--secret-key={self.env['AWS_SECRET_ACCESS_KEY']}",
        )  # fmt: skip

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its name."""
        client = botocore.session.Session().create_client(
            "s3",
            region_name=self.env["AWS_DEFAULT_REGION"],
            endpoint_url=self.endpoint,
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
        )
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()
        return name
