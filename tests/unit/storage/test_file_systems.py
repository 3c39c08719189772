"""A URL whose package is missing says which one."""

import sys

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.store import Store


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("az", "adlfs")])
def test_a_package_that_is_not_installed_is_named(scheme, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        Store(f"{scheme}://bucket/x").names()
    assert str(caught.value) == f"{scheme}:// needs another package: pip install {package}"
