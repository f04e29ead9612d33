"""What the other requests of an engine notice of a costly grammar, or of one whose process is lost: nothing."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.completion import Completion
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.generation.speculation.prompt_lookup import PromptLookup
from llama_ray.model.llama import Llama
from tests.generation.constraints.helpers import COSTLY_MASK, Processes, costly_schema

FREE = SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
CONSTRAINED = SamplingParams(regex="([a-z]{2,5} ){12,}", max_tokens=100, seed=4, n=3)


def check_same(deltas: list[list[Delta]], expected: list[Completion]) -> None:
    got = [Delta.joined(each) for each in deltas]
    assert [(d.text, d.token_ids, d.finish_reason) for d in got] == [
        (c.text, c.token_ids, c.finish_reason) for c in expected
    ]


def test_streams_go_on_while_a_costly_grammar_is_compiled(engine: Engine) -> None:
    with ThreadPoolExecutor() as pool:
        costly = pool.submit(engine.prepare, "a", SamplingParams(json_schema=costly_schema()))
        answered = 0
        while not costly.done():
            engine.generate("a", FREE)
            answered += 1
    with pytest.raises(ValueError, match=r"takes more than (1 s of processor time|10 s) to compile"):
        costly.result()
    assert answered > 3
    engine.close()


def test_a_step_does_not_wait_for_a_mask_that_is_late(engine: Engine, processes: Processes) -> None:
    expected = engine.generate("a", CONSTRAINED)
    late = engine.submit("a", CONSTRAINED)
    other = engine.submit("b", dataclasses.replace(FREE, max_tokens=40))
    deltas: dict[tuple[int, int], list[Delta]] = defaultdict(list)

    def step() -> None:
        for delta in engine.step():
            deltas[delta.request_id, delta.index].append(delta)

    step()
    processes.forks()[0].suspend()
    while not (deltas[other, 0] and deltas[other, 0][-1].finish_reason):
        step()
    # Those of the first step, and of the masks that had come before.
    assert all(len(deltas[late, index]) <= 2 for index in range(3))
    processes.forks()[0].resume()
    while engine.has_work:
        step()
    check_same([deltas[late, index] for index in range(3)], expected)
    engine.close()


def test_a_costly_mask_ends_its_own_request(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    costly = SamplingParams(regex=COSTLY_MASK, max_tokens=150)
    done, other = engine.generate(["a", "b"], [costly, FREE])
    assert (done.finish_reason, other.finish_reason) == ("constraint", "length")
    assert done.text
    assert "its output cannot go on: " in caplog.text
    engine.close()


def test_a_lost_process_changes_no_output(
    engine: Engine, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    expected = engine.generate("a", CONSTRAINED)
    for kill in (lambda: processes.forks()[0].kill(), lambda: processes.template().kill()):
        engine.submit("a", CONSTRAINED)
        deltas: dict[int, list[Delta]] = defaultdict(list)
        steps = 0
        while engine.has_work:
            if steps == 10:
                kill()
            for delta in engine.step():
                deltas[delta.index].append(delta)
            steps += 1
        check_same([deltas[index] for index in range(3)], expected)
    assert caplog.text.count("another one goes on") == 2
    engine.close()


def test_drafts_and_preemption_change_no_constrained_output(model: Llama, tokenizer: Tokenizer) -> None:
    params = [dataclasses.replace(CONSTRAINED, seed=seed) for seed in range(3)]
    params.append(SamplingParams(regex="(the |fox ){30,}", temperature=0, max_tokens=100))
    prompts = ["the fox the fox", "a", "the dog the dog the", "fox"]
    with Engine(model, tokenizer) as engine:
        expected = engine.generate(prompts, params)
    memory = engine.stats.kv_cache_bytes // engine.stats.blocks * 16
    with Engine(model, tokenizer, proposer=PromptLookup(), kv_cache_memory_bytes=memory) as small:
        assert small.generate(prompts, params) == expected
        assert small.stats.accepted_tokens
        assert small.stats.preemptions
