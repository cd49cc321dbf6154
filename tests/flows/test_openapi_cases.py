"""A short run of the generated requests; `make fuzz` is the long one."""

from pathlib import Path

import pytest

from tests.flows.headrace_up import HeadraceUp
from tests.flows.openapi_cases import cases_in, run_cases


@pytest.mark.timeout(300)
def test_no_generated_request_gets_what_the_document_does_not_say(tmp_path: Path, default_model: Path) -> None:
    up = HeadraceUp(tmp_path, "--engine", "echo")
    try:
        up.wait_ready()
        good, report = run_cases(up.http_url, max_examples=15, seed=1, timeout_s=240)
    finally:
        up.kill()
    assert good, report
    assert cases_in(report) > 100
