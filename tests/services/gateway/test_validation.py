import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidRequest
from services.gateway import validation
from services.gateway.catalog import Model
from services.gateway.errors import ContextLengthExceeded
from services.gateway.text.tokenization import ModelTokenizer
from tests.services.gateway.tokenizers_for_tests import bundle

MODEL = Model("m", 100, 50, 4, ModelTokenizer(bundle()), 0, "fp")


@given(st.sampled_from(sorted(validation.RANGES)), st.floats() | st.integers())
def test_a_number_is_taken_or_refused_by_name(field: str, value: float) -> None:
    limits = validation.RANGES[field]
    fits = not math.isnan(value) and not math.isinf(value) and limits.low <= value <= limits.high
    fits = fits and (limits.low_included or value > limits.low)
    if fits:
        validation.check_ranges({field: value})
    else:
        with pytest.raises(InvalidRequest) as raised:
            validation.check_ranges({field: value})
        assert raised.value.field == field


def test_what_is_not_given_is_not_checked() -> None:
    validation.check_ranges(dict.fromkeys(validation.RANGES))


@pytest.mark.parametrize(("field", "text"), [("temperature", "between 0 and 2"), ("top_p", "above 0 and at most 1")])
def test_messages_name_the_limits(field: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text):
        validation.check_ranges({field: 7.5})


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("seed", 10**23 - 1, "seed must be at most 18446744073709551615, but is 99999999999999999999999."),
        ("seed", -(10**23), "seed must be at least -9223372036854775808, but is -100000000000000000000000."),
        ("top_k", 10**14, "top_k must be at most 2147483647, but is 100000000000000."),
        ("top_k", -2, "top_k must be at least -1, but is -2."),
        ("repetition_penalty", math.inf, "repetition_penalty must be at most 2147483647, but is inf."),
        ("repetition_penalty", 0.0, "repetition_penalty must be above 0, but is 0.0."),
        ("max_tokens", -(10**400), "max_tokens must be at least 1, but is a number of more than 30 digits."),
    ],
)
def test_messages_name_the_limit_that_was_passed_in_whole_digits(field: str, value: float, text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        validation.check_ranges({field: value})
    assert raised.value.message == text


@given(st.integers(1, 120), st.none() | st.integers(1, 120), st.none() | st.just(16))
def test_a_budget_always_fits_the_context(prompt: int, asked: int | None, default: int | None) -> None:
    try:
        budget = validation.token_budget(
            MODEL, prompt, asked, default, prompt_field="prompt", max_tokens_field="max_tokens"
        )
    except ContextLengthExceeded:
        assert prompt + (asked or 1) > 100
    else:
        assert 1 <= budget <= 100 - prompt
        assert asked is None or budget == asked


def test_a_long_value_is_cut_in_messages() -> None:
    assert len(validation.shorten("x" * 1000)) < 120
    assert validation.shorten(10**5000) == "a number of more than 30 digits"
