"""Random models and prompts, one way to run an engine, and a row for the sampler without an engine around it."""

from __future__ import annotations

import dataclasses
import random
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama_ray.generation.backends.quantize import QuantizedWeight
from llama_ray.generation.constraints.grammar import Constraint
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.bad_words import BadWords
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.penalties import TokenCounts
from llama_ray.generation.sampling.sampler import Sample, Sampler
from llama_ray.model.llama import Llama

PARAMS = SamplingParams(max_tokens=40, temperature=0.9, top_p=0.95, ignore_eos=True)


def random_prompts(model: Llama, count: int, seed: int = 0, longest: int = 100) -> list[list[int]]:
    """Return random prompts of very different lengths; every third one begins with the same tokens."""
    rng = random.Random(seed)
    common = [rng.randrange(model.config.vocab_size) for _ in range(70)]
    prompts = []
    for i in range(count):
        length = rng.choice([1, 2, 5, 31, 32, 33, 64, longest])
        own = [rng.randrange(model.config.vocab_size) for _ in range(length)]
        prompts.append((common + own)[:longest] if i % 3 == 0 else own)
    return prompts


def numbered_params(i: int, n: int = 1) -> SamplingParams:
    """Return parameters for request `i`, with its own seed and length."""
    return dataclasses.replace(PARAMS, seed=i, n=n, max_tokens=10 + i % 31)


def run_together(engine: Engine, prompts: list[list[int]], n: int = 1) -> list[list[list[int]]]:
    """Run all prompts at once, each with `numbered_params`; return the tokens by request and candidate."""
    ids = [engine.submit(prompt, numbered_params(i, n)) for i, prompt in enumerate(prompts)]
    tokens: dict[tuple[int, int], list[int]] = defaultdict(list)
    while engine.has_work:
        for delta in engine.step():
            assert delta.error is None
            tokens[delta.request_id, delta.index] += delta.token_ids
    assert engine.stats.blocks_in_use == 0
    return [[tokens[i, c] for c in range(n)] for i in ids]


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Return the numbers that a rounded weight represents, fp32 [out, in]."""
    inputs_per_scale = weight.values.shape[1] // weight.scales.shape[1]
    return weight.values * weight.scales.float().repeat_interleave(inputs_per_scale, 1)


@dataclass
class Row:
    """A sequence as the sampler sees it."""

    params: SamplingParams
    prompt: list[int] = field(default_factory=lambda: [0])
    output: list[int] = field(default_factory=list)
    seed: int = 0
    index: int = 0
    draft: tuple[int, ...] = ()
    end_ids: Collection[int] = ()
    constraint: Constraint | None = None
    bad_words: BadWords | None = None

    def __post_init__(self) -> None:
        self.counts = TokenCounts.of(self.params, self.prompt)
        for token in self.output:
            self._take(token)

    def push(self, token: int) -> None:
        self.output.append(token)
        self._take(token)

    def _take(self, token: int) -> None:
        if self.counts is not None:
            self.counts.push(token)
        if self.constraint is not None and token not in self.end_ids:
            self.constraint.push(token)


def sample(logits: Tensor, rows: list[Row], sampler: Sampler | None = None) -> list[Sample]:
    """Sample from copies of the logits until every row's mask has come."""
    sampler = sampler or Sampler()
    while True:
        samples = sampler.sample(logits.clone(), rows)
        if not any(sample.pending for sample in samples):
            return samples


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """Return normally distributed logits with standard deviation `scale`."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def logits_after(row: Row, vocab_size: int, scale: float = 3.0) -> Tensor:
    """Return logits [vocab_size] that depend on all tokens of the row and on nothing else, as a model's do."""
    seed = 0
    for token in (*row.prompt, *row.output, *row.draft):
        seed = (seed * 1_000_003 + token + 1) % 2**61
    return random_logits(vocab_size, seed=seed, scale=scale)
