"""What the sampler reads of a sequence, and draft rows: positions further ahead in the same sequence."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from llama_ray.generation.constraints.grammar import Constraint
from llama_ray.generation.sampling.bad_words import BadWords
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.penalties import TokenCounts


class Row(Protocol):
    """A position to sample a token for: the one after prompt, output and `draft` (empty except in a `DraftRow`).

    `seed` is set even if the request named none, and `index` is the candidate's number within its request. `end_ids`
    are the tokens that end the sequence. `counts` and `constraint` have seen the whole output but not the draft; each
    is None if the parameters do not need it, and so is `bad_words`.
    """

    @property
    def params(self) -> SamplingParams: ...  # noqa: D102
    @property
    def prompt(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def output(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def draft(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def index(self) -> int: ...  # noqa: D102
    @property
    def end_ids(self) -> Collection[int]: ...  # noqa: D102
    @property
    def counts(self) -> TokenCounts | None: ...  # noqa: D102
    @property
    def constraint(self) -> Constraint | None: ...  # noqa: D102
    @property
    def bad_words(self) -> BadWords | None: ...  # noqa: D102


class DraftRow:
    """The position that `row` reaches if its next tokens are `draft`.

    It draws the token that `row` will draw at that position, so draft tokens never change the output (Leviathan et
    al. 2023, arXiv:2211.17192, without their correction step: a draft token is accepted if it is the token drawn).
    """

    def __init__(self, row: Row, draft: Sequence[int]) -> None:
        self.params, self.seed, self.index = row.params, row.seed, row.index
        self.prompt, self.output, self.draft = row.prompt, row.output, draft
        self.end_ids, self.counts = row.end_ids, row.counts
        self.constraint, self.bad_words = row.constraint, row.bad_words


def below_min_tokens(row: Row) -> bool:
    """Whether the sequence is still too short to end."""
    return len(row.output) + len(row.draft) < row.params.min_tokens
