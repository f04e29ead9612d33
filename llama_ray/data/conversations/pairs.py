"""The examples of a pair of answers, which follow each other in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from llama_ray.data.conversations.examples import Example, Refusal

Units: TypeAlias = Sequence[Sequence[Example]]
"""Of a record: each is one or more examples that follow each other in one row."""


def units_of_pair(encoded: Sequence[list[Example] | Refusal]) -> Units | Refusal:
    """Return the unit of the chosen and the rejected answer, or why they cannot be compared."""
    chosen, rejected = encoded
    for examples in (chosen, rejected):
        if isinstance(examples, Refusal):
            return examples
        if len(examples) != 1:
            return Refusal("an answer of several turns of which one begins within a token; give single turns")
    unit = [examples[0] for examples in (chosen, rejected) if not isinstance(examples, Refusal)]
    prompts = [example.ids[: int(example.learned.argmax())] for example in unit]
    if not np.array_equal(prompts[0], prompts[1]):
        return Refusal("a pair whose prompt has other tokens before the other answer")
    if np.array_equal(unit[0].ids, unit[1].ids):
        return Refusal("a pair whose answers have the same tokens")
    return [unit]
