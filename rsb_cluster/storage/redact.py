"""Keeping credentials out of what is shown or stored."""

from __future__ import annotations

import re

# As a URL's query, as a header, as a setting.
_SECRET = re.compile(
    r"""(?ix) ( (?: X-Amz-[\w-]+ | AWSAccessKeyId | Signature | Credential
                 | aws_secret_access_key | aws_session_token ) ['"]? \s* [=:] \s* ['"]? ) [^&\s'",]+"""
)


def redact(text: str) -> str:
    """Take signatures, keys, tokens and passwords out of a text that will be shown or stored."""
    text = re.sub(r"(?i)(://)[^/\s:@]+:[^/\s@]+@", r"\1***@", text)
    return _SECRET.sub(r"\1***", text)
