"""A model replica: the engine behind the API. Ray Serve runs it in a deployment; there is no Ray in here."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.async_engine import AsyncEngine
from llama_ray.generation.completion import GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams, TokenLogprob
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.generation.stats import EngineStats
from llama_ray.storage.paths import is_model_ref
from llama_ray.tracking import registry
from serve_app.events import Event, Failure, Job, Logprobs, ModelInfo, Piece, Started

DType = Literal["float32", "bfloat16", "float16"]
DEFAULT_OPTIONS = EngineOptions(max_num_seqs=16)

_Batches = AsyncGenerator[list[tuple[int, Delta]]]
_Item = tuple[int, Delta] | Exception  # (number of the prompt, its delta), or why there are no more


class LlamaReplica:
    """Answers jobs with the model that `ref` stands for: a directory, `models:/name/7` or `models:/name@alias`.

    References are looked up in the MLflow registry at `tracking_uri`. `dtype` None keeps the stored one; `options` are
    the engine's. `threads` are for computing on the CPU, no more than this process
    has cores. Raises ValueError for a model that cannot be served; Serve then reports the deployment as failed, with
    that message.
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
            raise ValueError(f"{ref} holds no tokenizer to answer with text; add its tokenizer.json")
        self._tokenizer: Tokenizer = engine.tokenizer
        self._info = _describe(engine, directory, version, device)
        self._engine = AsyncEngine(engine)

    async def info(self) -> ModelInfo:
        """What is served here. Raises GenerationError where the engine has ended."""
        await self.check_health()
        return self._info

    async def stats(self) -> EngineStats:
        """What the engine is doing and has done."""
        return self._engine.engine.stats

    async def check_health(self) -> None:
        """Raise GenerationError where the engine has ended; Serve calls this and replaces such a replica."""
        try:
            await anext(self._engine.stream([]))
        except ValueError:  # an engine that runs refuses an empty prompt, without any work
            return

    async def generate(self, job: Job) -> AsyncGenerator[Event]:
        """`Started`, then lists of pieces, at most one of each choice; or a `Failure`.

        Choice i belongs to prompt i // n. Pieces that are ready at the same moment come together, and nothing waits
        for more; a job that does not stream gets one list, at its end. Cancelling the call, or closing the iterator,
        frees what the job holds in the engine.
        """
        if job.model not in self._info.names:
            served = " or ".join(repr(name) for name in self._info.names)
            message = f"model {job.model!r} is not served here; ask for {served}"
            yield Failure(404, message, code="model_not_found", param="model")
            return
        try:
            # Long prompts take a while to encode; other streams go on meanwhile.
            prompts = await asyncio.to_thread(lambda: [self._engine.engine.encode(p) for p in job.prompts])
        except ValueError as e:
            yield Failure(400, str(e), param="prompt")
            return
        try:
            async with aclosing(_merged(self._engine, prompts, job.params)) as batches:
                await anext(batches)
                yield Started(self._info, sum(len(ids) for ids in prompts))
                async with aclosing(self._pieces(job, prompts, batches)) as lists:
                    if job.stream:
                        async for pieces in lists:
                            yield pieces
                    else:
                        yield _whole([piece async for pieces in lists for piece in pieces])
        except ValueError as e:
            yield Failure(400, str(e))
        except GenerationError as e:
            yield Failure(500, str(e), code="generation_failed")

    async def _pieces(
        self, job: Job, prompts: list[list[int]], batches: _Batches
    ) -> AsyncGenerator[list[Piece]]:
        if job.echo:
            yield self._echo(job, prompts)
        writers: dict[int, _LogprobWriter] = {}
        async for batch in batches:
            yield [self._piece(i, delta, job.params, writers) for i, delta in batch]

    def _echo(self, job: Job, prompts: list[list[int]]) -> list[Piece]:
        n = job.params.n
        given = zip(job.prompts, prompts, strict=True)
        texts = [prompt if isinstance(prompt, str) else self._tokenizer.decode(ids) for prompt, ids in given]
        return [Piece(i * n + j, text) for i, text in enumerate(texts) for j in range(n)]

    def _piece(
        self, prompt: int, delta: Delta, params: SamplingParams, writers: dict[int, _LogprobWriter]
    ) -> Piece:
        index = prompt * params.n + delta.index
        logprobs = None
        if delta.logprobs is not None:
            if index not in writers:
                writers[index] = _LogprobWriter(self._tokenizer)
            logprobs = writers[index].write(delta.logprobs)
        return Piece(index, delta.text, len(delta.token_ids), logprobs, delta.finish_reason)


async def _merged(engine: AsyncEngine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> _Batches:
    """The streams of all prompts as one: an empty list when the engine has taken all in, then what is ready.

    Raises what the first stream to fail raises. All are aborted then, as they are when this is closed.
    """
    queue: asyncio.Queue[_Item] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(engine, i, ids, params, queue)) for i, ids in enumerate(prompts)]
    unfinished = len(prompts) * params.n
    try:
        # Each task runs up to its first wait before this one goes on, and has handed its prompt to the engine then:
        # one that is refused is known before anything is answered.
        await asyncio.sleep(0)
        items = _drained(queue)
        yield []
        while unfinished:
            batch = _coalesced(items or [_checked(await queue.get()), *_drained(queue)])
            items = []
            unfinished -= sum(delta.finish_reason is not None for _, delta in batch)
            yield batch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    engine: AsyncEngine,
    number: int,
    ids: Sequence[int],
    params: SamplingParams,
    queue: asyncio.Queue[_Item],
) -> None:
    try:
        async with aclosing(engine.stream(ids, params)) as deltas:
            async for delta in deltas:
                queue.put_nowait((number, delta))
    except Exception as e:  # raised again where the queue is read
        queue.put_nowait(e)


def _drained(queue: asyncio.Queue[_Item]) -> list[tuple[int, Delta]]:
    """What is in the queue now. Raises an item that is an exception."""
    return [_checked(queue.get_nowait()) for _ in range(queue.qsize())]


def _checked(item: _Item) -> tuple[int, Delta]:
    if isinstance(item, Exception):
        raise item
    return item


def _coalesced(items: Sequence[tuple[int, Delta]]) -> list[tuple[int, Delta]]:
    """One delta for each choice, from several for a reader that was slow."""
    merged: dict[tuple[int, int], Delta] = {}
    for number, delta in items:
        key = (number, delta.index)
        merged[key] = merged[key] + delta if key in merged else delta
    return [(number, delta) for (number, _), delta in merged.items()]


def _whole(pieces: Sequence[Piece]) -> list[Piece]:
    by_choice: dict[int, list[Piece]] = defaultdict(list)
    for piece in pieces:
        by_choice[piece.index].append(piece)
    return [Piece.joined(by_choice[index]) for index in sorted(by_choice)]


class _LogprobWriter:
    """Brings the log-probabilities of one choice into OpenAI's layout, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._offset = 0

    def write(self, positions: Sequence[TokenLogprob]) -> Logprobs:
        logprobs = Logprobs([], [], [], [])
        for position in positions:
            name = self._name(position.token_id)
            logprobs.tokens.append(name)
            logprobs.token_logprobs.append(position.logprob)
            logprobs.top_logprobs.append(self._top(position, name))
            logprobs.text_offset.append(self._offset)
            self._offset += len(self._stream.push(position.token_id))
        return logprobs

    def _top(self, position: TokenLogprob, name: str) -> dict[str, float]:
        top = {name: position.logprob}
        for token_id, logprob in position.top:
            if token_id != position.token_id:
                other = self._name(token_id)
                # Some vocabularies have several tokens of one text; none may hide another.
                top[f"token_id:{token_id}" if other in top else other] = logprob
        return top

    def _name(self, token_id: int) -> str:
        text = self._tokenizer.decode([token_id], skip_special=False)
        return f"token_id:{token_id}" if not text or "\ufffd" in text else text


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
        validation_loss=None if loss is None or loss != loss else loss,
    )
