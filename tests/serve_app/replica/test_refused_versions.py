"""Versions that a replica cannot load, or must not: what is reported, and that the old version goes on."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.pretrained import load_pretrained, save_pretrained
from llama_ray.tracking.errors import reported
from serve_app.registry.messages import EngineReport, ModelVersion
from serve_app.replica.loader import Files
from tests.serve_app.replica.helpers import Loader, ready, running, settled, version
from tests.small_models import random_model, small_config, small_tokenizer

PARAMS = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)


def corrupt(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def with_nan(directory: Path) -> None:
    model, tokenizer = load_pretrained(directory)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    save_pretrained(model, tokenizer, directory)


def without_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def with_another_decoder(directory: Path) -> None:
    tokenizer = Tokenizer.load(directory)
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.decoder = tokenizers.decoders.Metaspace()
    Tokenizer(backend, {}).save(directory)


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        (corrupt, "model.safetensors"),
        (with_nan, "not finite"),
        (without_tokenizer, "there is no tokenizer"),
        (with_another_decoder, "the tokenizer makes"),
    ],
)
def test_a_version_that_must_not_serve_fails_and_the_old_one_goes_on(
    versions: list[ModelVersion], tmp_path: Path, break_: Callable[[Path], None], reason: str
) -> None:
    old, loader = versions[0], Loader()
    bad = tmp_path / "bad"
    tokenizer = small_tokenizer()
    save_pretrained(random_model(small_config(tokenizer.vocab_size)), tokenizer, bad)
    break_(bad)

    async def run() -> EngineReport:
        async with running(loader) as engines:
            engines.apply([old])
            served = await ready(engines, old)
            before = await served.complete("The", PARAMS)
            engines.apply([old, version(bad)])
            report = await settled(engines, version(bad))
            assert engines.get("bad") is None
            assert len(loader.alive) == 1
            assert await served.complete("The", PARAMS) == before
            return report

    report = asyncio.run(run())
    assert report.state == "failed"
    assert report.reason is not None
    assert reason in report.reason
    assert "\n" not in report.reason


class Hangs(Loader):
    """Loads engines whose second step waits for `released`."""

    released = threading.Event()

    def load(self, files: Files) -> Engine:
        engine = super().load(files)
        if files.model.name == "v1":
            step = engine.step
            engine.step = lambda: (self.released.wait(60), step())[1]  # type: ignore[method-assign]
        return engine


def test_a_version_whose_step_hangs_fails_and_others_are_loaded(versions: list[ModelVersion]) -> None:
    loader = Hangs(gate_timeout_s=0.2)

    async def run() -> EngineReport:
        async with running(loader) as engines:
            engines.apply([versions[1], versions[0]])
            report = await settled(engines, versions[1])
            await ready(engines, versions[0])
            return report

    report = asyncio.run(run())
    Hangs.released.set()
    assert report.state == "failed"
    assert report.reason is not None
    assert "gate_timeout_s, 0.2 s" in report.reason


def test_a_full_disk_and_a_broken_download_are_tried_again(versions: list[ModelVersion]) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    attempts = iter([full, ConnectionResetError("reset by peer"), None])

    def fetch(directory: Path) -> None:
        with reported("models:/tiny/1 cannot be downloaded", "try again later"):
            if error := next(attempts):
                raise error

    seen: list[EngineReport] = []

    async def run() -> None:
        async with running(Loader(on_fetch=fetch)) as engines:
            engines.apply(versions[:1])
            while not seen or seen[-1].state != "ready":
                last = engines.reports[versions[0].ref]
                seen.append(last)
                await engines.until(lambda last=last: engines.reports[versions[0].ref] is not last)
                seen.append(engines.reports[versions[0].ref])

    asyncio.run(run())
    retrying = [report.reason or "" for report in seen if report.state == "retrying"]
    assert "No space left on device" in retrying[0]
    assert "reset by peer" in retrying[-1]


def test_what_may_pass_is_not_tried_again_once_it_is_not_wanted(versions: list[ModelVersion]) -> None:
    fetched: list[str] = []

    def fetch(directory: Path) -> None:
        fetched.append(directory.name)
        raise ConnectionResetError("reset by peer")

    async def run() -> None:
        async with running(Loader(on_fetch=fetch)) as engines:
            engines.apply(versions[:1])
            report = await settled(engines, versions[0])
            assert report.state == "retrying"
            engines.apply([])
            assert engines.reports == {}

    asyncio.run(run())


def exhaust(directory: Path) -> None:
    """Run out of memory as torch does."""
    if directory.name == "v1":
        torch.empty(2**62, dtype=torch.uint8)


def test_a_version_that_runs_out_of_memory_is_too_large_until_another_one_is_freed(
    versions: list[ModelVersion],
) -> None:
    loader = Loader(on_load=lambda directory: exhaust(directory) if loader.alive else None)

    async def run() -> None:
        async with running(loader) as engines:
            engines.apply(versions[:1])
            served = await ready(engines, versions[0])
            before = await served.complete("The", PARAMS)
            engines.apply(versions[:2])
            report = await settled(engines, versions[1])
            assert report.state == "too_large"
            assert "kv_cache_memory_bytes" in (report.reason or "")
            assert await served.complete("The", PARAMS) == before
            del served
            engines.apply(versions[1:2])
            await engines.until(lambda: engines.get(versions[1].ref) is not None)

    asyncio.run(run())


class Small(Loader):
    """On a machine that has room for one engine."""

    def free_bytes(self) -> int:
        return 2**30 if not self.alive else 2**20


def test_a_version_for_which_there_is_no_memory_is_not_even_loaded(versions: list[ModelVersion]) -> None:
    loader = Small()

    async def run() -> EngineReport:
        async with running(loader) as engines:
            engines.apply(versions[:1])
            await ready(engines, versions[0])
            engines.apply(versions[:2])
            report = await settled(engines, versions[1])
            engines.apply(versions[1:2])
            await engines.until(lambda: engines.get(versions[1].ref) is not None)
            return report

    report = asyncio.run(run())
    assert report.state == "too_large"
    assert report.reason is not None
    assert "0.000977 GiB are free" in report.reason
    assert loader.loaded == [versions[0].ref, versions[1].ref]
