"""Guesses how a sequence goes on, so that one step can compute several of its tokens.

A step of a few rows takes hardly longer than one of a single row, since it reads the same weights. So a decode's spare
rows compute the tokens that probably follow (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative
Decoding"), and the engine keeps them as far as it would have drawn just these. Guesses come from the sequence itself:
where its last tokens stood before, it goes on as it did there (Saxena 2023, "Prompt Lookup Decoding"). Knows no model.
"""

from collections.abc import Sequence as Tokens

_LONGEST_MATCH = 3  # tokens; a longer match is the better draft, and longer ones than this are found by it, too
_MOST_INDEXED = 1024  # positions, for one draft: about a millisecond; a long prompt takes some steps
_FIRST_LENGTH = 2  # of a draft, until it is known how good drafts are


class PromptLookup:
    """Guesses for one sequence, whose tokens only grow."""

    def __init__(self, most: int) -> None:
        """`most`: the longest draft, in tokens."""
        self._most = most
        self._length = min(_FIRST_LENGTH, most)
        self._indexed = 1  # positions before this one are in `_after`
        self._after: dict[tuple[int, ...], int] = {}  # what came last after such tokens: its position

    def draft(self, tokens: Tokens[int], room: int) -> list[int]:
        """At most `room` tokens that may follow; none if the last token is new."""
        self._index(tokens)
        length = min(self._length, room)
        for match in range(min(_LONGEST_MATCH, len(tokens)), 0, -1):
            start = self._after.get(tuple(tokens[-match:]))
            if start is not None:
                period = len(tokens) - start  # beyond which it would repeat what it has just guessed
                return [tokens[start + index % period] for index in range(length)]
        return []

    def learn(self, drafted: int, right: int) -> None:
        """How many tokens were guessed, and how many of them, from the first, were right."""
        if right == drafted:
            self._length = min(2 * self._length, self._most)
        elif right:
            self._length = right + 1
        else:
            self._length = max(self._length // 2, 1)

    def _index(self, tokens: Tokens[int]) -> None:
        end = min(len(tokens), self._indexed + _MOST_INDEXED)
        for position in range(self._indexed, end):
            for match in range(1, min(_LONGEST_MATCH, position) + 1):
                self._after[tuple(tokens[position - match : position])] = position
        self._indexed = max(end, 1)
