"""The GPU scenarios: the memory bandwidth that one request reaches, and many requests beside transformers."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from llama_ray import Engine
from llama_ray.generation.backends.prepare import prepare
from llama_ray.model.checkpoint import hf_name
from llama_ray.model.config import LlamaConfig
from llama_ray.model.hf_config import to_hf
from llama_ray.model.llama import Llama
from peers import roofline, weights, workload
from peers.ours import Ours
from peers.workload import Sampling

PROMPT, NEW = 128, 128


def run(rounds: int) -> None:
    """Run both scenarios on the first device."""
    device = torch.device("cuda")
    alone(rounds, device)
    torch.cuda.empty_cache()
    crowd(rounds, device)


def alone(rounds: int, device: torch.device, preset: str = "llama-2-7b") -> None:
    """Decode one request on a 7B model in bf16: every token reads the weights and the cache once."""
    config = LlamaConfig.preset(preset)
    ours = _InProcess(weights.random_model(config, device), max_seq_len=PROMPT + NEW)
    rates, figures = [], []
    for i in range(-2, rounds):
        prompts = workload.prompts(1, PROMPT, config.vocab_size, seed=i)
        rates.append(roofline.measure(device))
        # The difference between a long and a short output is decoding alone, without the prompt.
        short, long = (ours.seconds(prompts, n) for n in (NEW // 4, NEW))
        if i >= 0:
            figures.append((NEW - NEW // 4) / (long - short))
    median = roofline.median(rates)
    blocks, head = roofline.matrix_weights(config)
    read = 2 * (blocks + head) + (PROMPT + NEW * 5 / 8) * roofline.cache_bytes(config)
    rate = statistics.median(figures)
    print(f"\none request, {preset} in bf16: {read / 1e9:.2f} GB a token; {rounds} rounds")
    print(
        f"copy {median.bandwidth / 1e12:.2f} TB/s, so the roofline is {median.bandwidth / read:,.1f} tok/s\n"
    )
    print("| one request | tok/s | TB/s | of the copy bandwidth |\n|---|---|---|---|")
    print(f"| ours bf16 | {rate:,.1f} | {rate * read / 1e12:.2f} | {rate * read / median.bandwidth:.0%} |")


def crowd(rounds: int, device: torch.device, preset: str = "llama-3.2-1b", requests: int = 256) -> None:
    """Run many requests at once on a 1B model, beside transformers' `generate` at its best batch size."""
    config = LlamaConfig.preset(preset)
    model = weights.random_model(config, device)
    theirs = _transformers(model)
    ours = _InProcess(model, max_seq_len=PROMPT + NEW, max_num_seqs=requests)
    _check_same_model(ours, theirs, config)
    batch = _best_batch(theirs, config, requests)
    rates = []
    seconds: dict[str, list[float]] = {"ours bf16": [], f"transformers bf16, batches of {batch}": []}
    for i in range(-1, rounds):
        prompts = workload.prompts(requests, PROMPT, config.vocab_size, seed=i)
        rates.append(roofline.measure(device))
        mine = ours.seconds(prompts, NEW)
        other = sum(theirs.seconds(prompts[j : j + batch], NEW) for j in range(0, requests, batch))
        if i >= 0:
            for values, took in zip(seconds.values(), (mine, other), strict=True):
                values.append(took)
    median = roofline.median(rates)
    bound = requests * NEW / roofline.batch_s(config, median, "bf16", requests, PROMPT, NEW)
    print(f"{requests} requests of {PROMPT} + {NEW} tokens, {preset} in bf16; {rounds} rounds")
    print(f"copy {median.bandwidth / 1e12:.2f} TB/s, product {median.product['bf16'] / 1e12:,.0f} TFLOP/s\n")
    print(f"| {requests} requests | tok/s | roofline | of roofline | ratio |\n|---|---|---|---|---|")
    theirs_s = list(seconds.values())[1]
    for name, values in seconds.items():
        rate = requests * NEW / statistics.median(values)
        ratio = statistics.median(b / a for a, b in zip(values, theirs_s, strict=True))
        print(f"| {name} | {rate:,.0f} | {bound:,.0f} | {rate / bound:.0%} | {ratio:.2f} |")


def _check_same_model(ours: Any, theirs: Any, config: LlamaConfig) -> None:
    """Raise RuntimeError if the log-probabilities of the two differ by more than rounding explains."""
    prompt = workload.prompts(1, 48, config.vocab_size, seed=0)[0]
    reference, got = theirs.logprobs(prompt), ours.logprobs(prompt)
    off = statistics.fmean((v - reference[i]) ** 2 for i, v in got.items()) ** 0.5
    off /= statistics.pstdev(reference.values())
    print(f"\nlog-probabilities of ours and transformers differ by {off:.4f} deviations")
    if off > 0.1:
        raise RuntimeError(f"ours and transformers compute different models: {off:.3f} is above 0.1")


def _best_batch(theirs: Any, config: LlamaConfig, requests: int) -> int:
    """Return the batch size at which transformers generates most tokens a second."""
    rates = {}
    for batch in (requests // 8, requests // 4, requests // 2, requests):
        prompts = workload.prompts(batch, PROMPT, config.vocab_size, seed=batch)
        theirs.seconds(prompts, 8)
        rates[batch] = batch / theirs.seconds(prompts, NEW)
    return max(rates, key=lambda batch: rates[batch])


class _Timed:
    """Adds `seconds`: the time in which `generate` gives every prompt its new tokens."""

    device: torch.device

    def seconds(self: Any, prompts: list[list[int]], new_tokens: int) -> float:
        roofline.wait(self.device)
        start = time.perf_counter()
        outputs = self.generate(prompts, new_tokens, Sampling())
        roofline.wait(self.device)
        took = time.perf_counter() - start
        if any(len(o) != new_tokens for o in outputs):
            raise RuntimeError(f"outputs have {[len(o) for o in outputs]} tokens, not {new_tokens} each")
        return took


class _InProcess(_Timed, Ours):
    """Our engine on a model that is on the device already, so that 13 GB need not pass through a file."""

    def __init__(self, model: Llama, **options: Any) -> None:
        self.device = model.embed_tokens.weight.device
        # As from_pretrained does. This replaces layers of `model`: copy its weights before, if needed elsewhere.
        self.engine = Engine(prepare(model), None, **options)


def _transformers(model: Llama) -> Any:
    """Build LlamaForCausalLM with copies of our weights, on their device."""
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    from peers.huggingface import HuggingFace

    class OnDevice(_Timed, HuggingFace):
        def __init__(self) -> None:
            described = HFConfig(**to_hf(model.config, dtype="bfloat16", bos_id=None, eos_id=None))
            described._attn_implementation = "sdpa"
            self.device = model.embed_tokens.weight.device
            with self.device:
                self.model = LlamaForCausalLM(described).to(torch.bfloat16).eval()
            state = {hf_name(name): weight for name, weight in model.state_dict().items()}
            missing, unexpected = self.model.load_state_dict(state, strict=False)
            if unexpected or set(missing) - {"lm_head.weight"}:
                raise RuntimeError(
                    f"transformers' model lacks weights for {missing} and does not know {unexpected}"
                )
            self.model.tie_weights()

    return OnDevice()
