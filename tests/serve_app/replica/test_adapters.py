"""Adapters are loaded when they are asked for, and the last ones stay."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.stored_config import load_config
from serve_app.registry.messages import AdapterVersion
from serve_app.replica.adapters import AdapterError, ServedAdapters
from tests.generation.adapters.helpers import save_random_adapter

PARAMS = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.fixture
def adapted(model_dir: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(model_dir, device="cpu", max_num_seqs=4) as engine:
        yield engine


@pytest.fixture
def directories(model_dir: Path, tmp_path: Path) -> list[Path]:
    config = load_config(model_dir)
    return [save_random_adapter(tmp_path / f"a{i}", config, i) for i in range(3)]


def wanted(directory: Path) -> AdapterVersion:
    return AdapterVersion(directory.name, str(directory))


def test_the_adapters_that_were_used_last_stay(adapted: Engine, directories: list[Path]) -> None:
    fetched: list[str] = []

    def fetch(location: str) -> Path:
        fetched.append(location)
        return Path(location)

    async def use() -> None:
        adapters = ServedAdapters(adapted, fetch, 2)
        first = await adapters.get(wanted(directories[0]))
        request = adapted.submit("The quick", PARAMS, adapter=first)
        for number in (1, 0, 2, 0):
            await adapters.get(wanted(directories[number]))
        assert fetched == [str(directories[number]) for number in (0, 1, 2)]
        assert adapted.adapters == [str(directories[0]), str(directories[2])]
        await adapters.get(wanted(directories[1]))
        assert fetched[3:] == [str(directories[1])]
        # It was dropped last, but a request has it.
        await adapters.get(wanted(directories[2]))
        assert str(directories[0]) not in adapted.adapters
        deltas = [delta for _ in range(8) for delta in adapted.step()]
        assert sum(len(delta.token_ids) for delta in deltas if delta.request_id == request) == 5

    asyncio.run(use())


def test_requests_that_come_together_load_an_adapter_once_though_one_leaves(
    adapted: Engine, directories: list[Path]
) -> None:
    fetched: list[str] = []

    def fetch(location: str) -> Path:
        fetched.append(location)
        return Path(location)

    async def use() -> None:
        adapters = ServedAdapters(adapted, fetch, 2)
        leaves, *others = [asyncio.create_task(adapters.get(wanted(directories[0]))) for _ in range(3)]
        await asyncio.sleep(0)
        leaves.cancel()
        first, second = await asyncio.gather(*others)
        assert first is second

    asyncio.run(use())
    assert len(fetched) == 1


def test_an_adapter_that_cannot_be_loaded_is_not_tried_for_each_request(
    adapted: Engine, tmp_path: Path
) -> None:
    fetched: list[str] = []

    def fetch(location: str) -> Path:
        fetched.append(location)
        return tmp_path

    async def use() -> None:
        adapters = ServedAdapters(adapted, fetch, 2)
        for _ in range(3):
            with pytest.raises(AdapterError, match="is no adapter") as refused:
                await adapters.get(wanted(tmp_path))
            assert not refused.value.passing

    asyncio.run(use())
    assert len(fetched) == 1
