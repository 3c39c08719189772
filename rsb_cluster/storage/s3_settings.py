"""How S3 is reached, by the user's environment and profile: one answer for all clients.

Amazon's own variables and keys are read by botocore. Read here is what both clients must know alike, and two variables
of ours for what a URL cannot say; docs/data.md lists all of them.
"""

from __future__ import annotations

import fnmatch
import os
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# Buckets, separated by commas, with * and ?: without a signature; and the owner of the credentials pays for requests.
ANONYMOUS = "RSB_S3_ANONYMOUS"
REQUESTER_PAYS = "RSB_S3_REQUESTER_PAYS"

_PREFIXES = ("AWS_", "RSB_S3_")
_CHECKSUMS = ("request_checksum_calculation", "response_checksum_validation")

Environment = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class S3Settings:
    """How the requests for a bucket are made.

    Attributes:
        environment: The variables that decide it, so that clients of two environments differ.
        endpoint: URL of the server; None: Amazon's own.
        region: Region of the server; None: botocore's default.
        is_anonymous: Whether requests are not signed.
        lacks_credentials: Whether they are not signed because there are no credentials.
        requester_pays: Whether the owner of the credentials accepts to pay.
        checksums: Checksum options that the user has not chosen and the server needs.
    """

    environment: Environment = field(repr=False)  # with secrets in it
    endpoint: str | None
    region: str | None
    is_anonymous: bool
    lacks_credentials: bool
    requester_pays: bool
    checksums: tuple[tuple[str, str], ...]

    def config(self) -> dict[str, Any]:
        """Return the options of botocore's ``Config`` that follow from the settings."""
        return dict(self.checksums)

    def request(self) -> dict[str, str]:
        """Return the arguments that each request for an object takes."""
        return {"RequestPayer": "requester"} if self.requester_pays else {}


def s3_settings(bucket: str) -> S3Settings:
    """Return the settings for a bucket. Raises BotoCoreError if the profile or its file is wrong."""
    return _settings(environment(), bucket)


def environment() -> Environment:
    """Return the variables that decide how S3 is reached."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith(_PREFIXES)))


def endpoint_url() -> str | None:
    """Return the S3 endpoint of the environment or the profile; None for Amazon's own."""
    return _settings(environment(), "").endpoint


def forget_credentials() -> None:
    """Look for credentials again: those of a machine's role are missing where its metadata service hiccups."""
    _settings.cache_clear()


@cache
def _settings(variables: Environment, bucket: str) -> S3Settings:
    import botocore.session
    from botocore.config import Config

    session = botocore.session.Session()
    profile = session.get_scoped_config()
    endpoint = _endpoint(profile, session.full_config)
    is_wanted = bool(bucket) and _names(ANONYMOUS, bucket)
    lacks_credentials = bool(bucket) and not is_wanted and session.get_credentials() is None
    checksums = []
    if endpoint is not None:
        # botocore's default sends a checksum as the trailer of a body in chunks, over https only. Google, Backblaze,
        # Storj, and older versions of MinIO and Ceph refuse that.
        known = [option for option in _CHECKSUMS if hasattr(Config(), option)]  # botocore 1.36 introduced it
        chosen = [option for option in known if os.environ.get(f"AWS_{option.upper()}") or profile.get(option)]
        checksums = [(option, "when_required") for option in known if option not in chosen]
    return S3Settings(
        environment=variables,
        endpoint=endpoint,
        region=os.environ.get("AWS_REGION") or session.get_config_variable("region"),
        is_anonymous=is_wanted or lacks_credentials,
        lacks_credentials=lacks_credentials,
        requester_pays=bool(bucket) and _names(REQUESTER_PAYS, bucket),
        checksums=tuple(checksums),
    )


def _endpoint(profile: dict[str, Any], config: dict[str, Any]) -> str | None:
    """Return the endpoint by the rules of AWS's SDKs, which botocore has no public function for."""
    ignored = os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS") or profile.get("ignore_configured_endpoint_urls")
    if ignored == "true":
        return None
    services = config.get("services", {}).get(profile.get("services", ""), {})
    found: list[str | None] = [
        os.environ.get("AWS_ENDPOINT_URL_S3"),
        os.environ.get("AWS_ENDPOINT_URL"),
        services.get("s3", {}).get("endpoint_url"),
        profile.get("endpoint_url"),
    ]
    return next(filter(None, found), None)


def _names(variable: str, bucket: str) -> bool:
    patterns = os.environ.get(variable, "").replace(",", " ").split()
    return any(fnmatch.fnmatchcase(bucket, pattern) for pattern in patterns)
