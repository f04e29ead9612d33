"""Sampling written down from its definitions, one row and one token after the other, for tests to compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llama_ray.generation.sampling.params import SamplingParams
from tests.generation.helpers import Row

# Parameters of every kind, for batches that mix them.
MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9),
    SamplingParams(top_k=500, min_p=0.02, logprobs=3),
    SamplingParams(top_p=0.95),
    SamplingParams(temperature=1.5, min_p=0.1),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, logprobs=1),
    SamplingParams(top_k=20, presence_penalty=1.0, logit_bias={7: 2.0, 9: -5.0}),
    SamplingParams(temperature=0, min_tokens=3, max_tokens=20, logit_bias={5: 30.0}),
]
GAMMA = 0x9E3779B97F4A7C15


def splitmix64(state: int, count: int) -> list[int]:
    """Return the first outputs of the published generator, started at `state`."""
    mask, out = 2**64 - 1, []
    for _ in range(count):
        state = (state + GAMMA) & mask
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        out.append(z ^ z >> 31)
    return out


def output(key: int, index: int) -> int:
    """Return output `index` of the stream whose output 0 comes from `key` itself."""
    return splitmix64((key + GAMMA * (index - 1)) % 2**64, 1)[0]


def exponential(seed: int, candidate: int, position: int, token: int) -> float:
    """Return the noise at these coordinates: three streams, each of which starts at an output of the one before."""
    bits = output(output(output(splitmix64(seed % 2**64, 1)[0], candidate), position), token)
    return -math.log1p(-((bits >> 12) + 0.5) / 2**52)


def draw(logits: Tensor, row: Row) -> int:
    """Return the row's token for logits [vocab_size], without penalties, bias and masks."""
    p = row.params
    if p.temperature == 0:
        return int(logits.argmax())
    shifted = (logits - logits.max()) / max(p.temperature, torch.finfo(torch.float32).tiny)
    # Integers are added exactly: in units of 2^-36 of the most probable token's probability.
    mass = [int(m) for m in (shifted.exp() * 2.0**36).round().tolist()]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token].item(), token))
    if p.top_k:
        order = order[: p.top_k]
    total, before, kept = sum(mass[token] for token in order), 0, []
    for token in order:
        if p.top_p == 1 or before < p.top_p * total:
            kept.append(token)
        before += mass[token]
    least = torch.tensor(math.log(p.min_p) if p.min_p else -math.inf)
    runners = [token for token in kept if mass[token] and shifted[token] >= least]
    position = len(row.prompt) + len(row.output) + len(row.draft)
    times = {token: exponential(row.seed, row.index, position, token) / mass[token] for token in runners}
    return min(runners, key=lambda token: times[token])


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return each token's probability, fp64 [vocab_size], under the filters as transformers applies them."""
    scores = TemperatureLogitsWarper(params.temperature)(None, logits[None].float())
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    return scores[0].double().softmax(-1)
