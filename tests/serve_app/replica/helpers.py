"""Engines that answer requests without a network, and versions to load them from."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from llama_ray.generation.completion import Completion, GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.engine_thread import EngineThread, Item
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from serve_app.registry.messages import EngineReport, ModelVersion
from serve_app.replica.engines import Engines
from serve_app.replica.loader import EngineLoader, Files

OPTIONS = EngineOptions(max_num_seqs=2, kv_cache_memory_bytes=2**20)
TIMEOUT_S = 60


class Answers:
    """An engine that answers one prompt after the other, as a replica's would over the network."""

    def __init__(self, engine: Engine, version: ModelVersion) -> None:
        self.engine, self.version = engine, version
        self.open_requests = 0
        self._thread = EngineThread(engine, self._deliver)

    @property
    def ended(self) -> str | None:
        return self._thread.ended

    @property
    def stalled_s(self) -> float:
        return self._thread.stalled_s

    def stop(self) -> None:
        self._thread.stop()

    async def stream(self, prompt: str, params: SamplingParams) -> AsyncIterator[list[Delta]]:
        queue: asyncio.Queue[Item] = asyncio.Queue()
        self.open_requests += 1
        request_id = self._thread.submit(prompt, params, (asyncio.get_running_loop(), queue))
        try:
            finished = False
            while not finished:
                item = await queue.get()
                if isinstance(item, GenerationError):
                    raise item
                finished = item[-1].finish_reason is not None
                yield item
        finally:
            self._thread.abort(request_id)
            self.open_requests -= 1

    async def complete(self, prompt: str, params: SamplingParams) -> list[int]:
        deltas = [delta async for part in self.stream(prompt, params) for delta in part]
        return Completion.of(deltas, []).token_ids

    def _deliver(
        self, items: list[tuple[tuple[asyncio.AbstractEventLoop, asyncio.Queue[Item]], Item]]
    ) -> None:
        for (loop, queue), item in items:
            loop.call_soon_threadsafe(queue.put_nowait, item)


@dataclass(frozen=True)
class Loader(EngineLoader):
    """Counts what it loads; `on_fetch` and `on_load` are called before, with the version's directory."""

    options: EngineOptions = OPTIONS
    on_fetch: Callable[[Path], object] = lambda directory: None
    on_load: Callable[[Path], object] = lambda directory: None
    loaded: list[str] = field(default_factory=list)
    alive: weakref.WeakSet[Engine] = field(default_factory=weakref.WeakSet)

    def fetch(self, version: ModelVersion) -> Files:
        self.on_fetch(Path(version.location))
        return super().fetch(version)

    def load(self, files: Files) -> Engine:
        self.loaded.append(files.model.name)
        self.on_load(files.model)
        engine = super().load(files)
        self.alive.add(engine)
        return engine


def version(directory: Path) -> ModelVersion:
    return ModelVersion("tiny", directory.name, str(directory))


@asynccontextmanager
async def running(loader: EngineLoader) -> AsyncIterator[Engines[Answers]]:
    """Engines that try again at once; they are stopped at the end."""
    engines = Engines(loader, Answers, retry_s=(0.01, 0.02))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield engines
    finally:
        await engines.stop()


async def ready(engines: Engines[Answers], version: ModelVersion) -> Answers:
    """Wait until the version is ready; return its engine."""
    report = await settled(engines, version)
    assert report.state == "ready", report.reason
    served = engines.get(version.ref)
    assert served is not None
    return served


async def settled(engines: Engines[Answers], version: ModelVersion) -> EngineReport:
    """Wait until it is known whether the version can be served; return its report."""
    await engines.until(lambda: engines.reports[version.ref].state != "loading")
    return engines.reports[version.ref]
