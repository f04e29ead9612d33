"""How a replica makes an engine of a version."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.weight_files import CheckpointError
from llama_ray.utils.memory import release_memory
from serve_app.registry.messages import ModelVersion
from serve_app.replica.loader import EngineLoader, TooLargeError, resident_bytes
from tests.serve_app.replica.helpers import OPTIONS, version


def test_a_draft_model_is_fetched_and_drafts(versions: list[ModelVersion]) -> None:
    loader = EngineLoader(options=replace(OPTIONS, draft_model=versions[0].location))
    engine = loader.load(loader.fetch(versions[0]))
    engine.generate("The", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    assert engine.stats.accepted_tokens > 0


def test_a_type_is_what_the_engine_computes_in(versions: list[ModelVersion]) -> None:
    weights = []
    for dtype in ("float32", "bfloat16"):
        loader = EngineLoader(dtype=dtype, options=OPTIONS)
        weights.append(loader.load(loader.fetch(versions[0])).stats.weight_bytes)
    assert weights[0] == 2 * weights[1]


def test_engines_draw_different_seeds(versions: list[ModelVersion]) -> None:
    loader, params = EngineLoader(options=OPTIONS), SamplingParams(max_tokens=50, ignore_eos=True)
    engines = [loader.load(loader.fetch(versions[0])) for _ in range(2)]
    first, second = (engine.generate("The", params)[0].token_ids for engine in engines)
    assert first != second


def test_a_missing_directory_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        EngineLoader().fetch(version(tmp_path / "nowhere"))


def test_a_cache_beyond_the_free_memory_is_too_large(versions: list[ModelVersion]) -> None:
    loader = EngineLoader(options=replace(OPTIONS, kv_cache_memory_bytes=2**50))
    with pytest.raises(
        TooLargeError,
        match=r"^it needs .* GiB of memory on cpu, and .* GiB are free; set kv_cache_memory_bytes",
    ):
        loader.check_room(loader.fetch(versions[0]))


def test_engines_keep_within_the_memory_of_their_replica(versions: list[ModelVersion]) -> None:
    # The cache is written only as far as requests need it; it counts as a whole.
    cache = 2**30
    options = replace(OPTIONS, max_num_seqs=16384, kv_cache_memory_bytes=cache)
    for engines in (1, 2):
        loader = EngineLoader(options=options, memory_bytes=resident_bytes() + int((engines + 0.5) * cache))
        files = loader.fetch(versions[0])
        loaded = []
        for _ in range(engines):
            loader.check_room(files)
            loaded.append(loader.load(files))
        with pytest.raises(
            TooLargeError, match=r"^it needs .* on cpu, and 0\..* GiB of memory_bytes are free; set"
        ):
            loader.check_room(files)
        loaded.pop().close()
        release_memory()
        loader.check_room(files)


@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_it_is_known_what_makes_a_prompt_of_a_conversation(
    versions: list[ModelVersion], tmp_path: Path, template: str | None
) -> None:
    directory = shutil.copytree(versions[0].location, tmp_path / "model")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    loader = EngineLoader(options=OPTIONS)
    files = loader.fetch(version(directory))
    info = loader.check(loader.load(files), files)
    assert info.chat_template == ("from the checkpoint" if template else "plain")
