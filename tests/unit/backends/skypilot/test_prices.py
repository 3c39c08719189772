"""Prices of nodes from SkyPilot's catalogs."""

import pytest

from rsb_cluster.backends.skypilot import prices
from tests.unit.bundled import load_job
from tests.unit.sky_jobs import CPU

VMS = """\
InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,AvailabilityZone
p5.48xlarge,H100,8.0,192.0,2048.0,"{'Name': 'H100, 80 GB'}",98.32,39.0,us-east-1,us-east-1a
p5.48xlarge,H100,8.0,192.0,2048.0,,98.32,29.5,us-west-2,us-west-2a
p5.4xlarge,H100,1.0,16.0,256.0,,12.3,,us-east-1,us-east-1a
m6i.large,,,2.0,8.0,,0.1,0.04,us-east-1,us-east-1a
"""


@pytest.fixture
def catalogs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for version, text in (("v7", VMS.replace("29.5", "1.0")), ("v10", VMS)):
        folder = tmp_path / ".sky" / "catalogs" / version / "aws"
        folder.mkdir(parents=True)
        (folder / "vms.csv").write_text(text)


@pytest.mark.parametrize(
    ("job", "spot", "on_demand"),
    [
        (("cloud-spot",), 29.5, 98.32),
        (("cloud-spot", "cloud.infra=['aws/us-east-1/us-east-1a']"), 39.0, 98.32),
        (("cloud-spot", "gpus_per_node=1", "cloud.accelerators=h100"), None, 12.3),
        (("cloud-spot", "cpus_per_task=25"), None, None),
        (("cloud-gcp-spot",), None, None),
        (("cloud-spot", *CPU, "cpus_per_task=2"), 0.04, 0.1),
        (("cloud-spot", *CPU, "cloud.instance_type=m6i.large"), 0.04, 0.1),
        (("cloud-spot", "cloud.price=7.5"), 7.5, None),
    ],
)
def test_the_lowest_price_of_a_node_that_fits_is_taken_from_the_newest_catalog(catalogs, job, spot, on_demand):
    found = [prices.price(load_job(*job), spot=kind) for kind in (True, False)]
    assert [one and one.usd_per_h for one in found] == [spot, on_demand]


def test_without_a_catalog_the_price_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prices.price(load_job("cloud-spot"), spot=True) is None
