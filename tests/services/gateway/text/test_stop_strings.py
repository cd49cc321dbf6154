from hypothesis import given
from hypothesis import strategies as st

from services.gateway.text.stop_strings import StopMatcher

stops_strategy = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """What is delivered after each piece, and whether there was a match."""
    matcher = StopMatcher(stops)
    delivered = []
    for piece in pieces:
        delivered.append(matcher.push(piece))
        if matcher.matched:
            return delivered, True
    return [*delivered, matcher.flush()], False


def expected(stops: list[str], text: str) -> str:
    """The definition: up to the match that is complete first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(stops_strategy, st.lists(st.text("abc", max_size=4), max_size=12))
def test_any_split_gives_what_the_definition_says(stops: list[str], pieces: list[str]) -> None:
    delivered, matched = run(stops, pieces)
    text = "".join(pieces)
    assert "".join(delivered) == expected(stops, text)
    assert matched == (expected(stops, text) != text or any(stop in text for stop in stops))


@given(stops_strategy, st.text("abc", max_size=20))
def test_no_part_of_a_match_is_delivered_before_it(stops: list[str], text: str) -> None:
    delivered, _ = run(stops, list(text))
    for end in range(len(delivered)):
        assert expected(stops, text).startswith("".join(delivered[:end]))


def test_text_that_may_begin_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Yes.\n") == "Yes."
    assert matcher.push("\nUs") == ""
    assert matcher.push("ual") == "\n\nUsual"
    assert not matcher.matched


def test_a_stop_split_over_pieces_is_cut() -> None:
    delivered, matched = run(["STOP"], ["one S", "T", "OP two"])
    assert (delivered, matched) == (["one ", "", ""], True)


def test_what_is_held_back_comes_at_the_end() -> None:
    assert run(["STOP"], ["one ST"]) == (["one ", "ST"], False)


def test_the_match_complete_first_wins() -> None:
    assert run(["abcd", "bc"], ["abcd"]) == (["a"], True)
