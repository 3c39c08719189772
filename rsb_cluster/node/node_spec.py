"""The spec of a cloud run: all that its nodes are told. Plain JSON, so nothing that travels is ever unpickled.

It lies in the run's own folder at ``submissions/<submission id>/spec.json``. A node gets its URL and its SHA-256 with
the engine's task, and believes nothing before the digest is right.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any, Literal

from pydantic import Field

from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.errors import ConfigError

# Environment variables of the engine's task.
SPEC_URL = "RSB_SPEC"
SPEC_SHA256 = "RSB_SPEC_SHA256"
# Set for ranks whose logs nobody else keeps: they copy them into the run's folder as they grow.
COPY_LOGS = "RSB_COPY_LOGS"


class Wheel(Section):
    """This package as it was when the run was submitted, in the run's own folder."""

    url: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class NodeSpec(Section):
    """What a submission's nodes do."""

    format: Literal[1] = 1
    submission_id: str = Field(description="ours, made before the engine knew of the run")
    run_url: str
    run_id: str
    job: dict[str, Any] = Field(description="the job's fields")
    python: str = Field(description="minor version that a node must have, such as 3.11")
    code: Wheel
    pins: tuple[str, ...] = Field(description="what the login machine had, such as torch==2.6.0")

    @property
    def path(self) -> str:
        """Where the spec lies in the run's folder."""
        return f"{folder_of(self.submission_id)}/spec.json"

    def encode(self) -> bytes:
        """Return the file's content."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()


def folder_of(submission_id: str) -> str:
    """Return the folder of a cloud submission in its run's folder."""
    return f"submissions/{submission_id}"


def digest(content: bytes) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def decode(content: bytes, url: str, sha256: str) -> NodeSpec:
    """Return the spec that lay at a URL, or refuse it.

    Args:
        content: The file's content.
        url: Where it lay.
        sha256: The digest that the engine's task names.

    Raises:
        ConfigError: It is not the file that was submitted, or this is not the Python that it is for.
    """
    if digest(content) != sha256:
        raise ConfigError(f"{url} is not what was submitted (its SHA-256 is not {sha256}). Submit the run again.")
    spec = read_record(NodeSpec, json.loads(content), url)
    for inside in (url, spec.code.url):
        if not inside.startswith(spec.run_url + "/") or ".." in inside.split("/"):
            raise ConfigError(f"{inside} is not below the run's own folder {spec.run_url}; nothing else is executed.")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != spec.python:
        raise ConfigError(
            f"this node has Python {here}, the run was submitted with {spec.python}. Mend the job's image."
        )
    return spec
