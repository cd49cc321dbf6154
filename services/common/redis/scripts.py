"""The Lua scripts, each in a file of its own under `lua/` that opens with its keys and arguments."""

from dataclasses import dataclass
from hashlib import sha1
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Script:
    """A script's text and the SHA-1 that Redis knows it by."""

    text: str
    sha: str

    @classmethod
    def of(cls, text: str) -> "Script":
        return cls(text, sha1(text.encode(), usedforsecurity=False).hexdigest())


def _load(*names: str) -> Script:
    """The script of that name, after what it shares with others."""
    folder = files(__package__).joinpath("lua")
    return Script.of("\n".join(folder.joinpath(f"{name}.lua").read_text(encoding="utf-8") for name in names))


POP = _load("pop")
CLAIM = _load("claim")
ACKNOWLEDGE = _load("acknowledge")
RELEASE = _load("release")
EXPIRED = _load("expired")
TAKE = _load("take")
CLOSE = _load("close")
DEPTHS = _load("depths")
MISSING = _load("missing")
TIDY = _load("tidy")
ANSWER_OPEN = _load("answer_open")
ANSWER_APPEND = _load("answer_append")
ANSWER_ADOPT = _load("answer_adopt")
ANSWER_CANCEL = _load("answer_cancel")
ANSWER_DISCARD = _load("answer_discard")
RESERVE = _load("meters", "reserve")
CHARGE = _load("meters", "charge")
COSTS_ADD = _load("costs_add")
KEY_REPLACE = _load("key_replace")
