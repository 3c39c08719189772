"""What lies in the place of weights is named, with what to do."""

from __future__ import annotations

import io
from typing import Any

import pytest
import safetensors.torch
import torch

from rsb_cluster.weights.damage import damage

STATE = {"fc.weight": torch.ones(40, 30), "fc.bias": torch.ones(40)}


def torch_file(**how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, **how)
    return buffer.getvalue()


WHOLE = {
    "safetensors": safetensors.torch.save(STATE),
    "metadata": safetensors.torch.save(STATE, metadata={"format": "pt"}),
    "zip": torch_file(),
    "pickle": torch_file(_use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_file_is_not_damaged(kind: str) -> None:
    assert damage(WHOLE[kind]) == ""


@pytest.mark.parametrize("kind", ["safetensors", "metadata", "zip"])
@pytest.mark.parametrize("left", [12, 100, 0.5, -1])
def test_a_file_that_was_cut_off_says_so(kind: str, left: float) -> None:
    whole = WHOLE[kind]
    content = whole[: int(len(whole) * left) if left == 0.5 else int(left)]
    assert f"was cut off: it has {len(content):,} " in damage(content)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12345\n", "Run 'git lfs pull'"),
        (b"\n <!DOCTYPE html><title>Sign in</title>", "is a web page"),
        (b"<html>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
        (b"Entry not found", "it begins with b'Entry not found'"),
        (b'{"error": "not found"}', "cannot be read as weights"),
    ],
)
def test_what_is_no_weights_is_named(content: bytes, says: str) -> None:
    assert says in damage(content)
