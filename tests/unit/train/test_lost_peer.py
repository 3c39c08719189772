"""Which errors are those of a lost peer."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from rsb_cluster.train.lost_peer import is_lost_peer, is_nccl_error


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
