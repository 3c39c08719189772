"""Weights by their timm name, from the Hugging Face Hub or its local cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from timm.models import get_pretrained_cfg, load_model_config_from_hf
from timm.models._hub import download_cached_file, hf_split

from rsb_cluster.errors import ConfigError, did_you_mean
from rsb_cluster.subprocesses.helper import serve
from rsb_cluster.weights.resolve import FOLDER_FILES, PROCEDURES, WeightsFile


def fetch(name: str) -> WeightsFile:
    """Return the weights file of a timm name (``resnet50.a1_in1k``) or of a repository (``hf-hub:owner/model``).

    Raises:
        ConfigError: The name is unknown, has no weights, or the hub cannot be reached.
    """
    try:
        return _fetch_repository(name) if ":" in name else _fetch_timm(name)
    except (OSError, HfHubHTTPError, AssertionError, KeyError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"the weights '{name}' could not be fetched from the Hugging Face Hub: {first} Without a network, name a "
            "file, or a folder with config.json and model.safetensors."
        ) from error


def _fetch_timm(name: str) -> WeightsFile:
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ConfigError(f"timm has no such model.{did_you_mean(architecture, timm.list_models())}")
    cfg = get_pretrained_cfg(name) if name in (architecture, *timm.list_pretrained(f"{architecture}.*")) else None
    if cfg is None or cfg.custom_load or not (cfg.hf_hub_id or isinstance(cfg.url, str)):
        available = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise ConfigError(f"timm has no weights of that name. For this model it has: {available}.")
    path = _download(cfg.hf_hub_id, cfg.hf_hub_filename) if cfg.hf_hub_id else Path(download_cached_file(str(cfg.url)))
    pretrained = cfg.to_dict(remove_source=True)
    config = {"architecture": architecture, "num_classes": cfg.num_classes, "pretrained_cfg": pretrained}
    return _describe(f"{architecture}.{cfg.tag}" if cfg.tag else architecture, path, config)


def _fetch_repository(name: str) -> WeightsFile:
    repository = name.partition(":")[2]
    pretrained, architecture, arguments = load_model_config_from_hf(repository)
    config = {"architecture": architecture, "num_classes": pretrained.get("num_classes"), "model_args": arguments}
    return _describe(f"hf-hub:{repository}", _download(repository, None), config | {"pretrained_cfg": pretrained})


def _download(repository: str, file: str | None) -> Path:
    """Return the path of the repository's weights file in the hub's cache; download it if it is not there."""
    owner_and_name, revision = hf_split(repository)
    names = [file] if file else list(FOLDER_FILES)
    for local_only in (True, False):  # a cached file needs no network
        for name in names:
            try:
                return Path(hf_hub_download(owner_and_name, name, revision=revision, local_files_only=local_only))
            except LocalEntryNotFoundError:
                if not local_only:
                    raise
            except EntryNotFoundError:
                continue
    raise ConfigError(f"{repository} has none of these files: {', '.join(names)}.")


def _describe(source: str, path: Path, config: dict[str, Any]) -> WeightsFile:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    plain: dict[str, Any] = json.loads(json.dumps(config))  # tuples become lists, as in a config.json
    tag = plain["pretrained_cfg"].get("tag", "")
    return WeightsFile(
        source, str(path.parent), path.name, sha256, plain["architecture"], plain, procedure=PROCEDURES.get(tag, "")
    )


if __name__ == "__main__":
    serve(lambda name, send: send(**asdict(fetch(name))))
