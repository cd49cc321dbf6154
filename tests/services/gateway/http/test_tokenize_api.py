from tests.services.gateway.fakes import CONTEXT, MODEL, unpack
from tests.services.gateway.stack import TEXT, Stack
from tests.services.gateway.tokenizers_for_tests import byte_level_tokenizer

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi 🦊"}]}]


async def test_a_prompt_there_and_back(stack: Stack) -> None:
    told = (await stack.http.post("/tokenize", json={"model": MODEL, "prompt": TEXT})).json()
    assert told == {
        "count": len(told["tokens"]),
        "max_model_len": CONTEXT,
        "tokens": byte_level_tokenizer().encode(TEXT).ids,
        "token_strs": None,
    }
    back = await stack.http.post("/detokenize", json={"model": MODEL, "tokens": told["tokens"]})
    assert back.json() == {"prompt": TEXT}
    empty = (await stack.http.post("/tokenize", json={"model": MODEL, "prompt": ""})).json()
    assert (empty["count"], empty["tokens"]) == (0, [])


async def test_messages_are_those_of_the_chat(stack: Stack) -> None:
    body = {"model": MODEL, "messages": MESSAGES}
    told = (await stack.http.post("/tokenize", json={**body, "return_token_strs": True})).json()
    assert (await stack.http.post("/v1/chat/completions", json=body)).status_code == 200
    assert told["tokens"] == unpack(stack.workers[0].starts[0].prompt_ids)
    assert told["token_strs"][0] == "<|im_start|>" and r"\xf0" in told["token_strs"]
    text = (await stack.http.post("/detokenize", json={"model": MODEL, "tokens": told["tokens"]})).json()["prompt"]
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi 🦊")


async def test_bad_bodies(stack: Stack) -> None:
    bad: list[tuple[str, dict[str, object], str]] = [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": [1]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ("/tokenize", {"messages": MESSAGES, "tools": [{}]}, "tools"),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ]
    for path, fields, param in bad:
        response = await stack.http.post(path, json={"model": MODEL, **fields})
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), (fields, response.text)
    assert (await stack.http.post("/tokenize", json={"model": "gpt-9", "prompt": "x"})).status_code == 404
    assert (await stack.http.get("/tokenize")).status_code == 405
    huge = await stack.http.post("/tokenize", content=b"x" * 5_000_000)
    assert huge.status_code == 413
