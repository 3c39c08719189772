"""The options of a submit."""

from __future__ import annotations

import pytest

from rsb_cluster.errors import ConfigError
from rsb_cluster.submission.request import check_seeds


def test_a_seed_that_would_share_draws_with_a_small_one_is_refused():
    for seeds in ((2**32,), (0, 2**70)):
        with pytest.raises(ConfigError, match="is too large: seeds of 4294967296 and more share draws with small ones"):
            check_seeds(seeds)
    assert check_seeds((0, 2**32 - 1)) == (0, 2**32 - 1)
