"""The machines of the tests' EC2, without SkyPilot: each is a host of its own, and goes when EC2 says so."""

from __future__ import annotations

import base64
import json
import shlex
from pathlib import Path

import pytest

from tests.servers.daemons import ServerError, poll
from tests.servers.ec2 import ZONES, Ec2

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

TOKEN = "$(curl -s -X PUT http://169.254.169.254/latest/api/token -H 'X-aws-ec2-metadata-token-ttl-seconds: 60')"
ASK = f'curl -s -w " %{{http_code}}" -H "X-aws-ec2-metadata-token: {TOKEN}" http://169.254.169.254/latest/meta-data/'


@pytest.fixture
def key(tmp_path: Path, ec2: Ec2) -> Path:
    ec2.command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key"))
    return tmp_path / "key"


def run_instances(ec2: Ec2, key: Path, count: int) -> list[dict]:
    subnet = ec2.client.describe_subnets(Filters=[{"Name": "tag:Name", "Values": [f"private-{ZONES[0]}"]}])
    done = ec2.client.run_instances(
        ImageId=ec2.client.describe_images(Owners=["amazon"])["Images"][0]["ImageId"], MinCount=count, MaxCount=count,
        SubnetId=subnet["Subnets"][0]["SubnetId"],
        UserData=base64.b64encode(key.with_suffix(".pub").read_bytes()).decode(),
    )  # fmt: skip
    return list(done["Instances"])


def test_machines_are_hosts_that_can_be_announced_to_go_and_taken_back(ec2: Ec2, key: Path) -> None:
    ec2.give_role("the key", "the secret")
    one, other = run_instances(ec2, key, 2)

    def ssh(machine: dict, command: str) -> str | None:
        words = ("-i", str(key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null")
        target = f"ubuntu@{machine['PrivateIpAddress']}"
        try:
            return ec2.command("ssh", *words, "-o", "ConnectTimeout=2", "-o", "BatchMode=yes", target, command)
        except ServerError:
            ec2.check()
            return None

    names = [poll(lambda m=machine: ssh(m, "hostname"), 60) for machine in (one, other)]
    assert len(set(names)) == 2 and ec2.named(str(names[1]).strip()) == other["InstanceId"]
    assert ssh(one, f"nc -z {other['PrivateIpAddress']} 22") == ""
    role, _, code = str(ssh(one, ASK + "iam/security-credentials/role")).rpartition(" ")
    assert code == "200" and json.loads(role)["AccessKeyId"] == "the key"
    # What the image has, an environment there has, too; nothing is fetched.
    find = "import importlib.util as found; print(bool(found.find_spec('torch')))"
    made = f".local/bin/uv venv --quiet --python 3.11 env && env/bin/python -c {shlex.quote(find)}"
    assert ssh(one, f"bash -lc {shlex.quote(made)}") == "True\n"
    assert str(ssh(other, ASK + "spot/instance-action")).endswith("404")
    ec2.announce_interruption(other["InstanceId"])
    assert '"terminate"' in str(ssh(other, ASK + "spot/instance-action"))
    assert str(ssh(one, ASK + "spot/instance-action")).endswith("404")
    ec2.terminate(other["InstanceId"])
    assert poll(lambda: ssh(other, "true") is None, 10)
    assert ssh(one, "true") == ""
