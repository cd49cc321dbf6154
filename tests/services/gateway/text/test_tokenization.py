import json

import pytest

from services.common.errors import InvalidRequest
from services.gateway.text.tokenization import ModelTokenizer
from tests.services.gateway.tokenizers_for_tests import bundle, byte_level_tokenizer

USER = [{"role": "user", "content": "hi"}]


async def rendered(template: str, messages: list[dict[str, str]] = USER, **description: object) -> str:
    tokenizer = ModelTokenizer(bundle(chat_template=template, **description))
    return byte_level_tokenizer().decode(await tokenizer.encode_chat(messages), skip_special_tokens=False)


async def test_text_becomes_ids() -> None:
    assert await ModelTokenizer(bundle()).encode_text("hello") == byte_level_tokenizer().encode("hello").ids


async def test_long_text_becomes_the_same_ids() -> None:
    text = "the quick brown fox 🦊 " * 1000
    assert await ModelTokenizer(bundle()).encode_text(text) == byte_level_tokenizer().encode(text).ids


async def test_a_bos_token_is_put_in_front_only_of_plain_text() -> None:
    tokenizer = ModelTokenizer(bundle(bos_token="<|im_start|>", add_bos=True))
    bos = byte_level_tokenizer().token_to_id("<|im_start|>")
    assert (await tokenizer.encode_text("hello"))[0] == bos
    assert (await tokenizer.encode_text("<|im_start|>hello")).count(bos) == 1
    assert (await tokenizer.encode_chat(USER)).count(bos) == 2  # those that the template writes


async def test_templates_have_what_transformers_gives_them() -> None:
    assert await rendered("{{ bos_token }}{{ eos_token }}", eos_token="<|im_end|>") == "<|im_end|>"
    assert await rendered("{{ messages | tojson }}") == json.dumps(USER)
    assert await rendered("{{ messages | tojson(indent=2) }}") == json.dumps(USER, indent=2)
    assert await rendered("  {% if true %}\nyes\n  {% endif %}\n") == "yes\n"
    assert await rendered("{% for m in messages %}{% break %}{% endfor %}done") == "done"
    assert await rendered("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hi"
    assert len(await rendered("{{ strftime_now('%Y') }}")) == 4
    assert await rendered("{% if tools is none and add_generation_prompt %}go{% endif %}") == "go"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('not like that') }}", "{{ nothing.at.all }}", "{{ 1 / 0 }}", "{{ messages[7].role }}"],
)
async def test_messages_that_a_template_does_not_take_are_the_callers_mistake(template: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        await rendered(template)
    assert raised.value.field == "messages"


async def test_templates_cannot_reach_out() -> None:
    with pytest.raises(InvalidRequest):
        await rendered("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequest):
        await rendered("{{ messages.append(1) }}")


async def test_a_model_without_a_template_takes_no_chats() -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        await ModelTokenizer(bundle(chat_template=None)).encode_chat(USER)


def test_a_bundle_that_cannot_be_read_says_why() -> None:
    files = bundle()
    del files["tokenizer.json"]
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        ModelTokenizer(files)
    with pytest.raises(ValueError, match="does not compile"):
        ModelTokenizer(bundle(chat_template="{% for %}"))
