"""Opens fsspec's file system of a URL: one client a process, with the settings that hold for all requests to S3."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from rsb_cluster.errors import ConfigError
from rsb_cluster.storage.data_urls import client_options
from rsb_cluster.storage.location import PACKAGES, bucket_of, is_s3, scheme_of
from rsb_cluster.storage.s3 import require_answer
from rsb_cluster.storage.s3_settings import S3Settings, s3_settings

# Timeouts and retries of the S3 client: a request that hangs must not block a job forever.
S3_CLIENT = {"retries": {"max_attempts": 5, "mode": "standard"}, "connect_timeout": 10, "read_timeout": 60}


def file_system(url: str) -> Any:
    """Return the fsspec file system of a normalised URL. Raises ConfigError if a package for it is missing."""
    settings = s3_settings(bucket_of(url)) if is_s3(url) else None
    if settings is not None:
        require_answer(bucket_of(url))
    return open_file_system(scheme_of(url), settings, os.getpid())


@cache
def open_file_system(scheme: str, settings: S3Settings | None, pid: int) -> Any:
    """Return the fsspec file system of a scheme and process: connections do not survive a fork."""
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if settings is not None:
        # All are given, so that fsspec's own variables (FSSPEC_S3_...) do not decide for one of the two clients.
        options |= {
            "endpoint_url": settings.endpoint,
            "anon": settings.is_anonymous,
            "requester_pays": settings.requester_pays,
            "client_kwargs": {"region_name": settings.region},
            "config_kwargs": S3_CLIENT | settings.config(),
        } | dict.fromkeys(("key", "secret", "token"))
    try:
        return fsspec.filesystem(scheme, **options, **client_options(scheme))
    except ImportError as error:
        raise ConfigError(f"{scheme}:// needs another package: pip install {PACKAGES.get(scheme, 's3fs')}") from error
