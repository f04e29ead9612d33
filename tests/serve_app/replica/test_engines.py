"""The engines of a replica while plans change."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from llama_ray.generation.engine import Engine
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained
from serve_app.registry.messages import ModelVersion
from serve_app.replica.engines import Engines
from serve_app.replica.served_engine import ServedEngine
from serve_app.streams.messages import Submission
from serve_app.streams.receiver import Receiver
from serve_app.streams.sender import Sender
from tests.serve_app.replica.helpers import OPTIONS, TIMEOUT_S, Loader, ready, running, version
from tests.small_models import small_config, small_tokenizer

PARAMS = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)


def tokens_of(version: ModelVersion, prompt: str) -> list[int]:
    engine = Engine.from_pretrained(version.location, device="cpu", options=OPTIONS)
    return engine.generate(prompt, PARAMS)[0].token_ids


def test_wanted_versions_answer_side_by_side(versions: list[ModelVersion]) -> None:
    async def run() -> list[list[int]]:
        async with running(Loader()) as engines:
            engines.apply(versions[:2])
            answers = []
            for wanted in versions[:2]:
                served = await ready(engines, wanted)
                answers.append(await served.complete("The", PARAMS))
            return answers

    first, second = asyncio.run(run())
    assert first == tokens_of(versions[0], "The")
    assert second == tokens_of(versions[1], "The")
    assert first != second


def test_a_report_says_what_was_loaded(versions: list[ModelVersion]) -> None:
    async def run() -> None:
        async with running(Loader()) as engines:
            engines.apply(versions[:1])
            assert engines.reports[versions[0].ref].state == "loading"
            assert engines.get(versions[0].ref) is None
            served = await ready(engines, versions[0])
            info = engines.reports[versions[0].ref].info
            assert info is not None
            assert info.parameters == served.engine.config.num_parameters()
            assert (info.max_model_len, info.device) == (256, "cpu")
            assert 0 < info.loss < 100

    asyncio.run(run())


def test_a_stream_ends_on_the_old_weights_while_the_new_version_is_ready(
    versions: list[ModelVersion],
) -> None:
    old, new = versions[:2]
    loader = Loader()

    async def run() -> list[int]:
        async with running(loader) as engines:
            engines.apply([old])
            served = await ready(engines, old)
            stream = served.stream("The", PARAMS)
            tokens = [token for delta in await anext(stream) for token in delta.token_ids]
            engines.apply([new])
            assert engines.get(old.ref) is None
            await ready(engines, new)
            assert len(loader.alive) == 2
            del served
            async for deltas in stream:
                tokens += [token for delta in deltas for token in delta.token_ids]
            await engines.until(lambda: len(loader.alive) == 1)
            return tokens

    assert asyncio.run(run()) == tokens_of(old, "The")


def test_a_version_that_is_wanted_again_while_it_drains_is_kept(versions: list[ModelVersion]) -> None:
    old, new = versions[:2]
    loader = Loader()

    async def run() -> None:
        async with running(loader) as engines:
            engines.apply([old])
            served = await ready(engines, old)
            stream = served.stream("The", PARAMS)
            await anext(stream)
            engines.apply([new])
            await ready(engines, new)
            engines.apply([new, old])
            assert engines.reports[old.ref].state == "ready"
            await stream.aclose()
            assert engines.get(old.ref) is served
            assert await served.complete("The", PARAMS) == tokens_of(old, "The")

    asyncio.run(run())
    assert loader.loaded == [Path(old.location).name, Path(new.location).name]


def test_a_load_that_is_not_wanted_any_more_is_abandoned(versions: list[ModelVersion]) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def wait(directory: Path) -> None:
        if directory.name == versions[0].ref:
            loading.set()
            go_on.wait(60)

    loader = Loader(on_load=wait)

    async def run() -> None:
        async with running(loader) as engines:
            engines.apply(versions[:1])
            await asyncio.to_thread(loading.wait, 60)
            engines.apply(versions[1:2])
            assert set(engines.reports) == {versions[1].ref}
            go_on.set()
            await ready(engines, versions[1])
            assert [served.version for served in engines.served] == versions[1:2]
            assert len(loader.alive) == 1

    asyncio.run(run())


def test_the_most_important_version_is_loaded_first(versions: list[ModelVersion]) -> None:
    canary_is_fetched = threading.Event()

    def fetch(directory: Path) -> None:
        if directory.name == versions[0].ref:
            canary_is_fetched.wait(60)
        else:
            canary_is_fetched.set()

    loader = Loader(on_fetch=fetch)

    async def run() -> None:
        async with running(loader) as engines:
            engines.apply(versions[:2])
            await ready(engines, versions[1])

    asyncio.run(run())
    assert loader.loaded == [versions[0].ref, versions[1].ref]


@pytest.mark.parametrize("seed", range(3))
def test_after_any_plans_just_what_the_last_one_wants_is_loaded(
    versions: list[ModelVersion], seed: int
) -> None:
    chance, loader = random.Random(seed), Loader()

    async def run() -> None:
        async with running(loader) as engines:
            for _ in range(20):
                wanted = chance.sample(versions, chance.randint(0, 3))
                engines.apply(wanted)
                # Let some loads begin, and some end.
                await engines.until(lambda: chance.random() < 0.3, timeout_s=0.05)
            for wanted in ([*versions[:2]], [versions[2]]):
                engines.apply(wanted)
                for each in wanted:
                    await ready(engines, each)
            await engines.until(lambda: len(loader.alive) == 1)
            assert [served.version for served in engines.served] == [versions[2]]

    asyncio.run(run())


def test_an_engine_is_freed_that_ray_serve_has_excluded_from_garbage_collection(
    versions: list[ModelVersion],
) -> None:
    version, loader = versions[0], Loader()

    async def answer(served: ServedEngine) -> None:
        receiver, sender = await Receiver.listen("127.0.0.1"), Sender()
        stream = receiver.open()
        submission = Submission(
            version.ref, ["The"], replace(PARAMS, seed=1), receiver.address, stream.number
        )
        assert await served.answer(submission, await sender.connect(receiver.address)) == "done"
        sender.close()
        receiver.close()

    async def run() -> None:
        engines = Engines(loader, ServedEngine)
        engines.apply([version])
        await engines.until(lambda: bool(engines.served), TIMEOUT_S)
        gc.freeze()
        await answer(engines.served[0])
        engines.apply([])
        await engines.until(lambda: not loader.alive, TIMEOUT_S)

    asyncio.run(run())
    assert not loader.alive


def test_many_changes_of_version_leave_no_memory_behind(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    config = small_config(tokenizer.vocab_size, hidden_size=512, num_layers=4, intermediate_size=1024)
    for number in range(2):
        save_pretrained(Llama(config, seed=number), tokenizer, tmp_path / str(number))
    both = [version(tmp_path / str(number)) for number in range(2)]
    loader = Loader(options=EngineOptions(max_num_seqs=1, kv_cache_memory_bytes=2**23))
    process, resident = psutil.Process(), list[int]()

    async def run() -> None:
        async with running(loader) as engines:
            for turn in range(12):
                engines.apply([both[turn % 2]])
                await ready(engines, both[turn % 2])
                await engines.until(lambda: len(engines.served) == 1)
                resident.append(process.memory_info().rss)

    asyncio.run(run())
    # Six engines came and went in between, each of more than `one` bytes. What the allocator scatters is less than two,
    # also in a process that has run a thousand tests.
    one = 4 * config.num_parameters()
    assert max(resident[6:]) - max(resident[:6]) < 2 * one
