"""Removes credentials from text that is shown or stored."""

from __future__ import annotations

import re

# As a URL's query, as a header, as a setting.
_SECRET = re.compile(
    r"""(?ix) ( (?: X-Amz-[\w-]+ | AWSAccessKeyId | Signature | Credential
                 | aws_secret_access_key | aws_session_token ) ['"]? \s* [=:] \s* ['"]? ) [^&\s'",]+"""
)


def redact(text: str) -> str:
    """Replace signatures, keys, tokens and passwords in a text by ``***``."""
    text = re.sub(r"(?i)(://)[^/\s:@]+:[^/\s@]+@", r"\1***@", text)
    return _SECRET.sub(r"\1***", text)
