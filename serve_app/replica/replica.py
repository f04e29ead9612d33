"""A model replica: the engine behind the API. Ray Serve runs it in a deployment; this module does not use Ray."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.async_engine import AsyncEngine, PromptDelta
from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.generation.stats import EngineStats
from llama_ray.storage.paths import is_model_ref
from llama_ray.tracking import registry
from llama_ray.utils.panics import panics_as_errors
from serve_app.errors import INTERNAL_ERROR
from serve_app.replica.logprobs import LogprobWriter
from serve_app.streams.messages import ChoiceDelta, Event, Failure, GenerationRequest, ModelInfo, Started

_log = logging.getLogger(__name__)

DType = Literal["float32", "bfloat16", "float16"]
LONG_PROMPT = 50_000
"""Characters, or token ids; some ten milliseconds of tokenising."""
DEFAULT_OPTIONS = EngineOptions(max_num_seqs=16)


class LlamaReplica:
    """Answers requests with the model `ref`: a directory, `models:/name/7` or `models:/name@alias`.

    References are resolved in the MLflow registry at `tracking_uri`. `dtype` None keeps the stored one. On the
    CPU, at most `threads` compute, and no more than this process has cores. Raises ValueError for a model that cannot
    be served; Serve then reports the deployment as failed, with that message.
    """

    def __init__(
        self,
        ref: str,
        tracking_uri: str | None = None,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int = 1,
        dtype: DType | None = None,
        options: EngineOptions = DEFAULT_OPTIONS,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch sees no GPU here; install a CUDA build of torch, or set num_gpus to 0")
        torch.set_num_threads(max(1, min(threads, len(os.sched_getaffinity(0)))))
        version = registry.resolve_version(ref, tracking_uri) if is_model_ref(ref) else None
        directory = Path(ref) if version is None else registry.download(version.uri, tracking_uri)
        if options.draft_model is not None and is_model_ref(options.draft_model):
            draft = registry.resolve_version(options.draft_model, tracking_uri)
            options = replace(options, draft_model=str(registry.download(draft.uri, tracking_uri)))
        engine = Engine.from_pretrained(
            directory,
            dtype=dtype and getattr(torch, dtype),
            device=device,
            options=options,
            seed=None,
        )
        if engine.tokenizer is None:
            raise ValueError(
                f"{ref} has no tokenizer, which answering with text needs; add its tokenizer.json"
            )
        self._tokenizer: Tokenizer = engine.tokenizer
        self._info = _describe(engine, directory, version, device)
        self._engine = AsyncEngine(engine)
        # Long prompts wait for each other, short ones never for long ones, and the model keeps the other cores.
        self._lanes = ThreadPoolExecutor(1, "tokenizer"), ThreadPoolExecutor(1, "tokenizer_long")

    async def info(self) -> ModelInfo:
        """Return which model is served. Raises GenerationError if the engine has ended."""
        await self.check_health()
        return self._info

    async def stats(self) -> EngineStats:
        """Return what the engine is doing and has done."""
        return self._engine.engine.stats

    async def check_health(self) -> None:
        """Raise GenerationError if the engine has ended; Serve calls this and replaces such a replica."""
        if self._engine.ended is not None:
            raise GenerationError(self._engine.ended)

    def stop(self) -> None:
        """End the engine; requests in progress fail."""
        self._engine.stop()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        """Yield `Started`, then lists of deltas with at most one for each choice; or a `Failure`.

        Choice i belongs to prompt i // n. Deltas that are ready at the same moment come together, and nothing waits
        for more; a request that does not stream gets one list, at its end. Cancelling the call, or closing the
        iterator, frees what the request holds in the engine.
        """
        try:
            with panics_as_errors():
                async with aclosing(self._events(request)) as events:
                    async for event in events:
                        yield event
        except Exception:
            _log.exception("a request fails")
            yield Failure(500, INTERNAL_ERROR)

    async def _events(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        if request.model not in self._info.names:
            yield Failure(404, self._info.not_served(request.model), code="model_not_found", param="model")
            return
        try:
            prompts = await self._encode(request.prompts)
        except ValueError as error:
            yield Failure(400, str(error), param="prompt")
            return
        try:
            async with aclosing(self._answer(request, prompts)) as events:
                async for event in events:
                    yield event
        except ValueError as error:
            grammar = request.params.grammar
            at_fault = grammar[0] if grammar and str(error).startswith(grammar[0]) else None
            yield Failure(400, str(error), param=at_fault)
        except GenerationError as error:
            yield Failure(500, str(error), code="generation_failed")

    async def _encode(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Encode prompts in a thread, one by one: streams go on, and a client that leaves ends it."""
        loop, encode = asyncio.get_running_loop(), self._engine.engine.encode
        return [
            await loop.run_in_executor(self._lanes[len(prompt) > LONG_PROMPT], encode, prompt)
            for prompt in prompts
        ]

    async def _answer(
        self, request: GenerationRequest, prompts: list[list[int]]
    ) -> AsyncGenerator[Started | list[ChoiceDelta]]:
        async with self._engine.submit(prompts, request.params) as batches:
            yield Started(self._info, sum(len(ids) for ids in prompts))
            deltas = self._choice_deltas(request, prompts, batches)
            if request.stream:
                async for batch in deltas:
                    yield batch
            else:
                yield _join_choices([delta async for batch in deltas for delta in batch])

    async def _choice_deltas(
        self, request: GenerationRequest, prompts: list[list[int]], batches: AsyncIterator[list[PromptDelta]]
    ) -> AsyncIterator[list[ChoiceDelta]]:
        n = request.params.n
        writers: list[LogprobWriter] = []
        if request.params.logprobs is not None:
            writers = [
                LogprobWriter(self._tokenizer, ids, request.params.constrained)
                for ids in prompts
                for _ in range(n)
            ]
        if request.echo:
            texts = self._echo(request, prompts)
            yield [ChoiceDelta(i * n + j, text) for i, text in enumerate(texts) for j in range(n)]
        async for batch in batches:
            yield [_choice_delta(number * n + delta.index, delta, writers) for number, delta in batch]

    def _echo(self, request: GenerationRequest, prompts: list[list[int]]) -> list[str]:
        given = zip(request.prompts, prompts, strict=True)
        return [prompt if isinstance(prompt, str) else self._tokenizer.decode(ids) for prompt, ids in given]


def _choice_delta(index: int, delta: Delta, writers: Sequence[LogprobWriter]) -> ChoiceDelta:
    logprobs = None if delta.logprobs is None else writers[index].write(delta.logprobs)
    return ChoiceDelta(index, delta.text, len(delta.token_ids), logprobs, delta.finish_reason)


def _join_choices(deltas: Sequence[ChoiceDelta]) -> list[ChoiceDelta]:
    """Return one delta for each choice, in the order of the choices."""
    by_choice: dict[int, list[ChoiceDelta]] = defaultdict(list)
    for delta in deltas:
        by_choice[delta.index].append(delta)
    return [ChoiceDelta.joined(by_choice[index]) for index in sorted(by_choice)]


def _describe(engine: Engine, directory: Path, version: registry.Version | None, device: str) -> ModelInfo:
    name = directory.resolve().name if version is None else version.name
    loss = None if version is None else version.validation_loss
    return ModelInfo(
        id=name,
        ref=name if version is None else version.uri,
        created=int((directory / "config.json").stat().st_mtime),
        max_model_len=engine.max_seq_len,
        parameters=engine.config.num_parameters(),
        device=device,
        version=None if version is None else version.version,
        run_id=None if version is None else version.run_id,
        validation_loss=loss if loss is not None and math.isfinite(loss) else None,
    )
