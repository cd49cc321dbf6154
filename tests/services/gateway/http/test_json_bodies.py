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


NESTED = b"""{"model": "m", "zed": 1, "stream_options": {"include_usage": true, "bar": {"deeper": 1}}, "messages": [
    {"role": "system", "content": "x", "foo": 1},
    {"role": "user", "foo": 2, "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "z", "cache": {}}]}
]}"""


def test_nested_fields_are_listed_once_each_by_where_they_stand(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "services.gateway.http.json_bodies"):
        parse(NESTED, DECODER)
    wanted = "['messages[0].foo', 'messages[1].content[1].cache', 'stream_options.bar', 'zed']"
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [wanted]


@pytest.mark.parametrize("value", [b"1e999", b'"\xff"'])
def test_what_nobody_reads_may_be_unreadable_when_debugging(value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "services.gateway.http.json_bodies"):
        assert parse(b'{"model":"m","messages":[],"store":' + value + b"}", DECODER).model == "m"
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("body", [b"", b" \n"])
def test_an_empty_body_is_called_so(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"^The body is empty\.$"):
        parse(body, DECODER)


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
