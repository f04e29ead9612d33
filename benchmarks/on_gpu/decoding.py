"""Decoding and prefill by our engine: tokens a second, as a share of what bandwidth and products allow."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peers import roofline, weights, workload

from llama_ray import Engine, SamplingParams
from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.backends.prepare import plain_backend, prepare
from llama_ray.generation.backends.quantize import Quantization
from llama_ray.generation.backends.runner import Span
from llama_ray.model.config import LlamaConfig
from on_gpu import ceilings
from on_gpu.results import Results
from on_gpu.setting import Setting
from on_gpu.timing import free, median_s, wait, wall_s

PROMPT, LENGTH = 128, 2048
BANDWIDTH, ROOFLINE = "copy bandwidth", "the roofline"
SAMPLED = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, ignore_eos=True)


def decode(setting: Setting, results: Results) -> None:
    """1, 32 and 256 requests on 1.1B and 7B, in bf16 and int8: whole engine steps, and the model alone."""
    for name in ("1.1B", "7B"):
        for quantization in (None, "int8"):
            config = setting.config(name, max_seq_len=setting.size(LENGTH, 96))
            with _backend(setting, config, quantization) as backend:
                for batch in (1, 32, 256):
                    _decode(setting, results, name, quantization, backend, setting.size(batch, 2))


def decode_peer(setting: Setting, results: Results) -> None:
    """Transformers' generate in its best batch on 1.1B, and with one request on 7B."""
    mine = Results(setting.out, "decode")
    for name, batches, ours in (("1.1B", (64, 128, 256), 256), ("7B", (1,), 1)):
        config = setting.config(name, max_seq_len=setting.size(LENGTH, 96))
        model = _transformers(setting, config)
        rates = {b: _generated(setting, model, config, setting.size(b, 2)) for b in batches}
        best = max(rates, key=lambda b: rates[b])
        note = ", ".join(f"{rate:,.0f} in batches of {b}" for b, rate in rates.items())
        results.add(f"{name} bf16, transformers' generate", rates[best], "tok/s", note=note)
        rate = mine.value("decode", f"{name} bf16, {setting.size(ours, 2)} requests")
        if rate:
            results.add(f"{name} bf16, {ours} requests, ours / transformers", rate / rates[best], "x")
        del model
        free(setting.device)


def prefill(setting: Setting, results: Results) -> None:
    """8 prompts of 2048 tokens on 1.1B and 7B, in bf16 and int8."""
    rates = ceilings.rates(setting)
    count, length = setting.size(8, 2), setting.size(2048, 64)
    for name in ("1.1B", "7B"):
        config = setting.config(name, max_seq_len=length + 32)
        for quantization in (None, "int8"):
            with _backend(setting, config, quantization) as backend:
                engine = Engine(backend, None, max_num_seqs=count, enable_prefix_caching=False)
                took = _prefill_s(setting, engine, count, length)
                kind = quantization or "bf16"
                best = roofline.prompts_s(config, rates, kind, [length] * count)
                results.add(
                    f"{name} {kind}, {count} x {length}",
                    count * length / took,
                    "tok/s",
                    best / took,
                    ROOFLINE,
                )
                del engine


def _prefill_s(setting: Setting, engine: Engine, count: int, length: int) -> float:
    """Return the median seconds in which `count` prompts of `length` tokens get their first token."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    times = []
    for seed in range(4):
        prompts = workload.prompts(count, length, engine.config.vocab_size, seed)
        times.append(wall_s(partial(engine.generate, prompts, params), setting.device))
    return statistics.median(times[1:])


def long_context(setting: Setting, results: Results) -> None:
    """One request with 16k tokens of context, on 1.1B and 7B."""
    context = setting.size(16384, 200)
    for name in ("1.1B", "7B"):
        config = setting.config(name, max_seq_len=context + 128)
        with _backend(setting, config, None) as backend:
            _decode(setting, results, name, None, backend, 1, context)


def _decode(
    setting: Setting,
    results: Results,
    name: str,
    quantization: Quantization | None,
    backend: Backend,
    batch: int,
    prompt: int | None = None,
) -> None:
    config, kind, rates = backend.model.config, quantization or "bf16", ceilings.rates(setting)
    prompt = prompt or setting.size(PROMPT, 16)
    steps = setting.size(48, 4)
    case = f"{name} {kind}, {batch} request{'s' * (batch > 1)}" + (f" of {prompt}" if prompt > PROMPT else "")
    engine = Engine(
        backend, None, max_num_seqs=batch, max_seq_len=prompt + 2 * steps, enable_prefix_caching=False
    )
    params = replace(SAMPLED, max_tokens=2 * steps)
    for tokens in workload.prompts(batch, prompt, config.vocab_size, seed=batch):
        engine.submit(tokens, params)
    generated = 0
    # All prompts, and some steps in which graphs are captured.
    while generated < batch * (steps // 2):
        generated += sum(len(delta.token_ids) for delta in engine.step())
    wait(setting.device)
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    seconds = (time.perf_counter() - start) / steps
    engine.close()
    del engine
    model_s = _model_alone_s(setting, backend, batch, prompt + steps)
    read, least = _least(config, rates, kind, batch, prompt + steps)
    note = f"{1000 * seconds:.2f} ms a step, model alone {1000 * model_s:.2f} ms"
    if batch == 1:
        share, ceiling = read / seconds / rates.bandwidth, BANDWIDTH
        note += f" ({read / model_s / rates.bandwidth:.0%})"
    else:
        share, ceiling = least / seconds, ROOFLINE
        note += f" ({least / model_s:.0%})"
    results.add(case, batch / seconds, "tok/s", share, ceiling, note)


def _least(
    config: LlamaConfig, rates: roofline.Rates, kind: str, batch: int, context: int
) -> tuple[float, float]:
    """Return the bytes that a step reads, and the least seconds that it can take."""
    blocks, head = roofline.matrix_weights(config)
    read = (blocks + head) * roofline.WEIGHT_BYTES[kind] + batch * context * roofline.cache_bytes(config)
    return read, roofline.step_s(config, rates, kind, batch, context)


def _model_alone_s(setting: Setting, backend: Backend, batch: int, context: int) -> float:
    """Return the seconds of a decoding step without scheduler and sampler: copy the batch, replay, compute logits."""
    width = -(-(context + 1) // backend.block_size)
    runner = backend.make_runner(1 + batch * width, batch, width * backend.block_size)
    spans = [Span(context, [5], list(range(1 + i * width, 1 + (i + 1) * width)), [0]) for i in range(batch)]
    step = runner.batch(spans)
    with torch.inference_mode():
        return median_s(lambda: runner.forward(step), setting.device, setting.size(20, 3))


@contextmanager
def _backend(setting: Setting, config: LlamaConfig, quantization: Quantization | None) -> Iterator[Backend]:
    """Yield a random model in its fastest form; its memory is free afterwards."""
    free(setting.device)
    model = weights.random_model(config, setting.device)
    # A trial must not compile the CPU's kernels.
    yield plain_backend(model) if setting.tiny else prepare(model, quantization)


def _transformers(setting: Setting, config: LlamaConfig) -> Any:
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    from llama_ray.model.hf_config import to_hf

    described = HFConfig(**to_hf(config, dtype="bfloat16", bos_id=None, eos_id=None))
    described._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with setting.device:
            return LlamaForCausalLM(described).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def _generated(setting: Setting, model: Any, config: LlamaConfig, batch: int) -> float:
    """Return the tokens a second of decoding alone: the difference between a long and a short output."""
    from transformers import GenerationConfig

    prompt, short, long = setting.size(PROMPT, 16), setting.size(4, 2), setting.size(28, 6)
    ids = torch.tensor(workload.prompts(batch, prompt, config.vocab_size, seed=1), device=setting.device)

    def generate(new_tokens: int) -> None:
        options = GenerationConfig(
            do_sample=True,
            temperature=SAMPLED.temperature,
            top_k=SAMPLED.top_k,
            top_p=SAMPLED.top_p,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=new_tokens,
        )
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
        if out.shape[1] != prompt + new_tokens:
            raise RuntimeError(f"transformers gave {out.shape[1] - prompt} tokens, not {new_tokens}")

    generate(short)
    a, b = (wall_s(partial(generate, n), setting.device) for n in (short, long))
    return batch * (long - short) / (b - a)
