"""Which GPUs ranks may have, and which errors are those of a lost peer."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from rsb_cluster.errors import ConfigError
from rsb_cluster.train.distributed import check_gpus, is_lost_peer, is_nccl_error


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


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:1"),
        RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 900000ms for recv operation"),
        RuntimeError("Broken pipe"),
        dist.DistNetworkError("The client socket has timed out"),
        dist.DistStoreError("wait timeout"),
    ],
)
def test_what_a_peer_did_is_a_lost_peer(error):
    assert is_lost_peer(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at gloo/transport/tcp/device.cc:83] ifa != nullptr. Unable to find interface nope0"
        ),
        RuntimeError("[gloo/transport/tcp/buffer.cc] op.preamble.length <= op.nbytes. 8 vs 4"),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:2251, unhandled system error"),
        ValueError("Connection closed by peer"),
    ],
)
def test_what_is_wrong_here_is_none(error):
    assert not is_lost_peer(error)


def test_an_error_of_nccl_is_one_whoever_caused_it():
    assert is_nccl_error(dist.DistBackendError("NCCL error in: x, remote process exited"))
    assert not is_nccl_error(RuntimeError("shape mismatch"))
