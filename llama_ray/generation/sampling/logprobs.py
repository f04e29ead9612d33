"""Log-probabilities to report, from the raw logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llama_ray.generation.sampling.candidates import TopCandidates, torch_top_candidates
from llama_ray.generation.sampling.draw import UNITS, total_mass
from llama_ray.generation.sampling.params import MAX_LOGPROBS, TokenLogprob


@torch.inference_mode()
def token_logprobs(
    logits: Tensor,
    tokens: Sequence[int],
    top: Sequence[int],
    top_candidates: TopCandidates = torch_top_candidates,
    *,
    ranks: bool = False,
) -> list[TokenLogprob]:
    """Return the log-probabilities of each row's token, with its rank if `ranks`, and of its `top[row]` likeliest ones.

    Logits are [rows, vocab_size] of any dtype. To report the tokens of a prompt, pass the rows that predict them: the
    logits at position i with token i + 1.
    """
    if not tokens:
        return []
    logits = logits.float()
    # One width for all rows, so that a row's report does not depend on what the other rows ask for; none where no row
    # asks for any.
    width = min(1 << (MAX_LOGPROBS - 1).bit_length(), logits.shape[-1])
    values, ids = (
        top_candidates(logits, width) if any(top) else (logits[:, :0], logits.new_empty(len(logits), 0))
    )
    largest = logits.amax(-1, keepdim=True)
    normaliser = (
        largest.double() + total_mass(logits, largest, torch.ones_like(largest)).log() - math.log(UNITS)
    )
    own = logits.gather(-1, torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None])
    logprobs = (torch.cat([own, values], dim=-1).double() - normaliser).tolist()
    # Of equally probable tokens all have the last one's place.
    places: list[int | None] = (logits >= own).sum(-1).tolist() if ranks else [None] * len(tokens)
    return [
        TokenLogprob(token, row[0], tuple(zip(best[:n], row[1 : 1 + n], strict=False)), place)
        for token, row, best, n, place in zip(tokens, logprobs, ids.tolist(), top, places, strict=True)
    ]
