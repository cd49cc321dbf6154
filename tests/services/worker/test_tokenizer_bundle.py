import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from tokenizers import Tokenizer, models, processors

from services.common.tokenizer_hash import bundle_hash
from services.worker.engine.batcher import Batch, Slice
from services.worker.engine.model.loading import load_model
from services.worker.engine.model_runner import build_model_runner
from services.worker.engine.sequence import SamplingParams, Sequence, StopParams
from services.worker.tokenizer_bundle import FACTS_FILE, tokenizer_bundle


def write_folder(folder: Path, **files: dict[str, Any]) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "<|im_end|>": 3}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in ({"config": {"vocab_size": 8, "eos_token_id": 1}} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def facts(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(tokenizer_bundle(folder)[FACTS_FILE])
    return loaded


def test_a_bare_tokenizer_has_no_template_and_no_named_tokens(tmp_path: Path) -> None:
    assert facts(write_folder(tmp_path)) == {
        "add_bos": False,
        "bos_token": None,
        "chat_template": None,
        "eos_token": None,
        "eos_token_ids": [1],
        "vocabulary_size": 8,
    }


def test_answers_end_at_the_generation_configs_tokens_and_the_tokenizers_own(tmp_path: Path) -> None:
    settings = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>", "chat_template": "{{ bos_token }}"}
    folder = write_folder(tmp_path, tokenizer_config=settings, generation_config={"eos_token_id": [5, 6]})
    found = facts(folder)
    assert found["eos_token_ids"] == [3, 5, 6]
    assert (found["bos_token"], found["eos_token"]) == ("<s>", "<|im_end|>")
    assert found["chat_template"] == "{{ bos_token }}"


def test_a_template_file_wins_and_default_is_picked_among_several(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    folder = write_folder(tmp_path, tokenizer_config={"chat_template": named})
    assert facts(folder)["chat_template"] == "d"
    (folder / "chat_template.jinja").write_text("from a file")
    assert facts(folder)["chat_template"] == "from a file"


@pytest.mark.parametrize("explicit", [None, True, False])
def test_bos_is_added_as_told_or_else_as_the_tokenizer_does(tmp_path: Path, explicit: bool | None) -> None:
    settings: dict[str, Any] = {"bos_token": "<s>"} | ({} if explicit is None else {"add_bos_token": explicit})
    folder = write_folder(tmp_path, tokenizer_config=settings)
    assert facts(folder)["add_bos"] is bool(explicit)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert facts(folder)["add_bos"] is (explicit is not False)


def test_the_hash_knows_content_but_not_order() -> None:
    assert bundle_hash({"a": b"1", "b": b"2"}) == bundle_hash({"b": b"2", "a": b"1"})
    different = [{"a": b"1", "b": b"2"}, {"a": b"1", "b": b"3"}, {"ab": b"12"}, {"a": b"1b2"}, {"a": b"1"}]
    assert len({bundle_hash(bundle) for bundle in different}) == len(different)


def test_with_the_bundle_alone_the_default_model_is_asked_for_the_capital_of_france(default_model: Path) -> None:
    bundle = tokenizer_bundle(default_model)
    found = json.loads(bundle[FACTS_FILE])
    tokenizer = Tokenizer.from_str(bundle["tokenizer.json"].decode())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = jinja2.Template(found["chat_template"]).render(messages=question, add_generation_prompt=True)
    prompt = tokenizer.encode(text, add_special_tokens=False).ids
    runner = build_model_runner(load_model(default_model), kv_blocks=8, max_model_len=128)
    stop = StopParams(max_tokens=20, stop_token_ids=frozenset(found["eos_token_ids"]))
    sequence = Sequence("question", list(prompt), len(prompt), SamplingParams(temperature=0.0), stop)
    sequence.blocks = list(range(8))
    piece = Slice(sequence, 0, len(prompt))
    while sequence.finish is None:
        sequence.append(int(torch.argmax(runner.forward(Batch((piece,)))[0])))
        piece = Slice(sequence, len(sequence.tokens) - 1, 1)
    assert tokenizer.decode(sequence.tokens[len(prompt) :]) == "The capital of France is Paris."
