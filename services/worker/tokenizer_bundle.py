"""The files a gateway needs to render prompts and tokenize.

The bundle holds tokenizer.json as it is, tokenizer_config.json if there is one, and headrace_tokenizer.json, which
says in one shape what Hugging Face folders spread over many files, so that `tokenizers` and `jinja2` suffice:

    chat_template     string | null   Jinja source
    bos_token         string | null   for the template
    eos_token         string | null   for the template
    eos_token_ids     list of int     tokens that end an answer
    add_bos           bool            whether a plain prompt gets the BOS token in front, as transformers would do
    vocabulary_size   int             token ids lie below it (the width of the logits)
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from services.worker.engine.model.checkpoint import read_config

FACTS_FILE = "headrace_tokenizer.json"
Json = dict[str, Any]


def tokenizer_bundle(folder: Path) -> dict[str, bytes]:
    """The bundle of the model in `folder` (as `model_store.resolve` returns it): file name -> content."""
    names = ("tokenizer.json", "tokenizer_config.json")
    bundle = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    bundle[FACTS_FILE] = json.dumps(_facts(folder), indent=2, sort_keys=True).encode()
    return bundle


def _facts(folder: Path) -> Json:
    config = read_config(folder)
    settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos_token, eos_token = _token_text(settings.get("bos_token")), _token_text(settings.get("eos_token"))
    return {
        "chat_template": _chat_template(folder, settings),
        "bos_token": bos_token,
        "eos_token": eos_token,
        "eos_token_ids": _eos_token_ids(folder, config, tokenizer, eos_token),
        "add_bos": _adds_bos(tokenizer, settings, bos_token),
        "vocabulary_size": config.get("vocab_size") or config.get("text_config", {})["vocab_size"],
    }


def _chat_template(folder: Path, settings: Json) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _eos_token_ids(folder: Path, config: Json, tokenizer: Tokenizer, eos_token: str | None) -> list[int]:
    """Those that transformers' generate stops at, and the tokenizer's own."""
    source = _read_json(folder / "generation_config.json") or config.get("text_config") or config
    listed = source.get("eos_token_id")
    candidates = listed if isinstance(listed, list) else [listed]
    if eos_token is not None:
        candidates = [*candidates, tokenizer.token_to_id(eos_token)]
    return sorted({token for token in candidates if token is not None})


def _adds_bos(tokenizer: Tokenizer, settings: Json, bos_token: str | None) -> bool:
    if bos_token is None:
        return False
    explicit = settings.get("add_bos_token")
    if isinstance(explicit, bool):
        return explicit
    return tokenizer.encode("a").ids[:1] == [tokenizer.token_to_id(bos_token)]


def _token_text(token: str | Json | None) -> str | None:
    """A special token is written as its text or as an object that has it as `content`."""
    return token["content"] if isinstance(token, dict) else token


def _read_json(path: Path) -> Json:
    return json.loads(path.read_text()) if path.is_file() else {}
