"""Every kind of file leads to the same tensors; what is no weight, or does not fit, is named."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch

from rsb_cluster.errors import CheckpointError, ConfigError, MissingError
from rsb_cluster.runs.run import Run
from rsb_cluster.storage.store import Store
from rsb_cluster.train.conversion.state_dict import Weights, fit_weights, load_weights, parse, read_weights
from rsb_cluster.weights.resolve import WeightsFile, find_weights
from tests.equality import assert_bit_equal, final_state


def test_the_moving_average_is_taken_where_there_is_one_and_not_where_it_is_unwanted(trained: Run) -> None:
    state = final_state(trained)
    for ema, kind in ((None, "ema"), (True, "ema"), (False, "model")):
        weights = load_weights(trained.url, ema=ema)
        assert weights.found.is_ema == (kind == "ema")
        assert_bit_equal(dict(weights.tensors), dict(state[kind]))
    assert not torch.equal(state["ema"]["fc.weight"], state["model"]["fc.weight"])


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
    with pytest.raises(ConfigError, match="does not name the network of its weights"):
        load_weights(anywhere.locate("alone.safetensors"))
    with pytest.raises(MissingError):
        load_weights(anywhere.locate("none.safetensors"))
    with pytest.raises(ConfigError, match="there is nothing at"):
        load_weights(anywhere.locate("nothing"))
    anywhere.write_bytes("notes/readme.txt", b"none here")
    with pytest.raises(ConfigError, match="holds no weights: it is neither a run"):
        load_weights(anywhere.locate("notes"))


# --- reading --------------------------------------------------------------------------------------------------------


def found_file(path: Path) -> WeightsFile:
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
    torch.save({"net": {"a": torch.ones(1)}}, tmp_path / "other.pth")
    torch.save({5: torch.ones(1)}, tmp_path / "number.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    for name, message in (
        ("evil.pth", r"without executing code in it: it holds [\w.]+\. Save only the state dict, as \.safetensors\.$"),
        ("text.safetensors", "cannot be read as weights"),
        ("none.pth", "has no state dict.*: it holds 'epoch'. Save only"),
        ("other.pth", "has no state dict.*, nor one as .*model_ema.*: it holds 'net'. Save only"),
        ("number.pth", "has no state dict.*: it holds 5. Save only"),
        ("list.pth", "has no state dict.*: it holds a list. Save only"),
    ):
        found = found_file(tmp_path / name)
        with pytest.raises(CheckpointError, match=message):
            parse(found.read(), found)
    assert not (tmp_path / "owned").exists()


def test_what_was_cut_off_or_holds_nan_is_named(tmp_path: Path) -> None:
    old = tmp_path / "old.pth"
    torch.save({"a.weight": torch.ones(9, 9)}, old, _use_new_zipfile_serialization=False)
    for left in (30, -1):
        (tmp_path / "cut.pth").write_bytes(old.read_bytes()[:left])
        found = found_file(tmp_path / "cut.pth")
        with pytest.raises(CheckpointError, match=r"cut.pth was cut off: it has \d+ bytes. Copy or download it again"):
            parse(found.read(), found)
    bad = torch.tensor([1.0, float("nan")])
    torch.save({"a": torch.ones(2), "b": bad.half(), "c": bad, "n": torch.tensor(1)}, tmp_path / "nan.pth")
    found = found_file(tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"nan.pth: the tensor 'b' holds NaN"):
        parse(found.read(), found)


@pytest.mark.parametrize("tensor", [torch.ones(2, device="meta"), torch.ones(2).to(torch.complex64)])
def test_a_tensor_that_is_not_plain_numbers_is_named(tmp_path: Path, tensor: torch.Tensor) -> None:
    """A complex one would lose its imaginary part without a word."""
    torch.save({"a": torch.ones(2), "b": tensor}, tmp_path / "odd.pth")
    found = found_file(tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"odd.pth: the tensor 'b' is not stored as plain numbers"):
        parse(found.read(), found)


def test_a_files_name_need_not_say_its_format(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(2)}
    safetensors.torch.save_file(state, tmp_path / "w.pth")
    torch.save(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        found = found_file(tmp_path / name)
        assert_bit_equal(parse(found.read(), found), state)


def test_of_a_file_with_a_moving_average_either_is_read(tmp_path: Path) -> None:
    plain, average = (timm.create_model("test_resnet", num_classes=7).state_dict() for _ in range(2))
    wrapped = {f"module.{name}": value for name, value in average.items()} | {"n_averaged": torch.tensor(3)}
    torch.save({"model": plain, "model_ema": wrapped, "epoch": 3}, tmp_path / "both.pth")
    torch.save({"state_dict": plain}, tmp_path / "plain.pth")
    torch.save({"state_dict_ema": average}, tmp_path / "average.pth")

    def read(name: str, ema: bool | None) -> Weights:
        return read_weights(found_file(tmp_path / name), "test_resnet", ema)

    for ema, entry, state in ((None, "model_ema", average), (True, "model_ema", average), (False, "model", plain)):
        weights = read("both.pth", ema)
        assert (weights.entry, weights.entries, weights.is_ema) == (entry, ("model_ema", "model"), state is average)
        assert_bit_equal(dict(weights.tensors), dict(state))
    assert read("plain.pth", False).entry == "state_dict"
    with pytest.raises(ConfigError, match=r"plain.pth has no moving average of its weights.*Omit --ema"):
        read("plain.pth", True)
    with pytest.raises(ConfigError, match=r"average.pth has only a moving average.*Omit --no-ema"):
        read("average.pth", False)


@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "module.model."])
def test_the_prefix_of_a_lightning_module_is_removed(tmp_path: Path, prefix: str) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.0", "loops": {}}, tmp_path / "w.ckpt")
    found = found_file(tmp_path / "w.ckpt")
    weights = read_weights(found, "test_resnet")
    assert weights.num_classes == 7
    assert_bit_equal(dict(weights.build().state_dict()), dict(model.state_dict()))
    assert_bit_equal(
        dict(fit_weights(model, parse(found.read(), found), "test_resnet", "w").tensors), model.state_dict()
    )


# --- fitting --------------------------------------------------------------------------------------------------------


def test_a_classifier_is_new_where_the_classes_differ_or_when_asked() -> None:
    given = timm.create_model("test_resnet", num_classes=7)
    same, other = (timm.create_model("test_resnet", num_classes=n) for n in (7, 5))
    head = {"fc.weight", "fc.bias"}
    for model, how, new in ((same, "auto", set()), (same, "replace", head), (other, "auto", head)):
        taken = fit_weights(model, given.state_dict(), "test_resnet", "w", how)  # type: ignore[arg-type]
        assert set(taken.new) == new
        for name, tensor in taken.tensors.items():
            assert torch.equal(tensor, (model if name in new else given).state_dict()[name])


@pytest.mark.parametrize("on_meta", [False, True])
def test_position_embeddings_are_interpolated_as_timm_does_it(on_meta: bool) -> None:
    given = timm.create_model("test_vit", img_size=64, num_classes=3)
    with torch.device("meta" if on_meta else "cpu"):
        model = timm.create_model("test_vit", img_size=96, num_classes=3)
    taken = fit_weights(model, given.state_dict(), "test_vit", "w")
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
        fit_weights(model, state, "test_resnet", "weights.pth")
    message = str(caught.value)
    assert f"{gone} is missing; stranger is not in the model; conv1" in message
    assert "has the shape (1, 2) and not (" in message


def test_integers_are_no_weights_and_names_of_another_prefix_are_shown() -> None:
    """8-bit weights would be taken for numbers from -128 to 127; a Lightning module has more than its network."""
    model = timm.create_model("test_resnet", num_classes=7)
    state = model.state_dict()
    with pytest.raises(ConfigError, match=r"does not fit test_resnet: fc\.weight has integers \(torch\.int8\)\.$"):
        fit_weights(model, state | {"fc.weight": state["fc.weight"].to(torch.int8)}, "test_resnet", "w")
    inside = {f"model.{name}": tensor for name, tensor in state.items()} | {"loss.weight": torch.ones(7)}
    with pytest.raises(
        ConfigError, match=r"is missing; \S+ is missing; model\.\S+ is not in the model.*; and \d+ more\.$"
    ):
        fit_weights(model, inside, "test_resnet", "w")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": 5}, "needs a config.json with an architecture"),
        ({"pretrained_cfg": []}, "pretrained_cfg is no table"),
        ({"model_args": [1]}, "model_args is no table"),
        ({"pretrained_cfg": {"input_size": 7}}, "has values that timm does not take"),
        ({"pretrained_cfg": {"crop_pct": "big"}}, "has values that timm does not take: .*crop"),
        ({"pretrained_cfg": None, "model_args": None, "label_names": None}, ""),
    ],
)
def test_a_config_of_others_is_taken_or_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet"} | config))
    if not message:
        assert read_weights(find_weights(str(tmp_path), "")).num_classes == 7
        return
    with pytest.raises(ConfigError, match=message):
        read_weights(find_weights(str(tmp_path), ""))
