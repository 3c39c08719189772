"""Which GPUs the ranks of an attempt may have, and what they do about a bad one."""

from __future__ import annotations

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.train.devices import DeviceError, check_gpus, check_health
from rsb_cluster.train.lost_peer import LostPeerError


def card(host: str, gpu: str, model: str = "NVIDIA H100") -> dict[str, str]:
    return {"host": host, "gpu": gpu, "model": model}


def test_each_rank_has_a_gpu_of_its_own():
    assert check_gpus([card("n1", "GPU-a"), card("n1", "GPU-b"), card("n2", "GPU-c")]) == ("NVIDIA H100",)
    assert check_gpus([card("n1", "", ""), card("n1", "", "")]) == ()


def test_ranks_that_were_bound_to_one_gpu_are_refused_by_number():
    cards = [card("n1", "GPU-a"), card("n2", "GPU-b"), card("n2", "GPU-c"), card("n2", "GPU-b")]
    with pytest.raises(ConfigError, match=r"ranks 1, 3 on n2 have the same GPU \(GPU-b\).*--gpu-bind=closest"):
        check_gpus(cards)


def test_different_gpus_are_warned_of(caplog):
    models = check_gpus([card("n1", "GPU-a"), card("n2", "GPU-b", "NVIDIA A100"), card("n2", "GPU-c", "NVIDIA A100")])
    assert models == ("NVIDIA H100", "NVIDIA A100")
    assert "1 x NVIDIA H100, 2 x NVIDIA A100" in caplog.text


def test_the_rank_of_a_bad_gpu_leaves_and_the_others_name_it(caplog: pytest.LogCaptureFixture) -> None:
    good = {"host": "n1", "gpu": "GPU-a", "model": "", "fault": "", "remark": ""}
    bad = good | {"host": "n2", "gpu": "GPU-b", "fault": "is broken"}
    check_health([good, good | {"remark": "old news"}], 0)
    assert not caplog.text
    for rank, kind in ((0, LostPeerError), (1, DeviceError)):
        with pytest.raises(kind, match=r"rank 1 on n2, GPU GPU-b: is broken.*--exclude-failed-hosts"):
            check_health([good, bad], rank)
    check_health([good, good | {"remark": "old news"}], 1)
    assert "old news" in caplog.text
