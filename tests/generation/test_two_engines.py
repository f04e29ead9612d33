"""Engines in one process do not disturb each other, also while one is loaded, and one that is closed leaves nothing."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.completion import Completion
from llama_ray.generation.engine import Engine
from llama_ray.generation.engine_thread import EngineThread, Item
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.pretrained import save_pretrained
from llama_ray.utils.memory import release_memory
from tests.small_models import random_model, small_config

PROMPTS = ["def", "The quick brown fox", "Zwölf Box", "a", "漢字とかな 🙂"]
PARAMS = SamplingParams(
    max_tokens=100, seed=3, ignore_eos=True, top_p=0.9, repetition_penalty=1.1, logprobs=2, n=2
)
LOADS = 6


@pytest.fixture(scope="module")
def directories(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two models of different shapes."""
    directories = []
    for number, hidden in enumerate((256, 320)):
        config = small_config(tokenizer.vocab_size, hidden_size=hidden, intermediate_size=2 * hidden)
        directories.append(tmp_path_factory.mktemp("model"))
        save_pretrained(random_model(config, seed=number), tokenizer, directories[-1])
    return directories


@pytest.fixture(params=[1, 2], ids="{} OpenMP threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def load(directory: Path) -> Engine:
    return Engine.from_pretrained(directory, device="cpu", quantization="int8", max_num_seqs=8)


class Server:
    """An engine in a thread, and what its requests have got."""

    def __init__(self, directory: Path) -> None:
        self._items: queue.Queue[tuple[int, Item]] = queue.Queue()
        self.thread = EngineThread[int](load(directory), self._deliver)

    def answers(self) -> list[Delta]:
        """Return what the candidates of all prompts get, at once."""
        for number, prompt in enumerate(PROMPTS):
            self.thread.submit(prompt, PARAMS, number)
        deltas: dict[tuple[int, int], list[Delta]] = defaultdict(list)
        unfinished = len(PROMPTS) * PARAMS.n
        while unfinished:
            number, item = self._items.get(timeout=60)
            assert isinstance(item, list)
            for delta in item:
                deltas[number, delta.index].append(delta)
                unfinished -= delta.finish_reason is not None
        return [Delta.joined(deltas[key]) for key in sorted(deltas)]

    def _deliver(self, items: list[tuple[int, Item]]) -> None:
        for item in items:
            self._items.put(item)


def check_same(answers: list[Delta], expected: list[Completion]) -> None:
    for answer, completion in zip(answers, expected, strict=True):
        assert answer.token_ids == completion.token_ids
        assert answer.logprobs == completion.logprobs


def test_engines_beside_each_other_answer_as_alone_while_others_come_and_go(
    directories: list[Path], threads: None
) -> None:
    expected = [load(directory).generate(PROMPTS, PARAMS) for directory in directories]
    servers = [Server(directory) for directory in directories]
    loads = [0]

    def load_and_drop() -> None:
        for number in range(LOADS):
            with load(directories[number % 2]) as engine:
                engine.generate("a", SamplingParams(max_tokens=2))
            loads[0] += 1

    answers: dict[int, list[list[Delta]]] = {0: [], 1: []}

    def ask(number: int) -> None:
        while loads[0] < LOADS:
            answers[number].append(servers[number].answers())

    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(load_and_drop), pool.submit(ask, 0), pool.submit(ask, 1)]:
            done.result(120)
    for number in (0, 1):
        assert answers[number]
        for answer in answers[number]:
            check_same(answer, expected[number])
        servers[number].thread.stop()


def test_a_closed_engine_leaves_no_threads_and_processes(directories: list[Path], threads: None) -> None:
    first, process = Server(directories[0]), psutil.Process()
    first.answers()
    num_threads, children = process.num_threads(), set(process.children(recursive=True))
    second = Server(directories[1])
    second.answers()
    second.thread.submit("a", SamplingParams(regex="[ab]{3}"), 0)
    second.thread.stop()
    del second
    release_memory()
    psutil.wait_procs(set(process.children(recursive=True)) - children, timeout=30)
    assert set(process.children(recursive=True)) == children
    assert process.num_threads() <= num_threads
    assert first.answers()
    first.thread.stop()
