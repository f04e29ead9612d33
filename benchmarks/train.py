"""Our training step beside transformers': same shape, data, precision, optimizer and batch, in alternating rounds.

    python benchmarks/train.py                         # the 33.7M model, 8 x 256 tokens, bf16
    python benchmarks/train.py --preset llama-3.2-1b --seq_len 4096 --batch_size 4 --device cuda

Each contestant lives in a process of its own, so that its peak memory is its own. They take turns at short rounds,
which begin with a large matrix product: other work on the machine slows all of them alike, and medians and ratios
survive it. MFU counts 6 N + 12 L d s operations a token (attention not halved) against the rate of that product.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from llama_ray.model.config import LlamaConfig
from llama_ray.model.hf_config import to_hf
from llama_ray.model.llama import Llama
from llama_ray.training.config import Precision, TrainConfig
from llama_ray.training.layout import ALONE
from llama_ray.training.metrics import peak_memory_bytes
from llama_ray.training.optimizer import build_optimizer
from llama_ray.training.parallel import parallelize
from llama_ray.training.step import Stepper

CONTESTANTS = ("ours eager", "ours compiled", "transformers eager", "transformers compiled")
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
    contestants: list[str] = list(CONTESTANTS),  # noqa: B006  # read only
) -> None:
    """Print tokens/s, MFU, peak memory and the ratios between the contestants.

    Args:
        preset: A preset of LlamaConfig.
        batch_size: Sequences per step.
        seq_len: Tokens per sequence.
        precision: bf16 or fp32.
        rounds: How often each contestant takes its turn.
        steps: Optimizer steps per turn.
        warmup: Steps before the first turn; a compiled contestant compiles in them.
        device: cpu, cuda or cuda:N.
        threads: Of torch on a CPU; 0 leaves torch's choice.
        clock: wall, or cpu: seconds that the process was computing, all threads added up. With one thread that is
            the way to measure on a machine that others load, and the product's rate is measured likewise.
        contestants: Who takes part.
    """
    config = LlamaConfig.preset(preset, max_seq_len=seq_len)
    flops = config.flops_per_token(seq_len)
    args = (config, batch_size, seq_len, precision, device, threads, clock)
    workers = {name: _start(name, *args) for name in contestants}
    print(
        f"{preset}: {config.num_parameters():,} parameters, {batch_size} x {seq_len} tokens, {precision}, {device}"
    )
    for name, pipe in workers.items():
        start = time.perf_counter()
        _ask(pipe, warmup)
        print(f"  {name}: {warmup} first steps {time.perf_counter() - start:.1f} s", flush=True)
    gemm: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    shares: dict[str, list[float]] = {name: [] for name in contestants}
    memory = {}
    for i in range(rounds):
        # A different one starts each round: none is always measured first or last.
        for name in contestants[i % len(contestants) :] + contestants[: i % len(contestants)]:
            peak, seconds, memory[name] = _ask(workers[name], steps)
            rate = steps * batch_size * seq_len / seconds
            gemm.append(peak)
            rates[name].append(rate)
            shares[name].append(rate * flops / peak)
    for pipe in workers.values():
        pipe.send(None)
    peak = statistics.median(gemm)
    print(f"matrix product {peak / 1e9:,.0f} GFLOP/s; {flops / 1e6:,.0f} MFLOP a token, so at best", end=" ")
    print(f"{peak / flops:,.0f} tok/s")
    print(f"{'':24}{'tok/s':>9}{'spread':>9}{'MFU':>8}{'peak MiB':>10}")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, rate in medians.items():
        spread = (max(rates[name]) - min(rates[name])) / rate
        share = statistics.median(shares[name])
        print(f"{name:24}{rate:9,.0f}{spread:9.0%}{share:8.1%}{memory[name] / 2**20:10,.0f}")
    for kind in ("eager", "compiled"):
        ours, theirs = f"ours {kind}", f"transformers {kind}"
        if ours in rates and theirs in rates:
            # Neighbours in time are compared first: what slows the machine for minutes falls out of each ratio.
            ratio = statistics.median(a / b for a, b in zip(rates[ours], rates[theirs], strict=True))
            print(f"{ours} / {theirs}: {ratio:.2f}")


def _start(name: str, *args: Any) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_contestant, args=(theirs, name, *args), daemon=True).start()
    return ours


def _ask(pipe: Connection, steps: int) -> Any:
    pipe.send(steps)
    return pipe.recv()


def _contestant(
    pipe: Connection,
    name: str,
    config: LlamaConfig,
    batch_size: int,
    seq_len: int,
    precision: Precision,
    device_name: str,
    threads: int,
    clock: str,
) -> None:
    """Wait for a number of steps; answer (FLOP/s of a matrix product, seconds that the steps took, peak bytes)."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device(device_name)
    who, kind = name.split()
    make = ours if who == "ours" else transformers
    step = make(config, precision, device, compiled=kind == "compiled")
    tokens = torch.randint(config.vocab_size, (batch_size, seq_len + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    now = time.process_time if clock == "cpu" else time.perf_counter
    while (steps := pipe.recv()) is not None:
        peak = matrix_product_flops(device, precision, now)
        start = now()
        for _ in range(steps):
            loss = step(inputs, targets)
        loss.item()
        pipe.send((peak, now() - start, peak_memory_bytes(device)))


def matrix_product_flops(device: torch.device, precision: Precision, now: Callable[[], float]) -> float:
    """FLOP/s of the best of a few products of two large square matrices."""
    size = GEMM_SIZE[device.type]
    a = torch.ones(size, size, device=device, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    best = float("inf")
    for _ in range(6):
        start = now()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, now() - start)
    return 2 * size**3 / best


Step = Callable[[Tensor, Tensor], Tensor]


def ours(config: LlamaConfig, precision: Precision, device: torch.device, *, compiled: bool) -> Step:
    """One optimizer step as the training loop takes it."""
    train = TrainConfig(precision=precision)
    model = parallelize(Llama(config, device="meta"), train, ALONE, device, compile_blocks=compiled)
    stepper = Stepper(model, build_optimizer(model, train), train, device=device)
    return lambda inputs, targets: stepper.step([(inputs, targets)]).loss


def transformers(config: LlamaConfig, precision: Precision, device: torch.device, *, compiled: bool) -> Step:
    """One step of the usual loop around LlamaForCausalLM: its own loss, autocast, clipping, fused AdamW."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    train = TrainConfig(precision=precision)
    plain = (
        LlamaForCausalLM(
            HFConfig(**to_hf(config, dtype="float32", bos_id=None, eos_id=None), attn_implementation="sdpa")
        )
        .float()
        .to(device)
    )
    plain.config.use_cache = False
    model = torch.compile(plain) if compiled else plain
    optimizer = build_optimizer(plain, train)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss: Tensor = model(input_ids=inputs, labels=targets, shift_labels=targets).loss
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(plain.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


if __name__ == "__main__":
    auto_cli(main)
