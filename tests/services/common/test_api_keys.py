from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from pydantic import ValidationError

from services.common.api_keys import ApiKey, Limits, digest, new_id, new_key, visible_part

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def key(secret: str, **fields: object) -> ApiKey:
    return ApiKey.model_validate({"id": "hr-0123456789ab", "name": "n", "sha256": digest(secret), **fields})


def test_a_key_matches_itself_alone() -> None:
    key_id = new_id()
    secret, other = new_key(key_id), new_key(key_id)
    assert visible_part(secret) == visible_part(other) == key_id
    assert key(secret).matches(secret)
    assert not key(secret).matches(other)
    assert secret not in key(secret).model_dump_json()


@pytest.mark.parametrize("credential", ["", "none", "sk-abc", "hr-0123456789ab", "hr-0123456789ab-short", "é" * 60])
def test_what_no_key_looks_like(credential: str) -> None:
    assert visible_part(credential) is None


def test_a_key_works_until_it_expires_or_is_revoked() -> None:
    assert key("s").problem(NOW) is None
    assert key("s", expires=NOW + timedelta(seconds=1)).problem(NOW) is None
    assert key("s", expires=NOW).problem(NOW) == "has expired"
    assert key("s", revoked=NOW).problem(NOW) == "was revoked"


def test_limits_in_whole_numbers() -> None:
    limits = Limits(tokens_per_day=5, money_per_month=Decimal("0.000001"))
    assert limits.amounts() == {"tokens_per_day": 5, "money_per_month": 1}
    assert limits.counts_tokens
    assert not Limits(requests_per_minute=1, concurrent=1).counts_tokens


@pytest.mark.parametrize(
    "fields", [{"concurrent": 0}, {"money_per_month": "0.0000001"}, {"money_per_month": "1e30"}, {"cache_salt": "a\0"}]
)
def test_what_is_no_limit_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        key("s", **fields)
