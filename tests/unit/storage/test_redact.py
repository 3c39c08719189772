"""Credentials are taken out of messages."""

from rsb_cluster.storage.redact import redact


def test_signatures_are_taken_out_of_messages():
    url = (
        "GET https://h/k?X-Amz-Credential=AKIA%2F1&X-Amz-Signature=abc123&partNumber=1 AWSAccessKeyId=A2 Signature=q/="
    )
    assert redact(url) == (
        "GET https://h/k?X-Amz-Credential=***&X-Amz-Signature=***&partNumber=1 AWSAccessKeyId=*** Signature=***"
    )
    for text, hidden in {
        "x-amz-security-token: FwoG/+=": "x-amz-security-token: ***",
        "aws_session_token = 'FwoG'": "aws_session_token = '***'",
        "{'aws_secret_access_key': 'wJalr'}": "{'aws_secret_access_key': '***'}",
        "AWS4-HMAC-SHA256 Credential=AKIA/2026, Signed=h": "AWS4-HMAC-SHA256 Credential=***, Signed=h",
        "proxy http://user:secret@proxy:3128/": "proxy http://***@proxy:3128/",
    }.items():
        assert redact(text) == hidden
    for text in ("nothing to hide", "a signature of 3 files", "s3://bucket/key", "10:30@noon"):
        assert redact(text) == text
