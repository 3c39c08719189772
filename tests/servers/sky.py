"""The real SkyPilot, offline: its API server with a home of its own, a price list of a few lines, and no internet.

All of it runs from the virtual environment that tests/cloud/setup.sh makes: SkyPilot needs some hundred packages.
Managed jobs are controlled in the API server's own machine ("consolidation mode"), so no machine is rented for that.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.servers.daemons import GUARD_S, Server, free_ports, kill_all, listening, missing_tools
from tests.servers.ec2 import REGION, VPC, ZONES, Ec2
from tests.servers.login import SlurmByLogin

# Prices in US dollars an hour, about those of 2026. The machine with GPUs is here to be priced, not to be booted.
MACHINES = ("m6i.xlarge,,,4.0,16.0,,0.192,0.07", "p5.48xlarge,H100,8.0,192.0,2048.0,,55.04,29.5")
IMAGES = ("skypilot:custom-cpu-ubuntu", "skypilot:custom-gpu-ubuntu-cuda13")

# remote_identity: the role that the machines have anyway, instead of a copy of the user's credentials.
AWS_CONFIG = f"""\
aws:
  vpc_names: {VPC}
  use_internal_ips: true
  use_ssm: false
  remote_identity: {VPC}
"""


class Sky(Server):
    """SkyPilot's API server and its jobs controller.

    Args:
        env: Environment of the server, such as the store's credentials.

    ``env`` makes SkyPilot's clients, and ours, talk to it.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        super().__init__("rsb-sky-")
        self.home = self.root / "home"
        (self._port,) = free_ports(1)
        self._marker = f"\0HOME={self.home}\0"
        self.env = {
            **env,
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SKYPILOT_API_SERVER_LOCAL_PORT": str(self._port),
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
            "SKYPILOT_POD_MEMORY_GB_LIMIT": "6",  # one process of the jobs controller, not one a gigabyte
        }
        self._config = "jobs:\n  controller:\n    consolidation_mode: true\n"

    @staticmethod
    def unavailable() -> list[str]:
        """What this machine lacks."""
        return missing_tools(["ssh", "sshd", "rsync", "setpriv", "unshare"])

    def use_ec2(self, ec2: Ec2) -> None:
        """Make machines of EC2 available; before the start."""
        image = ec2.client.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        known = ec2.client.describe_availability_zones()["AvailabilityZones"]
        zones = [zone["ZoneId"] for zone in known if zone["ZoneName"] in ZONES]
        self._write_catalog(
            "aws/vms.csv",
            "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone,Arch",
            *(f"{machine},{REGION},{zone},x86_64" for machine in MACHINES for zone in zones),
        )
        self._write_catalog(
            "aws/images.csv", "Tag,Region,OS,OSVersion,ImageId,CreationDate,BaseImageId",
            *(f"{tag},{REGION},ubuntu,22.04,{image},20260101," for tag in IMAGES),
        )  # fmt: skip
        self._write_catalog("aws/instance_quota_mapping.csv", "InstanceType,OnDemandInstanceCode,SpotInstanceCode")
        self._write_catalog("common/accelerators.csv", "AcceleratorName,Clouds", "H100,['AWS']")
        self._write_catalog("common/metadata.csv", "AcceleratorName,MemoryInfo")
        self._config += AWS_CONFIG
        self.env |= ec2.env

    def _write_catalog(self, name: str, *lines: str) -> None:
        path = self.home / ".sky/catalogs/v8" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")

    def use_slurm(self, cluster: SlurmByLogin) -> None:
        """Make a Slurm cluster available; before the start."""
        (self.home / ".slurm").mkdir(parents=True)
        (self.home / ".slurm/config").write_text(cluster.ssh_config)

    def start(self) -> None:
        (self.home / ".sky").mkdir(parents=True, exist_ok=True)
        (self.home / ".sky/config.yaml").write_text(self._config)
        self.spawn("api", "sky", "api", "start", "--foreground", env=self.env)
        self.wait_daemon("api", lambda: listening(self._port))

    def run(self, *argv: str, timeout: float = GUARD_S) -> str:
        """Run a command of SkyPilot's (``sky ...``) or another that is to talk to it, and return its output."""
        return self.command(*argv, env=self.daemon_env() | self.env, timeout=timeout)

    def jobs(self) -> list[dict[str, Any]]:
        """The managed jobs, the last first, as SkyPilot's own Python interface tells."""
        program = (
            "import json, sky\n"
            "found = sky.get(sky.jobs.queue(refresh=False, version=2))\n"
            "rows = found[0] if isinstance(found, tuple) else found\n"
            "rows = [row if isinstance(row, dict) else row.model_dump() for row in rows]\n"
            "print(json.dumps(rows, default=str))"
        )
        return list(json.loads(self.run(sys.executable, "-c", program).splitlines()[-1]))

    def tell(self) -> str:
        """Return the ends of what it logged about the jobs, for error messages."""
        logs = sorted(self.home.glob("sky_logs/*/provision.log")) + sorted(
            self.home.glob("sky_logs/jobs_controller/*.log")
        )
        tails = [f"--- {path}\n{path.read_text(errors='replace')[-2500:]}" for path in logs]
        return "\n".join([*tails, self.log_tails()])

    def stop(self) -> None:
        kill_all(None, [self._marker])
        super().stop()
