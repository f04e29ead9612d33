"""Generate text with a checkpoint: `python jobs/generate.py --checkpoint REF --prompt "Once upon a time"`.

`--input prompts.jsonl --output out.jsonl` answers many prompts on the cluster (`docs/generation.md`).
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _cli import SHAPE_FLAGS, from_flags, main, parse, read_bytes
from _progress import ProgressLine
from jsonargparse import ArgumentParser, Namespace

from llama_ray.batch_inference.config import BatchConfig
from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.pretrained import load_shape, resolve
from llama_ray.storage.paths import absolute, existing, existing_ref
from llama_ray.utils.redact import redact

SHAPE = (*SHAPE_FLAGS, "max_seq_len")
BATCH_ONLY = (
    *("output", "prompt_field", "replicas", "max_num_seqs", "overwrite"),
    *("adapters", "max_loras", "max_lora_rank"),
)
"""Flags that need --input."""


def run() -> None:
    """Read the flags, then print a prompt and its continuation as it comes, or answer a file of prompts."""
    parser = _parser()
    flags = parse(parser)
    _check_mode(flags, parser)
    params = from_flags(
        SamplingParams,
        flags,
        # A batch has a seed for each row.
        seed=None if flags.input else flags.seed,
        stop=tuple(flags.stop),
        json_schema=None if flags.json_schema is None else _read_schema(flags.json_schema),
    )
    memory, draft = flags.kv_cache_memory, flags.draft_model
    options = from_flags(
        EngineOptions,
        flags,
        max_seq_len=None,
        kv_cache_memory_bytes=None if memory is None else read_bytes(memory, "kv_cache_memory"),
        draft_model=draft and existing_ref(draft),
    )
    directory = resolve(existing_ref(flags.checkpoint))
    _check_shape(flags, directory)
    if flags.input:
        _batch(flags, params, options)
        return
    prompt = sys.stdin.read().removesuffix("\n") if flags.prompt == "-" else flags.prompt
    dtype = flags.dtype and getattr(torch, flags.dtype)
    with Engine.from_pretrained(
        directory, dtype, flags.device, replace(options, max_num_seqs=1), seed=None
    ) as engine:
        _stream(engine, prompt, params)


def _check_mode(flags: Namespace, parser: ArgumentParser) -> None:
    if (flags.prompt is None) == (flags.input is None):
        raise ValueError("give either --prompt, or --input and --output")
    if flags.input is not None and flags.output is None:
        raise ValueError("--input needs --output, the .jsonl file that the answers go to")
    unused = [name for name in BATCH_ONLY if flags[name] != parser.get_default(name)]
    if flags.input is None and unused:
        raise ValueError(f"--{unused[0]} belongs to --input; leave it out with --prompt")


def _batch(flags: Namespace, params: SamplingParams, options: EngineOptions) -> None:
    # A single prompt does not wait for Ray.
    from llama_ray.batch_inference.job import BatchJob
    from llama_ray.orchestration.cluster import connect

    config = from_flags(
        BatchConfig,
        flags,
        checkpoint=existing_ref(flags.checkpoint),
        input=existing(flags.input),
        output=absolute(flags.output),
        adapters={name: existing_ref(ref) for name, ref in flags.adapters.items()},
        params=params,
        engine=options,
    )
    job = BatchJob(config)
    if job.finished is not None:
        print(
            f"{redact(job.output.location)} is complete already ({job.finished.rows:,} rows): nothing to do"
        )
        return
    if job.remaining:
        connect(log_to_driver=False)
    line = ProgressLine()
    job.run(log=line.log, progress=line.show)


def _read_schema(text: str) -> dict[str, Any]:
    """Return the JSON schema in `text`, or in the file that `text` names. Raises ValueError."""
    try:
        schema = json.loads(text if text.lstrip().startswith("{") else Path(existing(text)).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"--json_schema is {text[:80]!r}; give a JSON object, or a file that holds one ({error})"
        ) from error
    if not isinstance(schema, dict):
        raise ValueError(
            f'--json_schema is {text[:80]!r}; it must be a JSON object, such as {{"type": "object"}}'
        )
    return schema


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
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        # Also after Ctrl-C, so that the shell's prompt starts on its own line.
        print(flush=True)
    seconds = time.perf_counter() - start
    print(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr, flush=True)


def _check_shape(flags: Namespace, directory: Path) -> None:
    config = load_shape(directory)
    for name in SHAPE:
        asked, stored = flags[name], getattr(config, name)
        # In training, 0 means as many as num_heads.
        if name == "num_kv_heads" and asked == 0:
            asked = config.num_heads
        if asked not in (None, stored):
            raise ValueError(
                f"--{name} is {asked} but the checkpoint's is {stored}; leave the flag out, since the shape comes "
                "with the checkpoint, or give another checkpoint"
            )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="generate.py", description="Continues prompts with a trained model.")
    add = parser.add_argument
    add("--prompt", type=str, help="The text to continue; - reads it from standard input.")
    add("--input", type=str, help="Many prompts: a .jsonl file, a folder or glob of them, or a URI.")
    add("--output", type=str, help="With --input: the .jsonl file to write, on storage that all nodes share.")
    parser.add_class_arguments(BatchConfig, skip={"input", "output", "params", "seed", "engine"})
    add(
        "--seed", type=int, help="The same seed gives the same text; with --input, a row's number counts too."
    )
    parser.add_class_arguments(
        SamplingParams,
        skip={
            "seed",
            "stop",
            "json_schema",
            "n",
            "stop_token_ids",
            "logit_bias",
            "logprobs",
            "prompt_logprobs",
            "prompt_logprobs_start",
            "prompt_logprobs_next",
        },
    )
    add(
        "--stop",
        type=str,
        nargs="+",
        default=[],
        help="End the text where one of these strings would appear.",
    )
    add("--json_schema", type=str, help="Output that this schema allows: JSON, or a file that holds it.")
    parser.add_class_arguments(EngineOptions, skip={"max_seq_len", "kv_cache_memory_bytes"})
    add(
        "--kv_cache_memory",
        type=str,
        help="Memory for keys and values of one engine, such as 2GiB; taken from the free memory by default.",
    )
    for name in SHAPE:
        add(f"--{name}", type=int, help=f"A check: stop if the checkpoint's {name} is another.")
    parser.set_defaults(max_tokens=100, temperature=0.8, top_k=40, top_p=0.9)
    return parser


if __name__ == "__main__":
    main(run)
