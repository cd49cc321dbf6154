"""The line with which a person asks a fresh stack something."""

from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from services.common.tls import FrontCert
from toolkit.stack import StackOptions, plan_stack
from toolkit.up import welcome

OPTIONS = StackOptions(host="127.0.0.1", http_ports=(8000,), grpc_ports=(50051,))


@pytest.mark.parametrize(
    ("cert", "line"),
    [
        (None, "curl -N http://127.0.0.1:8000/v1/chat/completions"),
        (FrontCert("/c/a b.crt", "127.0.0.1"), "curl -N --cacert '/c/a b.crt' https://127.0.0.1:8000/v1/"),
        (
            FrontCert("/c/front.crt", "llm.example.com"),
            "curl -N --cacert /c/front.crt --connect-to ::127.0.0.1:8000 https://llm.example.com:8000/v1/",
        ),
    ],
)
def test_curl_trusts_the_certificate_and_uses_a_name_of_it(cert: FrontCert | None, line: str) -> None:
    stack = plan_stack(replace(OPTIONS, front_cert=cert), count(20_000), cores=2)
    assert line in welcome(stack, "m", 5.61, Path("/logs"))
