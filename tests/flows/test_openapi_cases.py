"""A short run of the generated requests; `make fuzz` is the long one."""

from pathlib import Path

import pytest

from tests.flows.openapi_cases import priced_stack, run_cases

# That keys, limits, headers and other methods are met at all.
SEEN_STATUSES = {
    "POST /v1/completions": {"200", "400", "401", "403", "405", "422", "429"},
    "POST /v1/chat/completions": {"200", "400", "401", "403", "405", "422", "429"},
    "POST /tokenize": {"200", "400", "401", "403", "405"},
    "GET /v1/models/{name}": {"200", "401", "403", "404", "405"},
    "GET /v1/answers/{answer_id}": {"200", "401", "403", "404", "405"},
    "GET /": {"200", "304", "405"},
}


@pytest.mark.timeout(300)
def test_no_generated_request_gets_what_the_document_does_not_say(tmp_path: Path, default_model: Path) -> None:
    with priced_stack(tmp_path) as stack:
        outcome = run_cases(stack, max_examples=15, seed=1, timeout_s=240)
    assert outcome.good, outcome.report
    assert outcome.cases > 100
    for operation, wanted in SEEN_STATUSES.items():
        assert outcome.statuses[operation].keys() >= wanted, outcome.statuses
