"""Requests with adapters beside requests without: tokens a second of one engine, and of peft on transformers.

    python benchmarks/lora_serving.py                         # 2 minutes on 2 cores
    python benchmarks/lora_serving.py --peft true --rounds 1  # with peft, which needs peft and transformers

A model of 134M random parameters in bfloat16, and 8 adapters of all its linear layers. Every line is a batch of
requests, greedy, 64 tokens of prompt and 64 of output each; lines alternate, and medians are printed. The line without
adapters is the floor: what merged weights would give, for one adapter at a time. peft takes the adapter of each row in
`generate(adapter_names=...)`.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from jsonargparse import auto_cli

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.adapter_files import save_adapter
from llama_ray.model.config import LlamaConfig
from llama_ray.model.llama import Llama
from llama_ray.model.lora_config import TARGETS, LoraConfig, linear_sizes
from llama_ray.model.stored_model import open_model
from llama_ray.model.weights_hash import weights_hash
from llama_ray.pretrained import save_pretrained

PROMPT, OUTPUT = 64, 64
ADAPTERS = 8


def main(rounds: int = 5, rank: int = 16, threads: int = 2, requests: int = 32, peft: bool = False) -> None:
    """Print tokens a second.

    Args:
        rounds: Measurements of each line.
        rank: Rank of the adapters.
        threads: Threads of torch and of the kernels.
        requests: Requests of a full batch.
        peft: Measure peft on transformers, too.
    """
    torch.set_num_threads(threads)
    config = LlamaConfig.preset("llama-110m")
    rng = random.Random(0)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(PROMPT)] for _ in range(requests)]
    mixed = [f"adapter{i % ADAPTERS}" for i in range(requests)]
    half = [name if i % 2 else None for i, name in enumerate(mixed)]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        save_pretrained(Llama(config, dtype=torch.bfloat16), None, root / "base")
        with ExitStack() as stack:
            base = weights_hash(open_model(root / "base", stack))
        refs = {f"adapter{i}": save_random_adapter(root, config, rank, i, base) for i in range(ADAPTERS)}
        engine = Engine.from_pretrained(root / "base", adapters=refs, enable_prefix_caching=False)
        lines: dict[str, tuple[int, Callable[[], object]]] = {
            "1 request, no adapter": (1, lambda: run(engine, prompts[:1], [None])),
            "1 request, 1 adapter": (1, lambda: run(engine, prompts[:1], mixed[:1])),
            f"{requests} requests, no adapter": (requests, lambda: run(engine, prompts, [None] * requests)),
            f"{requests} requests, 1 adapter": (requests, lambda: run(engine, prompts, mixed[:1] * requests)),
            f"{requests} requests, half of them with {ADAPTERS} adapters": (
                requests,
                lambda: run(engine, prompts, half),
            ),
            f"{requests} requests, {ADAPTERS} adapters": (requests, lambda: run(engine, prompts, mixed)),
        }
        if peft:
            model = peft_model(root / "base", refs)
            lines["peft, 1 adapter"] = (requests, lambda: run_peft(model, prompts, mixed[:1] * requests))
            lines[f"peft, {ADAPTERS} adapters"] = (requests, lambda: run_peft(model, prompts, mixed))
        report(lines, rounds)


def report(lines: dict[str, tuple[int, Callable[[], object]]], rounds: int) -> None:
    """Run all lines in turn, and print the median of each."""
    took: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(rounds):
        for name, (_, measured) in lines.items():
            start = time.perf_counter()
            measured()
            took[name].append(time.perf_counter() - start)
    for name, (count, _) in lines.items():
        print(f"{name}: {count * OUTPUT / statistics.median(took[name]):.0f} tok/s", flush=True)


def run(engine: Engine, prompts: list[list[int]], adapters: list[str | None]) -> None:
    """Generate with our engine."""
    params = SamplingParams(max_tokens=OUTPUT, temperature=0, ignore_eos=True)
    engine.generate(prompts, params, adapter=adapters)


def peft_model(base: Path, adapters: dict[str, Path]) -> object:
    """Load the base model and the adapters with peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    first, *others = adapters.items()
    model = PeftModel.from_pretrained(whole, first[1], adapter_name=first[0], autocast_adapter_dtype=False)
    for name, directory in others:
        model.load_adapter(directory, adapter_name=name, autocast_adapter_dtype=False)
    return model.eval()


@torch.inference_mode()
def run_peft(model: object, prompts: list[list[int]], adapters: list[str]) -> None:
    """Generate with peft."""
    ids = torch.tensor(prompts)
    model.generate(  # type: ignore[attr-defined]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        adapter_names=adapters,
        max_new_tokens=OUTPUT,
        min_new_tokens=OUTPUT,
        do_sample=False,
        pad_token_id=0,
    )


def save_random_adapter(root: Path, config: LlamaConfig, rank: int, seed: int, base_weights: str) -> Path:
    """Save an adapter of all linear layers; return its directory."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(config.num_layers):
        for target, (inputs, outputs) in linear_sizes(config).items():
            room = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            factors[f"model.layers.{layer}.{room}.{target}.weight"] = (
                (torch.randn(rank, inputs, generator=generator) * inputs**-0.5).bfloat16(),
                (torch.randn(outputs, rank, generator=generator) * 0.01).bfloat16(),
            )
    lora = LoraConfig(rank=rank, alpha=2 * rank, targets=TARGETS)
    directory = root / f"adapter{seed}"
    save_adapter(directory, lora, factors, base=str(root / "base"), base_weights=base_weights)
    return directory


if __name__ == "__main__":
    auto_cli(main)
