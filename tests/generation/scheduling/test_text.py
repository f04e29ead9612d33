from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.scheduling.text import StopMatcher, TextOutput


def character_by_character(text: str, stop: tuple[str, ...], passed: int = 0) -> tuple[str, bool]:
    """Extend the text until it ends with a stop string, and cut the longest one it ends with: the definition.

    Stop strings that are complete within the first `passed` characters do not count.
    """
    for end in range(passed + 1, len(text) + 1):
        ended = [s for s in stop if text[:end].endswith(s)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


def in_pieces(pieces: list[str], stop: tuple[str, ...], unstoppable: int = 0) -> tuple[list[str], bool]:
    matcher, shown = StopMatcher(stop), []
    for i, piece in enumerate(pieces):
        text, stopped = matcher.push(piece, may_stop=i >= unstoppable)
        shown.append(text)
        if stopped:
            return shown, True
    return [*shown, matcher.flush()], False


LETTERS = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("abc", max_size=5), max_size=12), st.lists(LETTERS, max_size=3).map(tuple))
def test_the_cut_does_not_depend_on_how_the_text_is_divided(pieces: list[str], stop: tuple[str, ...]) -> None:
    shown, stopped = in_pieces(pieces, stop)
    assert ("".join(shown), stopped) == character_by_character("".join(pieces), stop)


@given(
    st.lists(st.text("abc", max_size=5), max_size=12),
    st.lists(LETTERS, max_size=3).map(tuple),
    st.integers(0, 12),
)
def test_stop_strings_in_pieces_that_may_not_stop_are_text(
    pieces: list[str], stop: tuple[str, ...], unstoppable: int
) -> None:
    shown, stopped = in_pieces(pieces, stop, unstoppable)
    # Only stop strings that become complete after those pieces count.
    expected, expected_stop = character_by_character(
        "".join(pieces), stop, len("".join(pieces[:unstoppable]))
    )
    assert ("".join(shown), stopped) == (expected, expected_stop)


def test_only_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(("###", "END"))
    assert matcher.push("one #") == ("one ", None)
    assert matcher.push(" two E") == ("# two ", None)
    assert matcher.push("N") == ("", None)
    assert matcher.push("E") == ("EN", None)
    assert matcher.push("ND more") == ("", "END")


def test_a_stop_string_may_be_part_of_the_text() -> None:
    matcher = StopMatcher(("end.", "nd"), include=True)
    assert matcher.push("the e") == ("the ", None)
    assert matcher.push("nd. more") == ("end", "nd")


def test_characters_come_whole_and_incomplete_bytes_may_complete_a_stop_string(tokenizer: Tokenizer) -> None:
    text = "🙂 漢字 é"
    output = TextOutput(tokenizer.stream(), ())
    shown = [output.push(token)[0] for token in tokenizer.encode(text)] + [output.finish()[0]]
    assert "".join(shown) == text
    assert not any("�" in piece for piece in shown)

    unfinished = TextOutput(tokenizer.stream(), ("�",))
    first_byte = tokenizer.encode("\U0010ffff")[0]
    assert unfinished.push(first_byte) == ("", None)
    assert unfinished.finish() == ("", "�")


def test_stop_strings_count_from_token_min_tokens_on(tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.encode(character)[0] for character in "a.b.c"]
    for min_tokens, expected in ((0, "a"), (2, "a"), (3, "a.b"), (4, "a.b"), (5, "a.b.c")):
        output, shown = TextOutput(tokenizer.stream(), (".",), min_tokens), ""
        for token in tokens:
            text, stopped = output.push(token)
            shown += text
            if stopped:
                break
        assert shown == expected
