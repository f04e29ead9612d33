"""Text from a checkpoint: ``python jobs/generate.py --checkpoint REF --prompt "Once upon a time"``.

With ``--input prompts.jsonl --output out.jsonl`` for many prompts, over the cluster (``docs/generation.md``).
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _cli import main, parse, read_bytes
from jsonargparse import ArgumentParser, Namespace

from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.checkpoint import load_config
from llama_ray.pretrained import resolve
from llama_ray.storage.paths import absolute, existing, existing_ref

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


BATCH_ONLY = ("output", "prompt_field", "replicas", "max_num_seqs", "overwrite")
"""Flags that mean nothing for a single prompt."""


def run() -> None:
    """Reads the flags and prints the prompt and its continuation, piece by piece, or answers a file of prompts."""
    parser = _parser()
    flags = parse(parser)
    _check_mode(flags, parser)
    params = SamplingParams(
        max_tokens=flags.max_tokens,
        min_tokens=flags.min_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
        seed=None if flags.input else flags.seed,
        stop=tuple(flags.stop),
        repetition_penalty=flags.repetition_penalty,
        presence_penalty=flags.presence_penalty,
        frequency_penalty=flags.frequency_penalty,
        ignore_eos=flags.ignore_eos,
        json_schema=None if flags.json_schema is None else _read_schema(flags.json_schema),
        regex=flags.regex,
    )
    ref = flags.checkpoint
    directory = resolve(existing_ref(ref))
    _check_shape(flags, directory)
    if flags.input:
        _batch(flags, params)
        return
    engine = Engine.from_pretrained(
        directory,
        dtype=flags.dtype and getattr(torch, flags.dtype),
        device=flags.device,
        max_num_seqs=1,
        seed=None,
        **asdict(_engine_options(flags)),
    )
    prompt = sys.stdin.read().removesuffix("\n") if flags.prompt == "-" else flags.prompt
    with engine:
        _stream(engine, prompt, params)


def _check_mode(flags: Namespace, parser: ArgumentParser) -> None:
    if (flags.prompt is None) == (flags.input is None):
        raise ValueError("give either --prompt, or --input and --output")
    if flags.input is not None and flags.output is None:
        raise ValueError("--input needs --output, the .jsonl file that the answers go to")
    unused = [name for name in BATCH_ONLY if flags[name] != parser.get_default(name)]
    if flags.input is None and unused:
        raise ValueError(f"--{unused[0]} belongs to --input; leave it out with --prompt")


def _batch(flags: Namespace, params: SamplingParams) -> None:
    # a single prompt need not wait for Ray
    import ray

    from llama_ray.batch_inference.config import BatchConfig
    from llama_ray.batch_inference.job import BatchJob

    ref = flags.checkpoint
    job = BatchJob(
        BatchConfig(
            checkpoint=existing_ref(ref),
            input=existing(flags.input),
            output=absolute(flags.output),
            params=params,
            seed=flags.seed,
            prompt_field=flags.prompt_field,
            replicas=flags.replicas,
            device=flags.device,
            dtype=flags.dtype,
            max_num_seqs=flags.max_num_seqs,
            engine=_engine_options(flags),
            overwrite=flags.overwrite,
        )
    )
    if job.finished is not None:
        print(f"{job.output.location} is complete already ({job.finished.rows:,} rows): nothing to do")
        return
    if job.remaining:
        ray.init(log_to_driver=False)
    line = ProgressLine()
    job.run(log=line.log, progress=line.show)


class ProgressLine:
    """One line that is written over on a terminal; in a log, a line every few seconds."""

    EVERY_S = 5.0

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._open = False
        self._last = -self.EVERY_S

    def show(self, text: str) -> None:
        """Replaces the line."""
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", flush=True)
            self._open = True
        elif time.monotonic() - self._last >= self.EVERY_S:
            print(text, flush=True)
            self._last = time.monotonic()

    def log(self, text: str) -> None:
        """A line that stays."""
        if self._open:
            print()
            self._open = False
        print(text, flush=True)


def _read_schema(text: str) -> dict[str, Any]:
    """The JSON schema that the flag is, or that the file it names holds. Raises ValueError."""
    try:
        schema = json.loads(text if text.lstrip().startswith("{") else Path(existing(text)).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--json_schema is {text[:80]!r}; give a JSON object or a file of one ({error})"
        ) from error
    if not isinstance(schema, dict):
        raise ValueError(f"--json_schema {text[:80]!r} holds no JSON object")
    return schema


def _engine_options(flags: Namespace) -> EngineOptions:
    memory, draft = flags.kv_cache_memory, flags.draft_model
    return EngineOptions(
        quantization=flags.quantization,
        kv_cache_memory_bytes=None if memory is None else read_bytes(memory, "kv_cache_memory"),
        prompt_lookup=flags.prompt_lookup,
        draft_model=draft and existing_ref(draft),
        tensor_parallel=flags.tensor_parallel,
        batch_invariant=flags.batch_invariant,
    )


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
    parser = ArgumentParser(prog="generate.py", description="Continues prompts with a trained model.")
    add = parser.add_argument
    add("--checkpoint", required=True, help="A directory, models:/name/version or models:/name@alias.")
    add("--prompt", type=str, help="The text to continue; - reads it from standard input.")
    add("--input", type=str, help="Many prompts: a .jsonl file, a folder or glob of them, or a URI.")
    add("--output", type=str, help="With --input: the .jsonl file to write, on storage that all nodes share.")
    add("--prompt_field", default="prompt", help="With --input: the field that holds the text.")
    add("--replicas", type=int, help="With --input: engines; all GPUs, or one for each node, if not given.")
    add("--max_num_seqs", type=int, default=64, help="With --input: sequences that an engine runs together.")
    add("--overwrite", action="store_true", help="With --input: replace what --output already holds.")
    add("--max_tokens", type=int, default=100, help="At most so many new tokens.")
    add("--min_tokens", type=int, default=0, help="No end before there are so many.")
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
    add("--json_schema", type=str, help="Output that this schema allows: JSON, or a file of it.")
    add("--regex", type=str, help="Output that this expression matches as a whole.")
    add("--device", type=str, help="cpu, cuda or cuda:N; CUDA where there is one, if not given.")
    add("--dtype", choices=DTYPES, help="Compute in this type; the stored one if not given.")
    add(
        "--quantization",
        choices=("int8", "int4"),
        help="Round the weights to so many bits as they are loaded.",
    )
    add("--kv_cache_memory", type=str, help="Of one engine, such as 2GiB; from the free memory if not given.")
    add("--prompt_lookup", action="store_true", help="Guess tokens from the text itself; no token changes.")
    add("--draft_model", type=str, help="A small model of the same tokenizer that guesses; no token changes.")
    add("--tensor_parallel", type=int, default=1, help="GPUs that share one engine's model.")
    add("--batch_invariant", action="store_true", help="On CUDA: the same tokens in any company, at a price.")
    for name in SHAPE:
        add(f"--{name}", type=int, help="A check: the checkpoint's must be the same.")
    return parser


if __name__ == "__main__":
    main(run)
