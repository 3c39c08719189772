"""Converts a run's weights to a folder that timm loads; the program of a subprocess, as it needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from rsb_cluster.subprocesses.helper import Send, serve
from rsb_cluster.train.conversion.state_dict import Weights, read_weights
from rsb_cluster.weights.resolve import CONFIG, FOLDER_FILES, WeightsFile


def write_timm_folder(folder: Path, weights: Weights) -> None:
    """Write ``model.safetensors`` and ``config.json`` into an existing folder."""
    model = weights.build()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    # transformers rejects files without the format in their metadata.
    (folder / FOLDER_FILES[0]).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(_config(model, weights), indent=2) + "\n", encoding="utf-8")


def _config(model: Any, weights: Weights) -> dict[str, Any]:
    """Return timm's configuration of a model: how to build it, and how to prepare its images."""
    layers = {key: model.pretrained_cfg.get(key) for key in ("first_conv", "classifier", "pool_size")}
    if weights.eval.resolution != model.pretrained_cfg["input_size"][-1]:
        layers["pool_size"] = None
    config: dict[str, Any] = {
        "architecture": weights.architecture,
        "num_classes": weights.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {
            "tag": weights.name,
            "input_size": [3, weights.eval.resolution, weights.eval.resolution],
            "fixed_input_size": bool(model.pretrained_cfg.get("fixed_input_size")),
            "interpolation": weights.eval.interpolation,
            "crop_pct": weights.eval.crop,
            "crop_mode": "center",
            "mean": list(weights.mean),
            "std": list(weights.std),
            "num_classes": weights.num_classes,
            **layers,
        },
    }
    if weights.kwargs:
        config["model_args"] = dict(weights.kwargs)
    if weights.classes:
        config["label_names"] = list(weights.classes)
    return config


def _work(request: Mapping[str, Any], send: Send) -> None:
    write_timm_folder(Path(request["folder"]), read_weights(WeightsFile(**request["found"])))


if __name__ == "__main__":
    serve(_work)
