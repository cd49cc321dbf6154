import logging

import msgspec
import pytest

from services.common.errors import InvalidRequest
from services.gateway.http.json_bodies import parse
from services.gateway.http.openai_types import ChatBody

DECODER = msgspec.json.Decoder(ChatBody)
BODY = b'{"model":"m","messages":[],"store":true,"metadata":{"a":1},"user":"me"}'


def test_fields_that_nobody_reads_are_listed_when_debugging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "services.gateway.http.json_bodies"):
        assert parse(BODY, DECODER).user == "me"
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["['metadata', 'store']"]


def test_nothing_is_listed_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "services.gateway.http.json_bodies"):
        parse(BODY, DECODER)
    assert not caplog.records


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"messages":[]}', "model"),
        (b'{"model":"m","messages":[{"role":5}]}', "messages[0].role"),
        (b'{"model":"m","messages":[],"logit_bias":{"a":1}}', "logit_bias"),
        (b'{"model":"m","messages":[],"logit_bias":{"1":"x"}}', "logit_bias"),
        (b"[]", None),
    ],
)
def test_mistakes_name_the_field(body: bytes, field: str | None) -> None:
    with pytest.raises(InvalidRequest) as raised:
        parse(body, DECODER)
    assert raised.value.field == field
