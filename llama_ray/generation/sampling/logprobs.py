"""Log-probabilities to report, from the logits as the model gave them."""

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
) -> list[TokenLogprob]:
    """What to report of each row: its token's log-probability and those of the `top[row]` most probable ones.

    Logits are [rows, vocab_size] of any dtype. For the tokens of a prompt, hand in the rows that predict them:
    the one at position i with token i + 1.
    """
    if not tokens:
        return []
    logits = logits.float()
    # One width for all, so that a row's report does not depend on what others ask for.
    width = min(1 << (MAX_LOGPROBS - 1).bit_length(), logits.shape[-1])
    values, ids = top_candidates(logits, width)
    largest = logits.amax(-1, keepdim=True)
    normaliser = (
        largest.double() + total_mass(logits, largest, torch.ones_like(largest)).log() - math.log(UNITS)
    )
    taken = logits.gather(-1, torch.tensor(tokens, dtype=torch.int64, device=logits.device)[:, None])
    numbers = (torch.cat([taken, values], dim=-1).double() - normaliser).tolist()
    return [
        TokenLogprob(token, row[0], tuple(zip(best[:n], row[1 : 1 + n], strict=False)))
        for token, row, best, n in zip(tokens, numbers, ids.tolist(), top, strict=True)
    ]
