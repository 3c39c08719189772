"""Weights: every kind of source leads to the same tensors; what is no weight, or does not fit, is named."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import constants

from rsb_cluster.config.recipe import Recipe
from rsb_cluster.errors import CheckpointError, ConfigError, MissingError
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.conversion.hub import fetch
from rsb_cluster.train.conversion.state_dict import fitted, load_weights, parse
from rsb_cluster.weights.resolve import Found, find_weights, initial_weights
from tests.equality import assert_bit_equal, final_state


def no_hub(name: str) -> Found:
    raise ConfigError(f"timm does not know {name}.")


def recipe_from(run: Run, source: str, **model: str) -> Recipe:
    recipe = run.recipe()
    changed = {"init": recipe.init.model_copy(update={"weights": source})}
    return recipe.model_copy(update={**changed, "model": recipe.model.model_copy(update=model)})


# --- finding --------------------------------------------------------------------------------------------------------


def test_a_run_its_beginning_its_folder_and_its_checkpoint_are_one_source(trained: Run) -> None:
    names = (trained.run_id, trained.run_id.rpartition("-")[0], trained.url, f"{trained.url}/")
    found = [find_weights(name, trained.runs_url, fetch=no_hub) for name in names]
    found.append(find_weights(found[0].source, "", fetch=no_hub))
    assert len(set(map(str, found))) == 1
    assert (found[0].architecture, found[0].step, found[0].run_url) == ("test_resnet", 18, trained.url)
    assert found[0].source.startswith(f"{trained.url}/checkpoints/step-00000018-a0001")


def test_the_moving_average_is_taken_where_there_is_one_and_not_where_it_is_unwanted(trained: Run) -> None:
    state = final_state(trained)
    for ema, kind in ((None, "ema"), (True, "ema"), (False, "model")):
        weights = load_weights(trained.url, ema=ema)
        assert weights.found.is_ema == (kind == "ema")
        assert_bit_equal(dict(weights.tensors), dict(state[kind]))
    assert not torch.equal(state["ema"]["fc.weight"], state["model"]["fc.weight"])


def test_the_best_checkpoint_and_that_of_a_step(trained: Run) -> None:
    best = json.loads((Path(trained.url) / "result.json").read_text())["best_step"]
    assert find_weights(trained.url, "", which="best").step == best
    assert find_weights(trained.url, "", which="15").step == 15
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; it has those of .*15"):
        find_weights(trained.url, "", which="4")
    with pytest.raises(ConfigError, match="'newest' is no checkpoint: it is last, best, or a step"):
        find_weights(trained.url, "", which="newest")


def test_files_and_folders_anywhere(anywhere: Store) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    state = model.state_dict()
    buffer = safetensors.torch.save(state)
    shown = {"input_size": [3, 96, 96], "crop_pct": 0.9, "mean": [0.5] * 3, "tag": "a2_in1k"}
    config = {"architecture": "test_resnet", "label_names": list("abcdefg"), "pretrained_cfg": shown}
    anywhere.write_bytes("alone.safetensors", buffer)
    anywhere.write_bytes("folder/model.safetensors", buffer)
    anywhere.write_json("folder/config.json", config)
    alone = load_weights(anywhere.locate("alone.safetensors"), model="test_resnet")
    folder = load_weights(anywhere.locate("folder"))
    for weights in (alone, folder):
        assert_bit_equal(dict(weights.tensors), dict(state))
        assert weights.num_classes == 7
    assert alone.digest == folder.digest
    assert (folder.eval.resolution, folder.eval.crop, folder.mean, folder.tag) == (96, 0.9, (0.5,) * 3, "a2_in1k")
    assert folder.classes == tuple("abcdefg") and folder.found.procedure == "A2"
    with pytest.raises(ConfigError, match="does not say what network its weights are for"):
        load_weights(anywhere.locate("alone.safetensors"))
    with pytest.raises(MissingError):
        load_weights(anywhere.locate("none.safetensors"))
    with pytest.raises(ConfigError, match="holds no weights: it is neither a run"):
        load_weights(anywhere.locate("nothing"))


def test_a_name_that_stands_for_nothing_or_for_two_runs(trained: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'digit5' is no run in .* As a timm name: timm does not know digit5"):
        find_weights("digit5", trained.runs_url, fetch=no_hub)
    for name in ("one", "other"):
        shutil.copytree(trained.url, tmp_path / f"run-{name}")
    with pytest.raises(ConfigError, match="'run-' is the beginning of 2 runs"):
        find_weights("run-", str(tmp_path), fetch=no_hub)


def test_what_is_read_is_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    found = find_weights(str(path), "")
    path.write_bytes(safetensors.torch.save({"a": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        found.read()


# --- starting from them ---------------------------------------------------------------------------------------------


def test_a_start_is_of_the_recipes_architecture_and_does_not_change_any_more(trained: Run, tmp_path: Path) -> None:
    assert initial_weights(trained.recipe(), "") is None
    found = initial_weights(recipe_from(trained, trained.run_id), trained.runs_url)
    assert found == find_weights(trained.url, "")
    with pytest.raises(ConfigError, match=r"is a test_resnet, model.name is 'resnet18'. Use --model test_resnet"):
        initial_weights(recipe_from(trained, trained.url, name="resnet18"), "")
    shutil.copytree(trained.url, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "result.json").unlink()
    with pytest.raises(ConfigError, match=r"has not finished.*name a checkpoint: --init (\S+)") as caught:
        initial_weights(recipe_from(trained, str(tmp_path / "unfinished")), "")
    named = str(caught.value).rpartition(" ")[2]
    assert initial_weights(recipe_from(trained, named), "") == find_weights(named, "")


# --- reading --------------------------------------------------------------------------------------------------------


def found_file(path: Path) -> Found:
    return find_weights(str(path), "")


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", None])
def test_a_state_dict_is_found_inside_a_training_checkpoint(tmp_path: Path, key: str | None) -> None:
    state = {"conv.weight": torch.arange(4.0)}
    wrapped = {f"module.{name}": value for name, value in state.items()}
    inside: Any = {"epoch": 3, "args": argparse.Namespace(lr=1), key: wrapped} if key else wrapped
    torch.save(inside, tmp_path / "w.pth")
    found = found_file(tmp_path / "w.pth")
    assert_bit_equal(parse(found.read(), found), state)


def test_nothing_is_run_that_is_in_a_file(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.safetensors").write_text("no tensors")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    for name, message in (
        ("evil.pth", "without running what is in it"),
        ("text.safetensors", "holds no weights that can be read"),
        ("none.pth", "holds no state dict"),
    ):
        found = found_file(tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            parse(found.read(), found)
    assert not (tmp_path / "owned").exists()


# --- fitting --------------------------------------------------------------------------------------------------------


def test_a_classifier_is_new_where_the_classes_differ_or_when_asked() -> None:
    given = timm.create_model("test_resnet", num_classes=7)
    same, other = (timm.create_model("test_resnet", num_classes=n) for n in (7, 5))
    head = {"fc.weight", "fc.bias"}
    for model, how, new in ((same, "auto", set()), (same, "replace", head), (other, "auto", head)):
        taken = fitted(model, given.state_dict(), "test_resnet", "w", how)  # type: ignore[arg-type]
        assert set(taken.new) == new
        for name, tensor in taken.tensors.items():
            assert torch.equal(tensor, (model if name in new else given).state_dict()[name])


@pytest.mark.parametrize("on_meta", [False, True])
def test_position_embeddings_are_interpolated_as_timm_does_it(on_meta: bool) -> None:
    given = timm.create_model("test_vit", img_size=64, num_classes=3)
    with torch.device("meta" if on_meta else "cpu"):
        model = timm.create_model("test_vit", img_size=96, num_classes=3)
    taken = fitted(model, given.state_dict(), "test_vit", "w")
    assert taken.resized == ("pos_embed",) and taken.new == ()
    theirs = timm.create_model(
        "test_vit", img_size=96, num_classes=3, pretrained=True,
        pretrained_cfg_overlay={"state_dict": given.state_dict(), "num_classes": 3},
    )  # fmt: skip
    assert_bit_equal(dict(taken.tensors), dict(theirs.state_dict()))


def test_what_does_not_fit_is_named() -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    state = model.state_dict()
    state["conv1.0.weight" if "conv1.0.weight" in state else "conv1.weight"] = torch.zeros(1, 2)
    gone = next(name for name in state if name.endswith("bn1.weight"))
    del state[gone]
    state["stranger"] = torch.zeros(1)
    with pytest.raises(ConfigError) as caught:
        fitted(model, state, "test_resnet", "weights.pth")
    message = str(caught.value)
    assert f"{gone} is missing; stranger is not in the model; conv1" in message
    assert "has the shape (1, 2) and not (" in message


# --- the hub --------------------------------------------------------------------------------------------------------


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
        ("resnet18.a9_in1k", r"timm has no weights of that name. It has, of this model: .*resnet18.a1_in1k"),
        ("resnet5O", "timm has no such model. Did you mean 'resnet50'"),
    ],
)
def test_a_timm_name_that_cannot_be_had(cached_hub: object, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_weights(name, runs="/nowhere")
