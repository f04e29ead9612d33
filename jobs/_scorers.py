"""What answers an evaluation: an engine in this process, engines of the cluster, or an endpoint."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

import torch
from _cli import from_flags, read_bytes
from jsonargparse import ArgumentParser, Namespace

from llama_ray.batch_inference.config import checkpoint_fingerprint
from llama_ray.evaluation.endpoint import EndpointScorer
from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.evaluation.parts import PartedScorer, compute_with
from llama_ray.evaluation.results import EvaluationError, Setting
from llama_ray.evaluation.scoring import Scorer
from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.pretrained import load_shape, load_tokenizer, resolve
from llama_ray.storage import store
from llama_ray.storage.paths import existing_ref, is_model_ref
from llama_ray.utils.redact import redact

Opened = tuple[Scorer, dict[str, Setting]]
"""A model that answers, and what is noted about how."""

_ANSWERS = "answers"
_NOT_FLAGS = {
    "kv_cache_memory_bytes",
    "draft_model",
    "prompt_lookup",
    "num_draft_tokens",
    "enable_prefix_caching",
    "batch_invariant",
}


def add_scorer_flags(parser: ArgumentParser) -> None:
    """Add what says where models run."""
    add = parser.add_argument
    add(
        "--output",
        type=str,
        help="Directory for results.json, results.md, and answers: a killed job goes on there.",
    )
    add("--device", type=str, help="cpu or cuda; None takes a GPU if there is one.")
    add("--dtype", type=str, help="Compute in float32, bfloat16 or float16; None keeps the stored type.")
    add(
        "--replicas",
        type=int,
        help="Engines on the Ray cluster. None: under `ray job submit` (RAY_ADDRESS) one for each GPU or node, and "
        "otherwise one engine in this process, without Ray.",
    )
    add("--kv_cache_memory", type=str, help="Memory for keys and values of one engine, such as 2GiB.")
    parser.add_class_arguments(EngineOptions, skip=_NOT_FLAGS)
    add(
        "--endpoint",
        type=str,
        help="Ask an OpenAI-compatible endpoint, http://HOST:PORT/v1 (key: OPENAI_API_KEY).",
    )
    add("--tokenizer", type=str, help="With --endpoint: the tokenizer of its model, as REF.")


@contextmanager
def at_endpoint(name: str, flags: Namespace) -> Iterator[Opened]:
    """Open the model that the endpoint calls `name`. Raises EvaluationError for an endpoint that cannot answer."""
    if flags.tokenizer is None:
        raise EvaluationError(
            "endpoint needs --tokenizer, a directory or reference with the tokenizer of its model"
        )
    tokenizer = load_tokenizer(existing_ref(flags.tokenizer))
    if tokenizer is None:
        raise EvaluationError(f"{redact(flags.tokenizer)} has no tokenizer; give a directory that has one")
    scorer = EndpointScorer(
        name,
        flags.endpoint,
        tokenizer,
        max_seq_len=flags.max_seq_len,
        api_key=os.environ.get("OPENAI_API_KEY"),
        concurrency=flags.max_num_seqs,
    )
    # An endpoint may serve another version under the same name by the time of the next call.
    made_from = {
        "endpoint": flags.endpoint,
        "model": name,
        "version": scorer.version,
        "tokenizer": tokenizer.fingerprint,
    }
    yield _kept_here(scorer, flags, made_from), {"endpoint": redact(flags.endpoint)}


@contextmanager
def of_checkpoint(ref: str, flags: Namespace) -> Iterator[Opened]:
    """Open the model of a fixed reference, in this process or on the cluster. Raises ValueError if it cannot be."""
    if flags.dtype not in (None, "float32", "bfloat16", "float16"):
        raise EvaluationError(f"dtype is {flags.dtype}; choose float32, bfloat16 or float16")
    memory = flags.kv_cache_memory
    options = from_flags(
        EngineOptions,
        flags,
        kv_cache_memory_bytes=None if memory is None else read_bytes(memory, "kv_cache_memory"),
    )
    made_from = {
        "checkpoint": checkpoint_fingerprint(resolve(ref)),
        "dtype": flags.dtype,
        "quantization": options.quantization,
        "max_seq_len": options.max_seq_len,
    }
    engine = {"dtype": flags.dtype and getattr(torch, flags.dtype), **asdict(options)}
    device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Setting] = {
        "dtype": flags.dtype,
        "quantization": options.quantization,
        "max_seq_len": options.max_seq_len,
        "device": device,
    }
    if flags.replicas is not None or "RAY_ADDRESS" in os.environ:
        with _on_cluster(ref, flags, options, engine, made_from) as scorer:
            yield scorer, settings
        return
    with Engine.from_pretrained(ref, device=flags.device, **engine) as loaded:
        yield _kept_here(EngineScorer(ref, loaded), flags, made_from), settings


@contextmanager
def _on_cluster(
    ref: str,
    flags: Namespace,
    options: EngineOptions,
    engine: dict[str, object],
    made_from: dict[str, object],
) -> Iterator[Scorer]:
    # Ray takes seconds to import.
    import ray

    from llama_ray.batch_inference.evaluation import EvaluatorConfig, compute_on_cluster
    from llama_ray.batch_inference.pool import PoolSize
    from llama_ray.orchestration.cluster import connect
    from llama_ray.orchestration.resources import nodes
    from llama_ray.tracking.environment import open_variables, secret_variables

    if not ray.is_initialized():
        connect(log_to_driver=False)
    tokenizer, shape = load_tokenizer(ref), load_shape(ref)
    if tokenizer is None:
        raise EvaluationError(f"{redact(ref)} has no tokenizer; give a model that has one")
    size = PoolSize.of(flags.device, flags.replicas, options.tensor_parallel)
    with ExitStack() as stack:
        if flags.output is not None:
            directory = _answers(flags.output, made_from)
        elif nodes() == 1:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="evaluation-"))
        else:
            raise EvaluationError(
                f"the cluster has {nodes()} nodes; give --output, a directory on storage that all of them share"
            )
        registry = is_model_ref(ref)
        config = EvaluatorConfig(ref, directory, 1, engine, secret_variables() if registry else {})
        compute = compute_on_cluster(config, size, open_variables() if registry else {})
        limit = options.max_seq_len or shape.max_seq_len
        yield PartedScorer(ref, tokenizer, limit, directory, compute)


def _kept_here(scorer: Scorer, flags: Namespace, made_from: dict[str, object]) -> Scorer:
    """Return a scorer that keeps its answers, where there is a directory for them."""
    if flags.output is None:
        return scorer
    directory = _answers(flags.output, made_from)
    return PartedScorer(
        scorer.model, scorer.tokenizer, scorer.max_seq_len, directory, compute_with(scorer, directory)
    )


def _answers(output: str, made_from: dict[str, object]) -> str:
    """Return the directory of the answers of one model, computed in one way."""
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    directory = store.join(store.join(output, _ANSWERS), key)
    store.make_directory(directory)
    return directory
