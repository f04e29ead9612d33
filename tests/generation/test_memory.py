"""What an engine takes of memory is what was said before, and comes back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.backends.quantize import Quantization
from llama_ray.generation.engine import Engine
from llama_ray.generation.memory import required_bytes
from llama_ray.generation.options import EngineOptions
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained
from llama_ray.utils.memory import release_memory
from tests.processes import fresh_processes
from tests.small_models import small_config

MIB = 2**20
NOISE = 32 * MIB
OVERHEAD = 64 * MIB


@pytest.fixture(scope="module")
def directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of 100 MiB in bfloat16."""
    directory = tmp_path_factory.mktemp("model")
    config = small_config(
        16_000, hidden_size=768, num_layers=4, num_heads=12, num_kv_heads=4, intermediate_size=2048
    )
    save_pretrained(Llama(config, dtype=torch.bfloat16), tokenizer, directory)
    return directory


class Peak:
    """The most memory that this process takes beyond what it had at the beginning."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self.now = self._highest = self._taken()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    @property
    def highest(self) -> int:
        return self._highest - self._before

    @property
    def growth(self) -> int:
        return self._taken() - self._before

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._thread.start()
        yield
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self._highest = max(self._highest, self._taken())

    def _taken(self) -> int:
        # Pages of files that are read belong to the system.
        memory = self._process.memory_info()
        return int(memory.rss - memory.shared)


class Measured(NamedTuple):
    """Bytes that an engine was said to take, took at most, has in weights, took while it lived, and left."""

    required: int
    highest: int
    weights: int
    held: int
    left: int


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.float32, "int4")],
)
def test_an_engine_takes_no_more_than_was_said_and_gives_it_back(
    directory: Path, dtype: torch.dtype, quantization: Quantization | None
) -> None:
    # In a process of its own: in one that has run other tests, memory comes and goes meanwhile.
    with fresh_processes().Pool(1) as pool:
        found = pool.apply(measure, (directory, dtype, quantization))
    assert found.highest - NOISE <= found.required <= 1.25 * found.highest + OVERHEAD
    assert found.weights < found.held
    assert found.left < 0.1 * found.required


def measure(directory: Path, dtype: torch.dtype, quantization: Quantization | None) -> Measured:
    options = EngineOptions(quantization=quantization, kv_cache_memory_bytes=8 * MIB, max_num_seqs=4)
    required = required_bytes(directory, dtype, "cpu", options)
    release_memory()
    peak = Peak()
    with peak.watched():
        engine = Engine.from_pretrained(directory, dtype, "cpu", options)
        engine.generate("The dog", SamplingParams(max_tokens=4))
    weights, held = engine.stats.weight_bytes, peak.growth
    engine.close()
    del engine
    release_memory()
    return Measured(required, peak.highest, weights, held, peak.growth)
