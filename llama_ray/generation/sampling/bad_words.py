"""Words that must not occur in an output, as the tokens that would complete them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence


class BadWords:
    """Which tokens would complete one of several sequences of tokens."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self._always = [last for *before, last in sequences if not before]
        # By the token before the last one, so that a step looks at few of them.
        self._after: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
        for *before, last in sequences:
            if before:
                self._after[before[-1]].append((before, last))

    @classmethod
    def of(cls, words: Sequence[str], encode: Callable[[str], Sequence[int]], vocab_size: int) -> BadWords:
        """Return the token sequences of `words`, each at the beginning of a text and after a space, as vLLM has them.

        Those with a token that a model of `vocab_size` tokens cannot generate are left out.
        """
        spellings = dict.fromkeys(
            tuple(encode(space + word.lstrip())) for word in words for space in ("", " ")
        )
        return cls([tokens for tokens in spellings if tokens and max(tokens) < vocab_size])

    def completing(self, output: Sequence[int], draft: Sequence[int] = ()) -> list[int]:
        """Return the tokens that would complete a sequence after `output` and `draft`."""
        previous = draft[-1] if draft else output[-1] if output else None
        if previous is None or previous not in self._after:
            return self._always
        found = list(self._always)
        for before, last in self._after[previous]:
            missing = len(before) - len(draft)
            recent = [*output[len(output) - missing :], *draft] if missing > 0 else draft[-len(before) :]
            if missing <= len(output) and list(recent) == before:
                found.append(last)
        return found
