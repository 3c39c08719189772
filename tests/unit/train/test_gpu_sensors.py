"""The sensors of a GPU through NVIDIA's own Python binding, on a C library in place of the driver's."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest

from rsb_cluster.train import gpu_sensors
from rsb_cluster.train.gpu_sensors import GpuSensors, Readings

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")

# 0: done; 3: not supported; 6: not found. A handle is the address of a GPU's name.
DRIVER = r"""
#include <string.h>
typedef struct { unsigned gpu, memory; } rates;
static char *fine = "fine", *old = "old";
static unsigned long long spent = 1000000;
int nvmlInitWithFlags(unsigned flags) { return 0; }
const char *nvmlErrorString(int code) { return "an error"; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **gpu) {
  if (!strcmp(uuid, "GPU-fine")) *gpu = fine; else if (!strcmp(uuid, "GPU-old")) *gpu = old; else return 6;
  return 0;
}
int nvmlDeviceGetUtilizationRates(void *gpu, rates *out) { out->gpu = 75; out->memory = 20; return 0; }
int nvmlDeviceGetPowerUsage(void *gpu, unsigned *milliwatts) { *milliwatts = 350500; return gpu == fine ? 0 : 3; }
int nvmlDeviceGetTotalEnergyConsumption(void *gpu, unsigned long long *millijoules) {
  *millijoules = spent += 2500; return gpu == fine ? 0 : 3;
}
"""


@pytest.fixture
def _driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "driver.so", "driver.c"], cwd=tmp_path, check=True)
    monkeypatch.setattr(pynvml, "nvmlLib", ctypes.CDLL(str(tmp_path / "driver.so")))
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setattr(gpu_sensors, "_EVERY_S", 3600.0)  # the test itself looks


@pytest.mark.usefixtures("_driver")
def test_each_reading_is_of_the_time_since_the_last() -> None:
    sensors = GpuSensors("fine")
    sensors._sample()
    sensors._sample()
    assert sensors.take() == Readings(utilization=0.75, power_w=350.5, energy_j=2.5)
    after = sensors.take()
    assert after.energy_j == 2.5 and math.isnan(after.utilization) and math.isnan(after.power_w)
    sensors.close()


@pytest.mark.usefixtures("_driver")
def test_what_a_gpu_cannot_tell_is_not_known_and_never_zero() -> None:
    sensors = GpuSensors("old")
    sensors._sample()
    readings = sensors.take()
    assert readings.utilization == 0.75 and math.isnan(readings.power_w) and math.isnan(readings.energy_j)
    sensors.close()


@pytest.mark.usefixtures("_driver")
def test_a_part_of_a_gpu_has_no_readings() -> None:
    assert all(map(math.isnan, vars(GpuSensors("of-a-mig-instance").take()).values()))


def test_without_a_driver_nothing_is_known() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert all(map(math.isnan, vars(GpuSensors("any").take()).values()))
    else:
        pytest.skip("this machine has NVIDIA's driver")
