"""Text from a checkpoint: ``python jobs/generate.py --checkpoint REF --prompt "Once upon a time"``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from _cli import main, parse
from jsonargparse import ArgumentParser, Namespace

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling import SamplingParams
from llama_ray.model.checkpoint import load_config
from llama_ray.paths import existing
from llama_ray.pretrained import resolve

SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "intermediate_size",
    "max_seq_len",
)
DTYPES = ("float32", "bfloat16", "float16")


def run() -> None:
    """Reads the flags and prints the prompt and its continuation, piece by piece."""
    flags = parse(_parser())
    params = SamplingParams(
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
        seed=flags.seed,
        stop=tuple(flags.stop),
        repetition_penalty=flags.repetition_penalty,
        presence_penalty=flags.presence_penalty,
        frequency_penalty=flags.frequency_penalty,
        ignore_eos=flags.ignore_eos,
    )
    ref = flags.checkpoint
    directory = resolve(ref if ref.startswith("models:/") else existing(ref))
    _check_shape(flags, directory)
    engine = Engine.from_pretrained(
        directory,
        dtype=flags.dtype and getattr(torch, flags.dtype),
        device=flags.device,
        max_batch_size=1,
        seed=None,
    )
    prompt = sys.stdin.read().removesuffix("\n") if flags.prompt == "-" else flags.prompt
    _stream(engine, prompt, params)


def _stream(engine: Engine, prompt: str, params: SamplingParams) -> None:
    engine.submit(prompt, params)
    tokens, start = 0, time.perf_counter()
    print(prompt, end="", flush=True)
    try:
        while engine.has_work:
            for delta in engine.step():
                if delta.error is not None:
                    raise ValueError(delta.error)
                tokens += len(delta.token_ids)
                print(delta.text, end="", flush=True)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:  # also after Ctrl-C: the shell's next line is its own
        print(flush=True)
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr, flush=True)


def _check_shape(flags: Namespace, directory: Path) -> None:
    config = load_config(directory)
    for name in SHAPE:
        asked, stored = flags[name], getattr(config, name)
        if name == "num_kv_heads" and asked == 0:  # in training 0 means as many as num_heads
            asked = config.num_heads
        if asked not in (None, stored):
            raise ValueError(
                f"--{name} is {asked} but the checkpoint's is {stored}; leave the flag out, since the shape comes "
                "with the checkpoint, or give another checkpoint"
            )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="generate.py", description="Continues a prompt with a trained model.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="A directory, models:/name/version or models:/name@alias.")
    add("--prompt", required=True, help="The text to continue; - reads it from standard input.")
    add("--max_tokens", type=int, default=100, help="At most so many new tokens.")
    add("--temperature", type=float, default=0.8, help="0 always takes the most probable token.")
    add("--top_k", type=int, default=40, help="Keep the k most probable tokens; 0 keeps all.")
    add("--top_p", type=float, default=0.9, help="Keep the most probable tokens that reach this mass.")
    add("--min_p", type=float, default=0.0, help="Keep tokens with this share of the largest probability.")
    add("--seed", type=int, help="The same seed gives the same text; without one each call differs.")
    add("--stop", type=str, nargs="+", default=[], help="End where one of these strings would appear.")
    add(
        "--repetition_penalty", type=float, default=1.0, help="Above 1: fewer tokens that were there already."
    )
    add("--presence_penalty", type=float, default=0.0, help="Subtracted from logits of tokens in the output.")
    add("--frequency_penalty", type=float, default=0.0, help="The same, for each time a token occurred.")
    add("--ignore_eos", action="store_true", help="Go on after an end-of-text token.")
    add("--device", type=str, help="cpu, cuda or cuda:N; CUDA where there is one, if not given.")
    add("--dtype", choices=DTYPES, help="Compute in this type; the stored one if not given.")
    for name in SHAPE:
        add(f"--{name}", type=int, help="A check: the checkpoint's must be the same.")
    return parser


if __name__ == "__main__":
    main(run)
