from __future__ import annotations

import dataclasses
import gc
import queue
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.batch import StepBatch
from llama_ray.generation.backends.cpu.cache import CpuCache
from llama_ray.generation.backends.kv_cache import TorchCache
from llama_ray.generation.backends.runner import Runner, RunnerError
from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.engine_thread import EngineThread, Item
from llama_ray.generation.parallel.division import rank_config, rank_slicer
from llama_ray.generation.parallel.ranks import Ranks
from llama_ray.generation.parallel.runner import RankResult, RankRunner
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.checkpoint import load_model
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained
from tests.small_models import random_model

PROMPTS = [
    "def",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on." * 2,
    "Zwölf Box",
    "漢字とかな 🙂",
    "and the dog sleeps on.",
]
GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.95, seed=11, n=3, ignore_eos=True)
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 48, "max_seq_len": 160}


@pytest.fixture(scope="module")
def pair(saved: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(saved, device="cpu", tensor_parallel=2, **LIMITS) as engine:
        yield engine


def workers(pid: int | None = None) -> list[psutil.Process]:
    """Return the worker processes of a process, by default of this one."""
    return [
        p
        for p in psutil.Process(pid).children()
        if "llama_ray.generation.parallel.worker " in " ".join(p.cmdline())
    ]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_tokens_equal_those_of_one_process_in_any_batch(
    pair: Engine, saved: Path, params: SamplingParams
) -> None:
    one = Engine.from_pretrained(saved, device="cpu", **LIMITS)
    together = pair.generate(PROMPTS, params)
    assert together == one.generate(PROMPTS, params)
    # Each prompt alone gives the same tokens as in the batch with its caching and chunking.
    for i, prompt in enumerate(PROMPTS):
        assert pair.generate([prompt], params) == together[i * params.n : (i + 1) * params.n]


def test_a_tied_head_and_preemption_give_the_tokens_of_one_process(
    model: Llama, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = dataclasses.replace(model.config, tie_embeddings=True)
    tied = random_model(config, seed=5)
    save_pretrained(tied, tokenizer, tmp_path)
    rank_bytes = 7 * CpuCache.block_bytes(rank_config(config, 2), 32, torch.float32)
    before = workers()
    engine = Engine.from_pretrained(
        tmp_path, device="cpu", tensor_parallel=2, kv_cache_memory_bytes=rank_bytes, **LIMITS
    )
    params = SamplingParams(max_tokens=60, temperature=0, logprobs=2, ignore_eos=True)
    got = engine.generate(PROMPTS, params)
    stats = engine.stats
    assert stats.preemptions
    assert (stats.blocks, stats.kv_cache_bytes) == (6, 2 * rank_bytes)
    # Both ranks hold the embedding and the norms; all else is divided, apart from the padding to whole panels.
    whole = Engine.from_pretrained(tmp_path, device="cpu", **LIMITS).stats.weight_bytes
    shared = sum(p.nbytes for name, p in tied.named_parameters() if "proj" not in name)
    assert whole < stats.weight_bytes < 1.15 * whole + shared
    expected = Engine(tied, tokenizer, **LIMITS).generate(PROMPTS, params)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
    # The processes end when the engine is garbage-collected.
    processes = [p for p in workers() if p not in before]
    assert processes
    del engine
    gc.collect()
    assert not any(p.is_running() for p in processes)


def test_a_killed_worker_ends_the_engine_and_its_streams(saved: Path) -> None:
    before = workers()
    engine = Engine.from_pretrained(saved, device="cpu", tensor_parallel=2, **LIMITS)
    (worker,) = [p for p in workers() if p not in before]
    items: queue.Queue[tuple[int, Item]] = queue.Queue()

    def deliver(new: list[tuple[int, Item]]) -> None:
        for item in new:
            items.put(item)

    thread = EngineThread(engine, deliver)
    for number, prompt in enumerate(PROMPTS):
        thread.submit(prompt, SamplingParams(max_tokens=90, ignore_eos=True), number)
    items.get(timeout=60)
    worker.send_signal(signal.SIGKILL)
    # This includes the requests that still wait.
    ended: set[int] = set()
    while len(ended) < len(PROMPTS):
        number, item = items.get(timeout=60)
        if isinstance(item, GenerationError):
            assert re.search(r"worker of rank 1 .* killed by SIGKILL; .* make a new one", str(item))
            ended.add(number)
    with pytest.raises(GenerationError, match="SIGKILL"):
        thread.submit("a", SamplingParams(), 0)
    thread.stop()
    assert not worker.is_running()
    engine.submit("a")
    with pytest.raises(RunnerError, match="SIGKILL"):
        engine.step()


SCRIPT = """
import sys, psutil
from llama_ray import Engine, SamplingParams
engine = Engine.from_pretrained(sys.argv[1], device="cpu", tensor_parallel=2)
print(*[p.pid for p in psutil.Process().children()], flush=True)
while True:
    engine.generate(["The quick"], SamplingParams(max_tokens=100, ignore_eos=True))
"""
"""Has no guard for `__main__`, because a worker must not run it again."""


def test_no_worker_outlives_its_engine(saved: Path) -> None:
    endings = [signal.SIGKILL, signal.SIGINT]
    scripts = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, saved], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in endings
    ]
    for script, ending in zip(scripts, endings, strict=True):
        with script:
            assert script.stdout is not None
            processes = [psutil.Process(int(pid)) for pid in script.stdout.readline().split()]
            assert len(processes) == 1
            script.send_signal(ending)
            _, errors = script.communicate(timeout=60)
        assert script.returncode == -ending
        assert ("KeyboardInterrupt" in errors) == (ending == signal.SIGINT)
        assert not psutil.wait_procs(processes, timeout=60)[1]


def test_a_model_that_cannot_be_divided_is_refused_before_a_worker_starts(saved: Path) -> None:
    before = workers()
    for ranks, message in (
        (3, r"tensor_parallel is 3; it must divide the model's num_heads of 4; .* by 1 and 2$"),
        (4, r"4; it must divide the model's num_kv_heads of 2"),
        (0, "tensor_parallel is 0; it must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine.from_pretrained(saved, device="cpu", tensor_parallel=ranks)
    assert workers() == before


THREE = LlamaConfig(
    vocab_size=96,
    hidden_size=24,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    intermediate_size=48,
    max_seq_len=64,
)


def one_of_three(rank: int, saved: Path, meeting_place: Path) -> tuple[Tensor, Tensor, list[RankResult]]:
    """Return a sum over the ranks, the same sum row by row, and three steps of which the second fails on rank 1."""
    ranks = Ranks(meeting_place, rank, 3, torch.device("cpu"))
    parts = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = ranks.sum(parts[rank])
    alone = torch.cat([ranks.sum(row[None]) for row in parts[rank]])
    model = load_model(saved, slicer=rank_slicer(rank, 3))
    runner = RankRunner(Backend(model, rank_config(THREE, 3)), 4, ranks)
    if rank == 1:
        assert isinstance(runner.cache, TorchCache)
        # The second layer has no block 2, so a step that uses it fails.
        runner.cache.keys[1] = runner.cache.keys[1][:2]
    return whole, alone, [runner.compute(prompt(block), []) for block in (1, 2, 1)]


def prompt(block: int) -> StepBatch:
    """Eleven tokens of one sequence, in one block; logits of the last two."""
    return StepBatch(
        tokens=torch.arange(5, 16),
        positions=torch.arange(11),
        slots=block * 32 + torch.arange(11),
        query_start=torch.tensor([0, 11], dtype=torch.int32),
        context_len=torch.tensor([11], dtype=torch.int32),
        block_table=torch.tensor([[block]], dtype=torch.int32),
        logit_rows=torch.tensor([9, 10]),
    )


def test_ranks_sum_in_their_order_and_stay_in_step_when_one_fails(tmp_path: Path) -> None:
    model = random_model(THREE)
    save_pretrained(model, None, tmp_path / "saved")
    # Ranks share only the process group, so threads can stand for processes here.
    with ThreadPoolExecutor(3) as threads:
        results = list(threads.map(lambda rank: one_of_three(rank, tmp_path / "saved", tmp_path), range(3)))
    failed = [[step.error is not None for step in steps] for _, _, steps in results]
    assert failed == [[False] * 3, [False, True, False], [False] * 3]
    parts = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    # The same to the bit on every rank, and for any number of rows.
    for total, by_row, _ in results:
        assert torch.equal(by_row, total)
        assert torch.equal(total, (parts[0] + parts[1] + parts[2]).bfloat16())
    first, second, third = (step.logits for step in results[0][2])
    assert first is not None
    whole = Runner(model, TorchCache(THREE, 4, torch.float32, "cpu", 32))
    with torch.inference_mode():
        expected = whole.forward(prompt(1))
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(third, first)
    # Rank 1 contributed zeros for what it could not compute.
    assert not torch.equal(second, first)
