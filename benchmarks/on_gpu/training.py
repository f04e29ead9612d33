"""Training steps of ours and of transformers' model: tokens a second, MFU, peak memory, and a profile of one step."""

from __future__ import annotations

import gzip
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from peers.training import Contestant, ours, transformers
from random_batches import random_batch

from llama_ray.data.dataset.batch import Batch
from llama_ray.training.config import Precision
from llama_ray.training.reporting.metrics import peak_flops, peak_memory_bytes
from on_gpu.results import Results
from on_gpu.setting import Setting
from on_gpu.timing import free, wait, wall_s

ROUNDS, STEPS = 5, 3
OURS, THEIRS = "ours compiled", "transformers compiled"


def large(setting: Setting, results: Results) -> None:
    """1.1B, 8 x 2048 tokens, and a profile of one step."""
    _measure(setting, results, "1.1B", 8, 2048, ours, profile=True)


def large_peer(setting: Setting, results: Results) -> None:
    """Transformers' model on the same work, compiled as a whole."""
    _measure(setting, results, "1.1B", 8, 2048, transformers)
    mine = Results(setting.out, "train").value("train", _case("1.1B", 8, 2048, ours, "bf16"))
    theirs = results.value("train-peer", _case("1.1B", 8, 2048, transformers, "bf16"))
    if mine and theirs:
        results.add("1.1B, 8 x 2048, ours / transformers", mine / theirs, "x")


def long_sequences(setting: Setting, results: Results) -> None:
    """1.1B, 4 x 4096 tokens."""
    _measure(setting, results, "1.1B", 4, 4096, ours)


def float8(setting: Setting, results: Results) -> None:
    """1.1B, 8 x 2048 tokens, the products of the blocks in float8; MFU counts them as bf16."""
    _measure(setting, results, "1.1B", 8, 2048, ours, "fp8" if setting.on_gpu else "bf16")


def small(setting: Setting, results: Results) -> None:
    """134M, 16 x 1024 tokens."""
    _measure(setting, results, "134M", 16, 1024, ours)


def documents(setting: Setting, results: Results) -> None:
    """1.1B, 8 x 2048 tokens in documents of 64 and of 512 on average: other ones in each step."""
    for length in (64, 512):
        _measure(setting, results, "1.1B", 8, 2048, ours, documents=length)


def _case(
    name: str,
    batch: int,
    length: int,
    make: Callable[..., Contestant],
    precision: Precision,
    documents: int = 0,
) -> str:
    masked = f", documents of {documents}" if documents else ""
    return f"{name}, {batch} x {length}, {precision}, {OURS if make is ours else THEIRS}{masked}"


def _measure(
    setting: Setting,
    results: Results,
    name: str,
    batch: int,
    length: int,
    make: Callable[..., Contestant],
    precision: Precision = "bf16",
    *,
    profile: bool = False,
    documents: int = 0,
) -> None:
    device, case = setting.device, _case(name, batch, length, make, precision, documents)
    config = setting.config(name, max_seq_len=length)
    batch, length = setting.size(batch, 2), setting.size(length, 32)
    free(device)
    start = time.perf_counter()
    # A trial compiles nothing: the compiler of a CPU takes half a minute.
    contestant = make(config, precision, device, compiled=not setting.tiny)
    given = _batches(config.vocab_size, batch, length, documents, device)
    losses = [_steps(contestant, given, 1) for _ in range(3)]
    first_s = time.perf_counter() - start
    seconds = [
        wall_s(lambda: _steps(contestant, given), device) / STEPS for _ in range(setting.size(ROUNDS, 1))
    ]
    median = statistics.median(seconds)
    rate = batch * length / median
    flops = rate * config.flops_per_token(length)
    spread = (max(seconds) - min(seconds)) / median
    peak = peak_memory_bytes(device) / 2**30
    note = f"peak {peak:.1f} GiB, {1000 * median:.1f} ms a step, spread {spread:.1%}, first 3 steps {first_s:.0f} s"
    results.add(case, rate, "tok/s", flops / peak_flops(device, "bf16"), "the data sheet's bf16", note)
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"the loss of {case} does not fall: {losses}")
    if profile:
        _profile(setting, lambda: _steps(contestant, given, 1))


def _batches(
    vocab_size: int, batch: int, length: int, documents: int, device: torch.device
) -> Iterator[Batch]:
    """Yield the same tokens again and again; their documents begin elsewhere each time.

    So it shows in the spread if anything is compiled for one batch only.
    """
    tokens = random_batch(vocab_size, batch, length, documents).to(device)
    while True:
        # As a loader gives them: on the CPU.
        yield replace(tokens, starts=random_batch(vocab_size, batch, length, documents).starts)


def _steps(contestant: Contestant, batches: Iterator[Batch], count: int = STEPS) -> float:
    """Take `count` steps; return the last loss."""
    for batch in islice(batches, count):
        loss = contestant.step(batch)
    return loss.item()


def _profile(setting: Setting, step: Callable[[], object]) -> None:
    """Write `train-profile.txt`, the kernels by time, and `train-profile.json.gz`, for chrome://tracing."""
    with torch.profiler.profile() as profiler:
        step()
        wait(setting.device)
    by = "self_cuda_time_total" if setting.on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)
    (setting.out / "train-profile.txt").write_text(table)
    trace = setting.out / "train-profile.json"
    profiler.export_chrome_trace(str(trace))
    with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()
