"""A node believes the spec that was submitted and no other."""

import json

import pytest

from rsb_cluster.backends.skypilot.sky_task import sky_task
from rsb_cluster.errors import ConfigError, NewerVersionError
from rsb_cluster.node.node_spec import SPEC_SHA256, SPEC_URL, Wheel, decode, digest
from tests.unit.bundled import load_job
from tests.unit.sky_jobs import HERE, RUN, spec_of


def test_a_node_believes_the_spec_that_was_submitted_and_no_other():
    made = spec_of(load_job("cloud-spot"))
    url = f"{RUN}/{made.path}"
    environment = sky_task(made, {})["envs"]
    assert environment == {SPEC_URL: url, SPEC_SHA256: digest(made.encode())}
    assert decode(made.encode(), url, environment[SPEC_SHA256]) == made
    with pytest.raises(ConfigError, match="is not what was submitted"):
        decode(made.encode() + b" ", url, environment[SPEC_SHA256])


@pytest.mark.parametrize(
    ("changes", "url", "message"),
    [
        ({"python": "3.9"}, RUN, f"this node has Python {HERE}, the run was submitted with 3.9"),
        ({"code": Wheel(url="s3://other/x.whl", sha256="0" * 64)}, RUN, "s3://other/x.whl is not below the run's own"),
        ({}, "s3://bucket/runs/other", "is not below the run's own folder"),
        ({"code": Wheel(url=f"{RUN}-evil/x.whl", sha256="0" * 64)}, RUN, "is not below the run's own folder"),
        ({"code": Wheel(url=f"{RUN}/../x.whl", sha256="0" * 64)}, RUN, "is not below the run's own folder"),
    ],
)
def test_a_spec_that_points_elsewhere_is_refused(changes, url, message):
    made = spec_of(load_job("cloud-spot"), **changes)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        decode(made.encode(), f"{url}/{made.path}", digest(made.encode()))


def test_a_spec_of_another_format_is_refused():
    content = json.dumps(spec_of(load_job("cloud")).model_dump(mode="json") | {"format": 2}).encode()
    with pytest.raises(NewerVersionError, match="'format' in it is not known"):
        decode(content, f"{RUN}/spec.json", digest(content))
