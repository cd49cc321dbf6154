"""Stop strings on a text that comes in pieces. Pure: knows neither tokens nor requests.

The match is the one that is complete first in the joined text (of those that end together, the one that begins first),
so it does not depend on how the text was cut into pieces. Text that may still become part of a match is held back.
"""

from collections.abc import Sequence


class StopMatcher:
    """Watches one choice's text for stop strings.

    `push` returns the text that can be delivered; once `matched` is set, that is all there is, cut before the match.
    """

    __slots__ = ("_held", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Text that no stop string can claim any more, given `text` after all that came before."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.matched = True
            self._held = ""
            _end, start = min(found)
            return text[:start]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stops):
                return length
        return 0
