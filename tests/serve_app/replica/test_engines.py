"""The engines of a replica while plans change."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import pytest

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.pretrained import save_pretrained
from serve_app.registry.messages import ModelVersion
from tests.serve_app.replica.helpers import OPTIONS, Loader, running, state, version
from tests.small_models import random_model, small_config, small_tokenizer

PARAMS = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[ModelVersion]:
    """Three versions with different weights."""
    tokenizer, folder = small_tokenizer(), tmp_path_factory.mktemp("versions")
    for seed in range(3):
        model = random_model(small_config(tokenizer.vocab_size), seed)
        save_pretrained(model, tokenizer, folder / f"v{seed}")
    return [version(folder / f"v{seed}") for seed in range(3)]


def tokens_of(version: ModelVersion, prompt: str) -> list[int]:
    engine = Engine.from_pretrained(version.location, device="cpu", options=OPTIONS)
    return engine.generate(prompt, PARAMS)[0].token_ids


def test_wanted_versions_answer_side_by_side(versions: list[ModelVersion]) -> None:
    async def run() -> list[list[int]]:
        async with running(Loader()) as engines:
            engines.apply(versions[:2])
            answers = []
            for wanted in versions[:2]:
                await state(engines, wanted.ref, "ready")
                served = engines.get(wanted.ref)
                assert served is not None
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
            await state(engines, versions[0].ref, "ready")
            info = engines.reports[versions[0].ref].info
            assert info is not None
            served = engines.get(versions[0].ref)
            assert served is not None
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
            await state(engines, old.ref, "ready")
            served = engines.get(old.ref)
            assert served is not None
            stream = served.stream("The", PARAMS)
            tokens = [token for delta in await anext(stream) for token in delta.token_ids]
            engines.apply([new])
            assert engines.get(old.ref) is None
            await state(engines, new.ref, "ready")
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
            await state(engines, old.ref, "ready")
            served = engines.get(old.ref)
            assert served is not None
            stream = served.stream("The", PARAMS)
            await anext(stream)
            engines.apply([new])
            await state(engines, new.ref, "ready")
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
            await state(engines, versions[1].ref, "ready")
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
            await state(engines, versions[1].ref, "ready")

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
                    await state(engines, each.ref, "ready")
            await engines.until(lambda: len(loader.alive) == 1)
            assert [served.version for served in engines.served] == [versions[2]]

    asyncio.run(run())
