"""Our training step beside transformers': same shape, data, precision, optimizer and batch, in alternating rounds.

    python benchmarks/train.py                # 33.7M parameters, 8 x 256 tokens, bf16; 5 minutes on 2 cores
    python benchmarks/train.py --preset llama-3.2-1b --seq_len 4096 --batch_size 4 --device cuda    # on a GPU
    python benchmarks/train.py --documents 50 --seq_len 1024    # ours with a document mask beside ours without
    python benchmarks/train.py --lora_rank 16                   # adapters beside all weights, ours and peft's

Needs torch and transformers, no Ray and no MLflow. Each contestant has its own process, so that peak memory is
measured for each. They alternate in short rounds that begin with a large matrix product: other work on the machine
slows all of them alike, and hardly changes medians and ratios. On a GPU waiting contestants keep weights and optimizer
state in host memory, so that the running one has the device to itself.

MFU (model FLOP/s utilisation) counts 6 N + 12 L d s operations a token, attention not halved; of n weights of adapters,
4 N + 12 L d s + 6 n. It is relative to the
rate of that matrix product, and on a GPU also to the data sheet.
"""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from peers.training import Contestant, ours, transformers
from random_batches import random_batch

from llama_ray.data.dataset.batch import Batch
from llama_ray.model.config import LlamaConfig
from llama_ray.model.lora_config import LoraConfig
from llama_ray.training.config import Precision
from llama_ray.training.reporting.metrics import peak_flops, peak_memory_bytes
from llama_ray.utils.errors import first_line

CONTESTANTS = ("ours eager", "ours compiled", "transformers eager", "transformers compiled")
MASKED_CONTESTANTS = ("ours eager", "ours eager masked", "ours compiled", "ours compiled masked")
ADAPTER_CONTESTANTS = (
    "ours eager",
    "ours eager adapters",
    "transformers eager",
    "transformers eager adapters",
)
GEMM_SIZE = {"cpu": 2048, "cuda": 8192}


def main(
    preset: str = "llama-30m",
    batch_size: int = 8,
    seq_len: int = 256,
    precision: Precision = "bf16",
    rounds: int = 9,
    steps: int = 2,
    warmup: int = 3,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    threads: int = 0,
    clock: Literal["wall", "cpu"] = "wall",
    documents: int = 0,
    lora_rank: int = 0,
    contestants: list[str] | None = None,
) -> None:
    """Print tokens/s, MFU, peak memory, and the ratio of ours to transformers', or of masked to not masked.

    Args:
        preset: A preset of LlamaConfig.
        batch_size: Sequences per step.
        seq_len: Tokens per sequence.
        precision: bf16 or fp32.
        rounds: Measurements of each contestant.
        steps: Optimizer steps per measurement.
        warmup: Steps before the first measurement; a compiled contestant compiles in them.
        device: cpu, cuda or cuda:N.
        threads: Threads of torch on a CPU; 0 keeps torch's default.
        clock: wall, or cpu: CPU seconds of the process, all threads added up, also for the matrix product. On a busy
            machine measure with cpu and one thread.
        documents: Mean length of the documents in a row, which begin elsewhere in each step; 0: none. All contestants
            see the same tokens, those called masked attend within documents.
        lora_rank: Rank of the adapters that contestants called adapters train, those of transformers by peft; 0: none.
        contestants: A JSON list of contestants.
    """
    others = ADAPTER_CONTESTANTS if lora_rank else CONTESTANTS
    contestants = contestants or list(MASKED_CONTESTANTS if documents else others)
    config = LlamaConfig.preset(preset, max_seq_len=seq_len)
    args = (config, (batch_size, seq_len, documents), precision, device, threads, clock, lora_rank)
    workers = {name: _start(name, *args) for name in contestants}
    print(f"{_machine(device)}, torch {torch.__version__}")
    print(
        f"{preset}: {config.num_parameters():,} parameters, {batch_size} x {seq_len} tokens, {precision}, {device}"
    )
    for name in contestants:
        start = time.perf_counter()
        if failure := _measure(workers[name], warmup).failure:
            print(f"  {name} is out: {failure}", flush=True)
            workers.pop(name)
            continue
        print(f"  {name}: {warmup} first steps {time.perf_counter() - start:.1f} s", flush=True)
    results = {name: _Result() for name in workers}
    for i in range(rounds):
        # Begin with a different contestant in each round, so that none is always first or last.
        names = list(workers)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            results[name].add(_measure(workers[name], steps), steps * batch_size * seq_len)
    for pipe in workers.values():
        pipe.send(None)
    flops = {name: _flops(name, config, seq_len, lora_rank) for name in workers}
    _print_table(results, flops, peak_flops(torch.device(device), precision) if device != "cpu" else None)


@dataclass(frozen=True)
class Measurement:
    """A contestant's report: FLOP/s of a matrix product, seconds of its steps, its peak memory so far."""

    product_flops: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    failure: str = ""


@dataclass
class _Result:
    rates: list[float] = field(default_factory=list)
    product_flops: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def add(self, measurement: Measurement, tokens: int) -> None:
        self.rates.append(tokens / measurement.seconds)
        self.product_flops.append(measurement.product_flops)
        self.peak_bytes = measurement.peak_bytes

    def mfu(self, flops: int) -> float:
        return statistics.median(
            rate * flops / product for rate, product in zip(self.rates, self.product_flops, strict=True)
        )


def _flops(name: str, config: LlamaConfig, seq_len: int, lora_rank: int) -> int:
    """Return the operations a token of a contestant."""
    if not name.endswith("adapters"):
        return config.flops_per_token(seq_len)
    return LoraConfig(rank=lora_rank, alpha=1.0).flops_per_token(config, seq_len)


def _machine(device: str) -> str:
    return torch.cuda.get_device_name(device) if device != "cpu" else f"CPU {platform.machine()}"


def _print_table(results: dict[str, _Result], flops_of: dict[str, int], sheet_flops: float | None) -> None:
    product = statistics.median(rate for result in results.values() for rate in result.product_flops)
    print(f"matrix product {product / 1e9:,.0f} GFLOP/s", end="")
    for flops in sorted(set(flops_of.values())):
        print(f"; {flops / 1e6:,.0f} MFLOP a token, roofline {product / flops:,.0f} tok/s", end="")
    print()
    sheet = f"{'MFU of sheet':>14}" if sheet_flops else ""
    print(f"{'':24}{'tok/s':>9}{'spread':>9}{'MFU':>8}{sheet}{'peak MiB':>10}{'ratio':>8}")
    for name, result in results.items():
        rate, flops = statistics.median(result.rates), flops_of[name]
        spread = (max(result.rates) - min(result.rates)) / rate
        sheet = f"{rate * flops / sheet_flops:14.1%}" if sheet_flops else ""
        ratio = ""
        peer = (
            name.removesuffix(" masked") if name.endswith("masked") else name.replace("ours", "transformers")
        )
        theirs = results.get(peer)
        if theirs is not None and theirs is not result:
            # Ratios within a round cancel what slows the machine for minutes.
            pairs = zip(result.rates, theirs.rates, strict=True)
            ratio = f"{statistics.median(a / b for a, b in pairs):8.2f}"
        memory = f"{result.peak_bytes / 2**20:10,.0f}"
        print(f"{name:24}{rate:9,.0f}{spread:9.0%}{result.mfu(flops):8.1%}{sheet}{memory}{ratio}")


def _start(name: str, *args: Any) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_contestant, args=(theirs, name, *args), daemon=True).start()
    return ours


def _measure(pipe: Connection, steps: int) -> Measurement:
    pipe.send(steps)
    measurement: Measurement = pipe.recv()
    return measurement


def _contestant(
    pipe: Connection,
    name: str,
    config: LlamaConfig,
    shape: tuple[int, int, int],
    precision: Precision,
    device_name: str,
    threads: int,
    clock: str,
    lora_rank: int,
) -> None:
    """Take as many steps as the pipe asks for and report, until it sends None."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(device_name)
    system, mode, *kind = name.split()
    rank = lora_rank if kind == ["adapters"] else 0
    now = time.process_time if clock == "cpu" else time.perf_counter
    contestant: Contestant | None = None
    while (steps := pipe.recv()) is not None:
        try:
            started = contestant is not None
            if contestant is None:
                make = ours if system == "ours" else transformers
                contestant = make(config, precision, device, compiled=mode == "compiled", lora_rank=rank)
            batches = [random_batch(config.vocab_size, *shape) for _ in range(steps)]
            if kind != ["masked"]:
                batches = [Batch(batch.inputs, batch.targets) for batch in batches]
            if started and device.type == "cuda":
                contestant.move(device)
                # One step for the allocator to get its blocks back.
                contestant.step(batches[0])
            product_flops = matrix_product_flops(device, precision, now)
            start = now()
            for batch in batches:
                loss = contestant.step(batch)
            loss.item()
            pipe.send(Measurement(product_flops, now() - start, peak_memory_bytes(device)))
            if device.type == "cuda":
                contestant.move(torch.device("cpu"))
                torch.cuda.empty_cache()
        except torch.OutOfMemoryError as error:
            pipe.send(Measurement(failure=first_line(error)))
            return


def matrix_product_flops(device: torch.device, precision: Precision, now: Callable[[], float]) -> float:
    """Return the FLOP/s of the fastest of a few products of large square matrices."""
    size = GEMM_SIZE[device.type]
    # Random numbers, because a GPU multiplies ones faster than weights.
    a = torch.randn(size, size, device=device).to(torch.float32 if precision == "fp32" else torch.bfloat16)
    best = float("inf")
    for _ in range(6):
        start = now()
        # item() waits for the device.
        (a @ a)[0, 0].item()
        best = min(best, now() - start)
    return 2 * size**3 / best


if __name__ == "__main__":
    auto_cli(main)
