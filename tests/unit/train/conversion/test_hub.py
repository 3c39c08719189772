"""Weights by timm's names, from the cache of the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

from rsb_cluster.errors import ConfigError
from rsb_cluster.train.conversion.hub import fetch
from rsb_cluster.train.conversion.state_dict import load_weights
from rsb_cluster.weights.resolve import find_weights
from tests.equality import assert_bit_equal


@pytest.fixture
def cached_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The hub's cache of a machine that once fetched timm's test_resnet.r160_in1k, and has no network now."""
    state = timm.create_model("test_resnet").state_dict()
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(state, snapshot / "model.safetensors")
    config = {"architecture": "test_resnet", "pretrained_cfg": {"tag": "r160_in1k", "input_size": [3, 160, 160]}}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return dict(state)


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_resnet", "hf-hub:timm/test_resnet.r160_in1k"])
def test_a_timm_name_is_found_in_the_hubs_cache(cached_hub: dict[str, torch.Tensor], name: str) -> None:
    found = find_weights(name, "/nowhere", fetch=fetch)
    assert found.architecture == "test_resnet" and "test_resnet.r160_in1k" in found.source
    weights = load_weights(name, runs="/nowhere")
    assert_bit_equal(dict(weights.tensors), cached_hub)
    assert (weights.eval.resolution, weights.num_classes) == (160, 1000)
    assert dataclasses.replace(found, config={}) == dataclasses.replace(weights.found, config={})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18.a1_in1k", "could not be fetched from the Hugging Face Hub.*Without a network, name a file"),
        ("resnet18.a9_in1k", r"timm has no weights of that name. For this model it has: .*resnet18.a1_in1k"),
        ("resnet5O", "timm has no such model. Did you mean 'resnet50'"),
    ],
)
def test_a_timm_name_that_cannot_be_had(cached_hub: object, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_weights(name, runs="/nowhere")
