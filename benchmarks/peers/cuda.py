"""On a GPU: how much of the memory bandwidth one request gets, and a crowd of requests beside transformers."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from llama_ray import Engine
from llama_ray.generation.prepare import prepare
from llama_ray.model.checkpoint import hf_name
from llama_ray.model.config import LlamaConfig
from llama_ray.model.hf_config import to_hf
from llama_ray.model.llama import Llama
from peers import floor, weights, workload
from peers.ours import Ours
from peers.workload import Sampling

PROMPT, NEW = 128, 128


def run(rounds: int) -> None:
    """Both scenarios, on the first device."""
    device = torch.device("cuda")
    alone(rounds, device)
    torch.cuda.empty_cache()
    crowd(rounds, device)


def alone(rounds: int, device: torch.device, preset: str = "llama-2-7b") -> None:
    """One request on a 7B model in bf16: the weights and the cache are read once for every token."""
    config = LlamaConfig.preset(preset)
    ours = _InProcess(weights.random_model(config, device), max_seq_len=PROMPT + NEW)
    rates, figures = [], []
    for i in range(-2, rounds):
        prompts = workload.prompts(1, PROMPT, config.vocab_size, seed=i)
        rates.append(floor.measure(device))
        # Two lengths of output: their difference is decoding alone, without the prompt.
        short, long = (ours.seconds(prompts, n) for n in (NEW // 4, NEW))
        if i >= 0:
            figures.append((NEW - NEW // 4) / (long - short))
    middle = floor.median(rates)
    blocks, head = floor.matrix_weights(config)
    read = 2 * (blocks + head) + (PROMPT + NEW * 5 / 8) * floor.cache_bytes(config)
    rate = statistics.median(figures)
    print(f"\none request, {preset} in bf16: {read / 1e9:.2f} GB a token; {rounds} rounds")
    print(f"copy {middle.bandwidth / 1e12:.2f} TB/s, so at best {middle.bandwidth / read:,.1f} tok/s\n")
    print("| one request | tok/s | TB/s | of the copy bandwidth |\n|---|---|---|---|")
    print(f"| ours bf16 | {rate:,.1f} | {rate * read / 1e12:.2f} | {rate * read / middle.bandwidth:.0%} |")


def crowd(rounds: int, device: torch.device, preset: str = "llama-3.2-1b", requests: int = 256) -> None:
    """Many requests at once on a 1B model, beside transformers' generate in its best batch."""
    config = LlamaConfig.preset(preset)
    model = weights.random_model(config, device)
    theirs = _transformers(model)
    ours = _InProcess(model, max_seq_len=PROMPT + NEW, max_num_seqs=requests)
    prompt = workload.prompts(1, 48, config.vocab_size, seed=0)[0]
    reference, got = theirs.logprobs(prompt), ours.logprobs(prompt)
    off = statistics.fmean((v - reference[i]) ** 2 for i, v in got.items()) ** 0.5
    off /= statistics.pstdev(reference.values())
    print(f"\nours and transformers differ by {off:.4f} of the log-probabilities' deviation")
    if off > 0.1:
        raise RuntimeError("the two compute different models")
    rates, best = [], {}
    for batch in (requests // 8, requests // 4, requests // 2, requests):
        prompts = workload.prompts(batch, PROMPT, config.vocab_size, seed=batch)
        theirs.seconds(prompts, 8)
        best[batch] = batch / theirs.seconds(prompts, NEW)
    batch = max(best, key=lambda b: best[b])
    seconds: dict[str, list[float]] = {"ours bf16": [], f"transformers bf16, batches of {batch}": []}
    for i in range(-1, rounds):
        prompts = workload.prompts(requests, PROMPT, config.vocab_size, seed=i)
        rates.append(floor.measure(device))
        mine = ours.seconds(prompts, NEW)
        other = sum(theirs.seconds(prompts[j : j + batch], NEW) for j in range(0, requests, batch))
        if i >= 0:
            for values, took in zip(seconds.values(), (mine, other), strict=True):
                values.append(took)
    middle = floor.median(rates)
    bound = requests * NEW / floor.batch_s(config, middle, "bf16", requests, PROMPT, NEW)
    print(f"{requests} requests of {PROMPT} + {NEW} tokens, {preset} in bf16; {rounds} rounds")
    print(f"copy {middle.bandwidth / 1e12:.2f} TB/s, product {middle.product['bf16'] / 1e12:,.0f} TFLOP/s\n")
    print(f"| {requests} requests | tok/s | roofline | of that | ratio |\n|---|---|---|---|---|")
    theirs_s = list(seconds.values())[1]
    for name, values in seconds.items():
        rate = requests * NEW / statistics.median(values)
        ratio = statistics.median(b / a for a, b in zip(values, theirs_s, strict=True))
        print(f"| {name} | {rate:,.0f} | {bound:,.0f} | {rate / bound:.0%} | {ratio:.2f} |")


class _Timed:
    """Adds the seconds that `generate` takes until every prompt has its new tokens."""

    device: torch.device

    def seconds(self: Any, prompts: list[list[int]], new_tokens: int) -> float:
        floor.wait(self.device)
        start = time.perf_counter()
        outputs = self.generate(prompts, new_tokens, Sampling())
        floor.wait(self.device)
        took = time.perf_counter() - start
        if any(len(o) != new_tokens for o in outputs):
            raise RuntimeError(f"outputs have other lengths than {new_tokens}")
        return took


class _InProcess(_Timed, Ours):
    """Our engine on a model that is on the device already: 13 GB need not pass through a file."""

    def __init__(self, model: Llama, **options: Any) -> None:
        self.device = model.embed_tokens.weight.device
        # What from_pretrained does; the layers of `model` are replaced, so its weights must have been copied by now.
        self.engine = Engine(prepare(model), None, **options)


def _transformers(model: Llama) -> Any:
    """LlamaForCausalLM with copies of our weights, on their device."""
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
                raise RuntimeError(f"transformers' model lacks {missing} and does not know {unexpected}")
            self.model.tie_weights()

    return OnDevice()
