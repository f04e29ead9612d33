"""Logits and each request's parameters -> one token a row, for the whole batch on the logits' device.

The order of operations: log-probabilities are read off the raw logits; then repetition penalty, presence and
frequency penalty, logit bias, tokens that are not allowed, temperature, top-k, top-p over what top-k kept, min-p, and
one draw from what is left, with numbers that `noise` makes from seed, position and token.

A row's token depends on its own logits, parameters, seed and position only; `draw` says what that takes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_ray.generation.sampling.constraints import Constraint, Masks, set_forbidden
from llama_ray.generation.sampling.draw import Filters, Kernels, argmax, candidates_needed
from llama_ray.generation.sampling.logprobs import token_logprobs
from llama_ray.generation.sampling.noise import places, starts
from llama_ray.generation.sampling.params import SamplingParams, TokenLogprob
from llama_ray.generation.sampling.penalties import Penalties, TokenCounts

NOT_FINITE = (
    "the model's logits are not finite (its numbers overflowed or its weights hold NaN); "
    "try dtype bfloat16 or float32"
)
_AGAIN = -1


class Row(Protocol):
    """A place that a token is sampled for: after prompt, output and `draft`, which is empty but for `Ahead`.

    `seed` is drawn already where the request named none. `end_ids` are the tokens that end the sequence. `counts`
    and `constraint` know all of the output and nothing of the draft; None where the parameters need none.
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


class Ahead:
    """A row for the place that `row` comes to if its next tokens are `draft`.

    It draws what `row` will draw once it is there, so that guessed tokens change no output (Leviathan et al. 2023,
    arXiv:2211.17192, without their correction step: a guess is kept where it is the token drawn).
    """

    def __init__(self, row: Row, draft: Sequence[int]) -> None:
        self.params, self.seed, self.index = row.params, row.seed, row.index
        self.prompt, self.output, self.draft = row.prompt, row.output, draft
        self.end_ids, self.counts, self.constraint = row.end_ids, row.counts, row.constraint


@dataclass(frozen=True, slots=True)
class Sample:
    """One row's outcome; where nothing could be drawn `token_id` is None and `error` says why."""

    token_id: int | None
    logprob: TokenLogprob | None
    error: str | None = None


class Sampler:
    """Samples batch after batch. What follows from the batch's parameters is kept while its rows are the same.

    Used by one thread at a time.
    """

    def __init__(self, kernels: Kernels = Kernels()) -> None:  # noqa: B008  frozen
        self._kernels = kernels
        self._masks = Masks()
        self._plan: _Plan | None = None

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[Row]) -> list[Sample]:
        """Logits [rows, vocab_size] of any dtype, which are lost -> one outcome for each row."""
        logits = logits.float().contiguous()
        if self._plan is None or not self._plan.fits(logits, rows):
            self._plan = _Plan(logits, rows)
        plan = self._plan
        largest = logits.amax(-1)  # finite where there is neither NaN nor +inf, and not only -inf
        raw = logits[plan.reported_rows] if plan.reported else None
        errors = self._adjust(logits, rows, plan)
        tokens = self._draw(logits, rows, plan)
        chosen: list[int] = tokens.tolist()
        finite = [math.isfinite(value) for value in largest.tolist()]
        if again := [i for i, token in enumerate(chosen) if token == _AGAIN and finite[i]]:
            for i, token in zip(again, self._draw_again(logits, rows, again), strict=True):
                chosen[i] = token
        samples = [
            Sample(token, None) if ok else Sample(None, None, NOT_FINITE)
            for token, ok in zip(chosen, finite, strict=True)
        ]
        for i, error in errors.items():
            samples[i] = Sample(None, None, error)
        if raw is not None:
            self._report(raw, rows, plan.reported, samples)
        return samples

    def _adjust(self, logits: Tensor, rows: Sequence[Row], plan: _Plan) -> dict[int, str]:
        """Penalties, bias and what is not allowed, in place -> errors by row."""
        if plan.penalties is not None:
            counts = [(rows[i].counts, rows[i].draft) for i in plan.penalised]
            plan.penalties.apply(logits, [c.after(draft) for c, draft in counts if c is not None])
        if plan.bias is not None:
            flat, values = plan.bias
            logits.view(-1)[flat] += values
        if plan.ending:
            self._forbid_ends(logits, rows, plan)
        errors = {}
        if plan.constrained:
            constraints = [c for i in plan.constrained if (c := rows[i].constraint) is not None]
            drafts = [rows[i].draft for i in plan.constrained]
            allowed = self._masks.allowed(constraints, drafts, logits.shape[-1])
            for i, constraint, bits in zip(plan.constrained, constraints, allowed, strict=True):
                if _may_not_end(rows[i]):
                    set_forbidden(bits, rows[i].end_ids)
                if (error := constraint.error) is not None:
                    errors[i] = error
            self._masks.apply(logits, plan.constrained_rows, allowed)
        return errors

    def _forbid_ends(self, logits: Tensor, rows: Sequence[Row], plan: _Plan) -> None:
        vocab_size = logits.shape[-1]
        flat = [
            i * vocab_size + token
            for i in plan.ending
            if _may_not_end(rows[i])
            for token in rows[i].end_ids
            if token < vocab_size
        ]
        if flat:
            logits.view(-1)[torch.tensor(flat, device=logits.device)] = -torch.inf

    def _draw(self, logits: Tensor, rows: Sequence[Row], plan: _Plan) -> Tensor:
        """Tokens int64 [rows]; `_AGAIN` for those that must be drawn again."""
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        place = _places(plan.streams, rows, logits.device) if plan.drawn else tokens
        for group in plan.groups:
            members, filters = group.rows, group.filters
            if filters is not None and not filters.width:
                at = place if members is None else place[members]
                found = self._kernels.draw_from_all(logits, members, filters, at)
            else:
                some, at = (logits, place) if members is None else (logits[members], place[members])
                if filters is None:
                    found = argmax(some)
                else:
                    found, short = self._kernels.draw_filtered(some, filters, at)
                    if short is not None:
                        found = found.masked_fill(short, _AGAIN)
            if members is None:
                return found
            tokens[members] = found
        return tokens

    def _draw_again(self, logits: Tensor, rows: Sequence[Row], again: list[int]) -> list[int]:
        """Draw from nuclei that hold more tokens than were looked at."""
        some, vocab_size = [rows[i] for i in again], logits.shape[-1]
        filters = Filters.of([row.params for row in some], vocab_size, vocab_size, logits.device)
        place = _places(_streams(some), some, logits.device)
        found, _ = self._kernels.draw_filtered(logits[again], filters, place)
        tokens: list[int] = found.tolist()
        return tokens

    def _report(self, raw: Tensor, rows: Sequence[Row], reported: list[int], samples: list[Sample]) -> None:
        """Add log-probabilities, of the raw logits, to the samples that are to have them."""
        tokens = [samples[i].token_id or 0 for i in reported]
        numbers = [rows[i].params.logprobs or 0 for i in reported]
        reports = token_logprobs(raw, tokens, numbers, self._kernels.top_candidates)
        for i, report in zip(reported, reports, strict=True):
            if samples[i].token_id is not None:
                samples[i] = Sample(report.token_id, report)


@dataclass(frozen=True)
class _Group:
    """Rows that are drawn in one go: all (`rows` None) or those named. `filters` None means greedy: no draw."""

    rows: Tensor | None
    filters: Filters | None


class _Plan:
    """What the parameters of a batch's rows come to; nothing in it depends on tokens or positions."""

    def __init__(self, logits: Tensor, rows: Sequence[Row]) -> None:
        vocab_size, device = logits.shape[-1], logits.device
        self._params = params = [row.params for row in rows]
        self._shape, self._device = logits.shape, device
        self._drawn_by = [(row.seed, row.index) for row in rows]
        by_width: dict[int, list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            by_width[candidates_needed(p, vocab_size) if p.temperature > 0 else -1].append(i)
        self.drawn = any(width >= 0 for width in by_width)
        self.groups = [
            _Group(
                torch.tensor(members, device=device) if len(by_width) > 1 else None,
                Filters.of([params[i] for i in members], width, vocab_size, device) if width >= 0 else None,
            )
            for width, members in by_width.items()
        ]
        self.streams = _streams(rows)
        self.reported = [i for i, p in enumerate(params) if p.logprobs is not None]
        self.reported_rows = torch.tensor(self.reported, dtype=torch.int64, device=device)
        self.penalised = [i for i, row in enumerate(rows) if row.counts is not None]
        self.penalties = (
            Penalties(self.penalised, [params[i] for i in self.penalised], device) if self.penalised else None
        )
        self.bias = _bias(params, vocab_size, device)
        self.constrained = [i for i, row in enumerate(rows) if row.constraint is not None]
        self.constrained_rows = torch.tensor(self.constrained, dtype=torch.int64, device=device)
        self.ending = [i for i, row in enumerate(rows) if row.params.min_tokens and row.constraint is None]

    def fits(self, logits: Tensor, rows: Sequence[Row]) -> bool:
        """Whether this is the plan for `rows`, too: the same requests at the same places."""
        return (
            logits.shape == self._shape
            and logits.device == self._device
            and all(row.params is p for row, p in zip(rows, self._params, strict=True))
            and all((row.seed, row.index) == s for row, s in zip(rows, self._drawn_by, strict=True))
        )


def _streams(rows: Sequence[Row]) -> NDArray[np.uint64]:
    return starts([row.seed for row in rows], [row.index for row in rows])


def _places(streams: NDArray[np.uint64], rows: Sequence[Row], device: torch.device) -> Tensor:
    """Where each row's numbers are, as `noise.places` has it, on the device."""
    positions = [len(row.prompt) + len(row.output) + len(row.draft) for row in rows]
    return places(streams, positions).to(device)


def _bias(
    params: Sequence[SamplingParams], vocab_size: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Where and what to add to the batch's logits, as flat indices and values."""
    pairs = [
        (i * vocab_size + token, value)
        for i, p in enumerate(params)
        for token, value in (p.logit_bias or {}).items()
    ]
    if not pairs:
        return None
    flat, values = zip(*pairs, strict=True)
    return torch.tensor(flat, device=device), torch.tensor(values, dtype=torch.float32, device=device)


def _may_not_end(row: Row) -> bool:
    return len(row.output) + len(row.draft) < row.params.min_tokens
