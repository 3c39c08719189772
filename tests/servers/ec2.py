"""EC2 with machines behind it: moto answers the API, and each instance is a host with its own root file system.

A thread does what a hypervisor does: an instance that moto calls running gets a host, one that it calls terminated
loses it at once, with all that runs there. A host is a set of Linux namespaces behind one switch: network, name,
processes, mounts. It has sshd, the user that its user data ask for, and EC2's metadata address.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import botocore.session

from tests.servers import metadata
from tests.servers.daemons import Server, ServerError, free_ports, listening, missing_tools
from tests.servers.network import Switch

TOOLS = ("ip", "nsenter", "unshare", "setpriv", "ssh")
REGION = "us-east-1"
VPC = "lab"
ZONES = (f"{REGION}a", f"{REGION}b")

# Waits for its network. The image lies below, and what the host writes goes to a folder of its own.
BOOT = """\
set -e
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
hostname {name}
ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up; ip route add default via {gateway}
ip addr add 169.254.169.254/32 dev lo
mount -t overlay overlay -o lowerdir={image},upperdir={disk}/upper,workdir={disk}/work {disk}/root
{python} {metadata} aws {disk} &
until (: </dev/tcp/169.254.169.254/80) 2>/dev/null; do sleep 0.05; done
cd {disk}/root
mount -t proc proc proc; mount -t sysfs sysfs sys; mount --rbind /dev dev
mount -t tmpfs tmpfs dev/shm; mount -t tmpfs tmpfs tmp; mount -t tmpfs tmpfs run; mkdir run/sshd
echo "127.0.0.1 localhost\n{address} {name}" >etc/hosts
mkdir -p home/ubuntu/.ssh; cp {disk}/key.pub home/ubuntu/.ssh/authorized_keys
chown -R 15000:15000 home/ubuntu/.ssh; chmod 700 home/ubuntu/.ssh; chmod 600 home/ubuntu/.ssh/authorized_keys
exec chroot . /usr/sbin/sshd -D -e
"""


class Ec2(Server):
    """One region with two zones, one VPC, and an instance role.

    Args:
        image: Root file system of all hosts, made by tests/cloud/setup.sh.

    ``env`` makes botocore and SkyPilot talk to it.
    """

    def __init__(self, image: Path) -> None:
        super().__init__("rsb-ec2-")
        self.switch = Switch(self)
        self._image, self._role = image, ""
        (self._port,) = free_ports(1)
        endpoint = f"http://127.0.0.1:{self._port}"
        self.env = {f"AWS_ENDPOINT_URL_{service}": endpoint for service in ("EC2", "STS", "IAM", "SERVICE_QUOTAS")} | {
            "AWS_DEFAULT_REGION": REGION,
        }
        self._up: dict[str, str] = {}  # instances with a host, and the hosts' daemons
        self._stopping, self._hypervisor = threading.Event(), threading.Thread(target=self._work)
        self._booted = 0
        self._failure: BaseException | None = None

    @staticmethod
    def unavailable() -> list[str]:
        """What this machine lacks."""
        return missing_tools(TOOLS)

    def start(self) -> None:
        self.switch.start()
        self.spawn("moto", sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port))
        self.wait_daemon("moto", lambda: listening(self._port))
        self.client = self._client("ec2")
        self._make_account()
        self._hypervisor.start()

    def give_role(self, key: str, secret: str) -> None:
        """Say what access key the instance role gives to the machines that are booted from now on."""
        self._role = json.dumps(
            {
                "Code": "Success", "Type": "AWS-HMAC", "Token": "", "AccessKeyId": key, "SecretAccessKey": secret,
                "LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2099-01-01T00:00:00Z",
            }
        )  # fmt: skip

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """What EC2 says of the instances in these states, or of all, the oldest first."""
        filters = [{"Name": "instance-state-name", "Values": list(states)}] if states else []
        pages = self.client.describe_instances(Filters=filters)["Reservations"]
        return sorted((i for page in pages for i in page["Instances"]), key=lambda i: i["LaunchTime"])

    def named(self, host: str) -> str:
        """Number of the running instance whose host has this name."""
        (found,) = [i["InstanceId"] for i in self.instances("running") if _host_name(i["PrivateIpAddress"]) == host]
        return str(found)

    def announce_interruption(self, instance: str, lead_s: float = 120) -> None:
        """Tell a host that EC2 will take it back; that is up to the caller."""
        when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=lead_s)
        notice = self.root / instance / metadata.NOTICE
        notice.with_suffix(".part").write_text(metadata.aws_notice(when.strftime("%Y-%m-%dT%H:%M:%SZ")))
        notice.with_suffix(".part").replace(notice)

    def terminate(self, instance: str) -> None:
        """Take a machine back: its host is gone within a second."""
        self.client.terminate_instances(InstanceIds=[instance])

    def check(self) -> None:
        """Raise what went wrong with a host."""
        if self._failure:
            raise ServerError(f"the hypervisor ended\n{self.log_tails()}") from self._failure

    def stop(self) -> None:
        self._stopping.set()
        if self._hypervisor.is_alive():
            self._hypervisor.join()
        super().stop()

    def _client(self, service: str) -> Any:
        return botocore.session.Session().create_client(
            service, region_name=REGION, endpoint_url=f"http://127.0.0.1:{self._port}",
            aws_access_key_id="lab", aws_secret_access_key="lab",
        )  # fmt: skip

    def _make_account(self) -> None:
        vpc = self.client.create_vpc(CidrBlock=f"{self.switch.subnet}.0/24")["Vpc"]["VpcId"]
        self.client.create_tags(Resources=[vpc], Tags=[{"Key": "Name", "Value": VPC}])
        for zone, half in zip(ZONES, (0, 128), strict=True):
            self.client.create_subnet(
                VpcId=vpc, CidrBlock=f"{self.switch.subnet}.{half}/25", AvailabilityZone=zone,
                TagSpecifications=[{"ResourceType": "subnet", "Tags": [{"Key": "Name", "Value": f"private-{zone}"}]}],
            )  # fmt: skip
        iam = self._client("iam")
        trust = {"Version": "2012-10-17", "Statement": [
            {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}
        ]}  # fmt: skip
        iam.create_role(RoleName=VPC, AssumeRolePolicyDocument=json.dumps(trust))
        iam.create_instance_profile(InstanceProfileName=VPC)
        iam.add_role_to_instance_profile(InstanceProfileName=VPC, RoleName=VPC)

    def _work(self) -> None:
        while not self._stopping.wait(0.5):
            try:
                running = {i["InstanceId"]: i for i in self.instances("pending", "running")}
                for instance in [i for i in self._up if i not in running]:
                    self.kill_daemon(self._up.pop(instance))
                for instance in [i for i in running if i not in self._up]:
                    self._up[instance] = self._boot(running[instance])
            except BaseException as error:
                self._failure = error
                return

    def _boot(self, instance: dict[str, Any]) -> str:
        """Boot the host of an instance, and return its daemon's name."""
        number, address = instance["InstanceId"], instance["PrivateIpAddress"]
        data = self.client.describe_instance_attribute(InstanceId=number, Attribute="userData")
        text = base64.b64decode(data["UserData"]["Value"]).decode(errors="replace")
        if "ssh-" not in text:  # a client that encoded it twice
            text = base64.b64decode(text).decode()
        key = re.search(r"ssh-(?:rsa|ed25519) \S+", text)
        if key is None:
            raise ServerError(f"no key in the user data of {number}: {text}")
        disk = self.root / number
        for folder in ("upper", "work", "root"):
            (disk / folder).mkdir(parents=True)
        (disk / "key.pub").write_text(key[0] + "\n")
        (disk / metadata.ROLE).write_text(self._role)
        self._booted += 1
        boot = BOOT.format(
            name=_host_name(address), address=address, gateway=self.switch.gateway, image=self._image,
            disk=disk, python=sys.executable, metadata=metadata.__file__,
        )  # fmt: skip
        name = f"host-{number}"
        self.switch.boot(
            name, f"m{self._booted}", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "bash", "-c", boot
        )
        return name


def _host_name(address: str) -> str:
    return "ip-" + address.replace(".", "-")
