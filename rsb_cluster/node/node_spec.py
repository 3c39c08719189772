"""The spec of a cloud run: the nodes' instructions. It is plain JSON, so nodes unpickle nothing.

The spec is in the run's own folder at ``submissions/<submission id>/spec.json``. A node gets its URL and its SHA-256 in
SkyPilot's task, and checks the digest before it uses the spec.
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any, Literal

from pydantic import Field

from rsb_cluster.config.schema import Section, read_record
from rsb_cluster.errors import ConfigError

# Environment variables of SkyPilot's task.
SPEC_URL = "RSB_SPEC"
SPEC_SHA256 = "RSB_SPEC_SHA256"
# Set for ranks that must copy their growing logs into the run's folder, as the nodes share no file system.
COPY_LOGS = "RSB_COPY_LOGS"


class Wheel(Section):
    """The wheel of this package from the time of the submission, in the run's own folder."""

    url: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class NodeSpec(Section):
    """The instructions for the nodes of a submission."""

    format: Literal[1] = 1
    submission_id: str = Field(description="ours, made before the engine knew of the run")
    run_url: str
    run_id: str
    job: dict[str, Any] = Field(description="the job's fields")
    data: str = Field("", description="where the run's data are now; empty: where its spec says")
    python: str = Field(description="minor version that a node must have, such as 3.11")
    code: Wheel
    pins: tuple[str, ...] = Field(description="what the login machine had, such as torch==2.6.0")

    @property
    def path(self) -> str:
        """The path of the spec in the run's folder."""
        return f"{submission_folder(self.submission_id)}/spec.json"

    def encode(self) -> bytes:
        """Return the file's content."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()


def submission_folder(submission_id: str) -> str:
    """Return the folder of a cloud submission in its run's folder."""
    return f"submissions/{submission_id}"


def digest(content: bytes) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def decode(content: bytes, url: str, sha256: str) -> NodeSpec:
    """Verify the content of a spec file, and return the spec.

    Args:
        content: The file's content.
        url: The file's URL.
        sha256: The digest in SkyPilot's task.

    Raises:
        ConfigError: The file is not the one that was submitted, or is for another version of Python.
    """
    if digest(content) != sha256:
        raise ConfigError(f"{url} is not what was submitted (its SHA-256 is not {sha256}). Submit the run again.")
    spec = read_record(NodeSpec, json.loads(content), url)
    for location in (url, spec.code.url):
        if not location.startswith(spec.run_url + "/") or ".." in location.split("/"):
            raise ConfigError(f"{location} is not below the run's own folder {spec.run_url}, so it is not executed.")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if version != spec.python:
        raise ConfigError(
            f"this node has Python {version}, the run was submitted with {spec.python}. Fix the job's image."
        )
    return spec
