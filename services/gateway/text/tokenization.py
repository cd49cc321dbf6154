"""A model's tokenizer and chat template, made from the bundle that a worker hands out. No torch, no transformers."""

import asyncio
import datetime
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec
from tokenizers import Tokenizer

from services.common.errors import InvalidRequest
from services.gateway.text.detokenizer import Detokenizer, DetokenizerFactory
from services.gateway.text.prompt_encoder import prompt_encoder
from services.gateway.text.token_spelling import TokenSpelling

TOKENIZER_FILE = "tokenizer.json"
DESCRIPTION_FILE = "headrace_tokenizer.json"

# Texts at least this long are encoded in a thread: 4,000 characters take 0.2 ms (1.5 without fastokens), the hop 0.05.
_THREAD_CHARACTERS = 4_000
# Few: fastokens remembers the latest 50,000 words in each (10 to 30 MiB), and one encodes 20 MB of text in a second.
_threads = ThreadPoolExecutor(2, thread_name_prefix="encode")


class BundleDescription(msgspec.Struct, frozen=True):
    """What tokenizer.json does not say: `headrace_tokenizer.json` of the bundle."""

    chat_template: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    add_bos: bool = False
    vocabulary_size: int = 0


class ModelTokenizer:
    """Encodes prompts, renders chats and makes detokenizers for one model."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """From the bundle's files. Raises ValueError when one is missing or cannot be read."""
        try:
            self._tokenizer = Tokenizer.from_buffer(files[TOKENIZER_FILE])
            description = msgspec.json.decode(files[DESCRIPTION_FILE], type=BundleDescription)
        except KeyError as error:
            raise ValueError(f"the tokenizer bundle lacks {error}") from error
        self._description = description
        self._encoder = prompt_encoder(self._tokenizer)
        self._bos_id = self._tokenizer.token_to_id(description.bos_token) if description.bos_token else None
        self._template = ChatTemplate(description) if description.chat_template else None
        self._detokenizers = DetokenizerFactory(self._tokenizer)
        self.spelling = TokenSpelling(self._tokenizer, self._detokenizers.token_bytes)

    async def encode_text(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Token ids of a plain prompt, with a BOS token in front if the model wants one and `add_bos` allows it."""
        if not add_bos or not self._description.add_bos or self._bos_id is None:
            return await self._encode(text, add_special_tokens=False)
        ids = await self._encode(text, add_special_tokens=True)
        return ids if ids[:1] == [self._bos_id] else [self._bos_id, *ids]  # not every tokenizer adds the BOS it wants

    async def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of chat messages under the chat template, which writes all special tokens itself."""
        if self._template is None:
            raise InvalidRequest("This model has no chat template; use plain completions.", field="messages")
        return await self._encode(self._template.render(messages), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a prompt's ids, special tokens included."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    def detokenizer(self) -> Detokenizer:
        return self._detokenizers.create()

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) < _THREAD_CHARACTERS:
            return self._encoder(text, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(_threads, self._encoder, text, add_special_tokens)


class ChatTemplate:
    """A chat template, rendered in a sandbox with the names that templates written for transformers use."""

    def __init__(self, description: BundleDescription) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(description.chat_template or "")
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not compile: {error}") from error
        self._template.globals = dict(self._template.globals)  # each rendering copies them: from a chain takes longer
        self._special = {"bos_token": description.bos_token or "", "eos_token": description.eos_token or ""}

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt text up to where the assistant's answer begins. Raises InvalidRequest."""
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InvalidRequest(
                f"The model's chat template does not take these messages: {error}", field="messages"
            ) from error


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it prints its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
