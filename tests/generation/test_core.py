"""Blocks, memory and failures: none of them changes a sequence's tokens."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.backends.backend import BLOCK_SIZE
from llama_ray.generation.backends.prepare import as_backend
from llama_ray.generation.completion import Completion, GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from tests.generation.helpers import PARAMS, numbered_params, random_prompts, run_together


def cache_of(model: Llama, blocks: int) -> int:
    return (blocks + 1) * as_backend(model).block_bytes


@pytest.fixture(scope="module")
def expected(model: Llama, tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Tokens of each request computed alone, without sharing or chunks."""
    alone = Engine(model, tokenizer, max_num_seqs=1, max_num_batched_tokens=1000, enable_prefix_caching=False)
    return [
        [c.token_ids for c in alone.generate([p], numbered_params(i, n=3))]
        for i, p in enumerate(random_prompts(model, 24))
    ]


def first_candidates(expected: list[list[list[int]]]) -> list[list[list[int]]]:
    return [[candidates[0]] for candidates in expected]


def test_tokens_do_not_depend_on_small_chunks_and_other_requests(
    model: Llama, tokenizer: Tokenizer, expected: list[list[list[int]]]
) -> None:
    engine = Engine(model, tokenizer, max_num_seqs=7, max_num_batched_tokens=9, enable_prefix_caching=False)
    assert run_together(engine, random_prompts(model, 24)) == first_candidates(expected)
    assert engine.stats.prompt_tokens == sum(map(len, random_prompts(model, 24)))


def test_tokens_do_not_depend_on_preemption_in_a_small_cache(
    model: Llama, tokenizer: Tokenizer, expected: list[list[list[int]]]
) -> None:
    engine = Engine(
        model,
        tokenizer,
        max_num_seqs=16,
        kv_cache_memory_bytes=cache_of(model, 10),
        max_num_batched_tokens=64,
    )
    assert run_together(engine, random_prompts(model, 24)) == first_candidates(expected)
    stats = engine.stats
    assert stats.blocks == 10
    assert stats.preemptions > 0
    assert stats.evictions > 0


def test_a_cached_prefix_is_not_computed_again(
    model: Llama, tokenizer: Tokenizer, expected: list[list[list[int]]]
) -> None:
    engine = Engine(model, tokenizer)
    many = random_prompts(model, 24)
    assert run_together(engine, many) == first_candidates(expected)
    before = engine.stats
    assert run_together(engine, many) == first_candidates(expected)
    after = engine.stats
    reused = sum((len(p) - 1) // BLOCK_SIZE * BLOCK_SIZE for p in many)
    assert after.reused_tokens - before.reused_tokens == reused
    assert after.prompt_tokens - before.prompt_tokens == sum(map(len, many)) - reused


def test_candidates_share_their_prompt(
    model: Llama, tokenizer: Tokenizer, expected: list[list[list[int]]]
) -> None:
    engine = Engine(model, tokenizer, max_num_seqs=8, enable_prefix_caching=False)
    many = random_prompts(model, 24)
    assert run_together(engine, many, n=3) == expected
    # With fewer max_num_seqs than candidates, some candidates start on their own.
    few = Engine(model, tokenizer, max_num_seqs=2, kv_cache_memory_bytes=cache_of(model, 6))
    assert run_together(few, many, n=3) == expected
    wide = Engine(model, tokenizer, max_num_seqs=8, enable_prefix_caching=False)
    wide.generate([many[0]], dataclasses.replace(PARAMS, n=8))
    assert wide.stats.prompt_tokens == len(many[0])


def test_tokens_depend_on_the_seed_alone_among_a_thousand_random_requests(
    model: Llama, tokenizer: Tokenizer
) -> None:
    """Requests repeat and abort, and caches fill and empty; tokens of one seed are always the same."""
    rng = random.Random(1)
    many = random_prompts(model, 60, seed=5)
    known: dict[int, list[int]] = {}
    asked = 0
    for round_ in range(6):
        engine = Engine(
            model,
            tokenizer,
            max_num_seqs=rng.choice([3, 17, 64]),
            max_num_batched_tokens=rng.choice([8, 50, 400]),
            kv_cache_memory_bytes=cache_of(model, rng.choice([6, 30, 200])),
            enable_prefix_caching=bool(round_ % 3),
        )
        running: dict[int, int] = {}
        tokens: dict[int, list[int]] = defaultdict(list)
        todo = [rng.randrange(60) for _ in range(200)]
        while todo or engine.has_work:
            for _ in range(min(len(todo), rng.randrange(8))):
                which = todo.pop()
                params = dataclasses.replace(PARAMS, seed=which, max_tokens=1 + which % 13)
                running[engine.submit(many[which], params)] = which
                asked += 1
            if running and rng.random() < 0.05:
                victim = rng.choice(list(running))
                engine.abort(victim)
                del running[victim]
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
        for request_id, which in running.items():
            assert known.setdefault(which, tokens[request_id]) == tokens[request_id]
        assert engine.stats.blocks_in_use == 0
    assert asked == 1200


def test_thousands_of_requests_leave_no_blocks_or_memory_behind(tokenizer: Tokenizer) -> None:
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        intermediate_size=8,
        max_seq_len=64,
    )
    engine = Engine(Llama(config), tokenizer, max_num_seqs=256, max_num_batched_tokens=1024)
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    rng = random.Random(0)

    def serve(requests: int) -> int:
        for i in range(requests):
            request_id = engine.submit([rng.randrange(300) for _ in range(1 + i % 40)], params)
            if i % 10 == 0:
                engine.abort(request_id)
            # Keep the queue short.
            if i % 256 == 0:
                while engine.stats.waiting > 20:
                    engine.step()
        while engine.has_work:
            engine.step()
        gc.collect()
        assert (engine.stats.blocks_in_use, engine.stats.waiting, engine.stats.running) == (0, 0, 0)
        return int(psutil.Process().memory_info().rss)

    # The prefix cache is full after these.
    before = serve(6000)
    after = serve(15000)
    assert after - before < 8 * 2**20


@contextmanager
def failing(model: Llama, fails: Callable[[torch.Tensor], BaseException | None]) -> Iterator[list[int]]:
    """Make the model raise what `fails` returns for its input; yield the sizes of the attempted forward passes."""
    sizes: list[int] = []

    def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        sizes.append(args[0].numel())
        error = fails(args[0])
        if error is not None:
            raise error

    handle = model.embed_tokens.register_forward_pre_hook(hook)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_step_that_runs_out_of_memory_is_repeated_in_smaller_ones(
    model: Llama, tokenizer: Tokenizer, expected: list[list[list[int]]], error: Exception
) -> None:
    engine = Engine(model, tokenizer, max_num_seqs=24, max_num_batched_tokens=256)
    with failing(model, lambda tokens: error if tokens.numel() > 40 else None) as sizes:
        assert run_together(engine, random_prompts(model, 24)) == first_candidates(expected)
    assert max(sizes) > 40


def test_a_single_token_that_runs_out_of_memory_fails_its_request(model: Llama, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    with (
        failing(model, lambda tokens: torch.OutOfMemoryError("CUDA out of memory")),
        pytest.raises(GenerationError, match="OutOfMemoryError: CUDA out of memory"),
    ):
        engine.generate([[1, 2], [3]], PARAMS)
    assert engine.stats.blocks_in_use == 0
    assert len(engine.generate([[1, 2]], PARAMS)[0].token_ids) == 40


class Panicked(BaseException):
    """As pyo3's PanicException, which is no Exception either."""


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (RuntimeError("token 17\nis bad"), "RuntimeError: token 17"),
        (Panicked("token 17\nis bad"), "Panic: Panicked: token 17"),
    ],
)
def test_only_the_request_that_breaks_a_step_fails(
    model: Llama, tokenizer: Tokenizer, cause: BaseException, message: str
) -> None:
    params = dataclasses.replace(PARAMS, seed=4, logit_bias={17: -100.0})
    good = Engine(model, tokenizer).generate([[1, 2, 3], [5]], params)
    engine = Engine(model, tokenizer)
    with failing(model, lambda tokens: cause if (tokens == 17).any() else None):
        ids = [engine.submit(p, params) for p in ([1, 2, 3], [4, 17, 6], [5])]
        tokens: dict[int, list[int]] = defaultdict(list)
        errors = {}
        while engine.has_work:
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
                if delta.error:
                    errors[delta.request_id] = delta.error
    assert errors == {ids[1]: message}
    assert [tokens[ids[0]], tokens[ids[2]]] == [c.token_ids for c in good]


def test_abort_frees_blocks_at_once(model: Llama, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer)
    request_id = engine.submit([1] * 100, dataclasses.replace(PARAMS, n=4))
    engine.step()
    engine.step()
    assert engine.stats.running == 4
    assert engine.stats.blocks_in_use == 3 + 4
    engine.abort(request_id)
    assert (engine.stats.running, engine.stats.blocks_in_use) == (0, 0)


def test_request_stats_hold_times_in_order(engine: Engine) -> None:
    [first, second] = engine.generate([[1] * 80] * 2, dataclasses.replace(PARAMS, seed=1))
    assert isinstance(first, Completion)
    stats = first.stats
    assert stats is not None
    assert second.stats is not None
    assert stats.output_tokens == 40
    assert stats.queue_s is not None
    assert stats.time_to_first_token_s is not None
    assert stats.inter_token_s is not None
    assert stats.finished is not None
    assert 0 <= stats.queue_s <= stats.time_to_first_token_s
    assert stats.inter_token_s <= stats.longest_gap_s
    assert stats.time_to_first_token_s + stats.inter_token_s * 39 <= stats.finished - stats.arrived + 1e-6
    last = engine.stats.last_step
    assert last is not None
    assert (last.sequences, last.generated_tokens) == (2, 2)
