from __future__ import annotations

import dataclasses
import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.completion import Completion, GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.row import Row
from llama_ray.generation.sampling.sampler import Sample, Sampler
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.model.config import RopeScaling
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained
from tests.small_models import random_model, small_config

PROMPTS = [
    "def",
    "The quick brown fox jumps over the lazy",
    "Zwölf Box",
    "漢字とかな 🙂",
    "a",
    "and the dog sleeps on.",
]
VARIED = SamplingParams(max_tokens=24, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True)


def drain(engine: Engine) -> dict[tuple[int, int], list[Delta]]:
    deltas = defaultdict(list)
    while engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id, delta.index].append(delta)
    return deltas


SHAPES = {
    "multi-head": {},
    "grouped": {"num_kv_heads": 2},
    "tied": {"num_kv_heads": 1, "tie_embeddings": True},
    "llama3": {"rope_scaling": RopeScaling(rope_type="llama3", factor=8.0, original_max_seq_len=32)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_equal_those_of_transformers_alone_and_in_a_batch(
    shape: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = small_config(tokenizer.vocab_size, **{"num_kv_heads": 4, **SHAPES[shape]})
    save_pretrained(random_model(config, seed=3), tokenizer, tmp_path)
    peer: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    # With fewer max_num_seqs than prompts, sequences join while others generate.
    engine = Engine.from_pretrained(tmp_path, device="cpu", max_num_seqs=3)
    params = SamplingParams(max_tokens=70, temperature=0)
    batched = engine.generate(PROMPTS, params)
    for prompt, completion in zip(PROMPTS, batched, strict=True):
        ids = tokenizer.encode(prompt, bos=True)
        expected = peer.generate(
            torch.tensor([ids]),
            max_new_tokens=70,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=tokenizer.eos_id,
        )[0, len(ids) :].tolist()
        assert completion.prompt_token_ids == ids
        assert completion.token_ids == expected
        assert completion.text == tokenizer.decode(expected)
        assert engine.generate([prompt], params)[0] == completion


def test_a_seed_gives_the_same_tokens_in_any_batch(model: Llama, tokenizer: Tokenizer) -> None:
    alone = Engine(model, tokenizer, max_num_seqs=1).generate(PROMPTS, VARIED)
    engine = Engine(model, tokenizer, max_num_seqs=8)
    assert engine.generate(PROMPTS, VARIED) == alone
    # Again, joining one by one a batch of requests with other parameters.
    ids, tokens = [], defaultdict(list)
    for i in range(40):
        if i < len(PROMPTS):
            engine.submit("dog", SamplingParams(max_tokens=5 + i, temperature=2.0, top_k=i))
            ids.append(engine.submit(PROMPTS[i], VARIED))
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    assert not engine.has_work
    assert [tokens[i] for i in ids] == [c.token_ids for c in alone]


def test_seeds_and_candidates_differ_and_the_first_candidate_equals_that_of_n_1(engine: Engine) -> None:
    one = engine.generate(["The"], VARIED)
    four = engine.generate(["The"], dataclasses.replace(VARIED, n=4))
    assert four[0] == one[0]
    other = engine.generate(["The"], dataclasses.replace(VARIED, seed=12))
    assert len({tuple(c.token_ids) for c in [*four, *other]}) == 5


def test_without_a_seed_each_request_draws_its_own(model: Llama, tokenizer: Tokenizer) -> None:
    params = dataclasses.replace(VARIED, seed=None)
    runs = [Engine(model, tokenizer, seed=seed).generate(["The", "The"], params) for seed in (0, 0, 1)]
    assert runs[0][0].token_ids != runs[0][1].token_ids
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


def test_n_gives_candidates_in_the_order_of_the_prompts(engine: Engine) -> None:
    got = engine.generate(["a", "The quick"], SamplingParams(max_tokens=3, n=3))
    expected = [engine.encode("a")] * 3 + [engine.encode("The quick")] * 3
    assert [c.prompt_token_ids for c in got] == expected


def test_more_requests_than_max_num_seqs_all_finish(engine: Engine) -> None:
    lengths = [1 + i * 7 % 40 for i in range(60)]
    ids = [
        engine.submit([1 + i, 2, 3][: 1 + i % 3], SamplingParams(max_tokens=n, ignore_eos=True))
        for i, n in enumerate(lengths)
    ]
    assert engine.stats.waiting == 60
    deltas = drain(engine)
    assert [sum(len(d.token_ids) for d in deltas[i, 0]) for i in ids] == lengths
    assert all(deltas[i, 0][-1].finish_reason == "length" for i in ids)
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.requests) == (0, 0, 60)
    assert stats.generated_tokens == sum(lengths)
    assert stats.prompt_tokens == sum(1 + i % 3 for i in range(60))


def test_each_step_gives_each_running_sequence_a_token(engine: Engine) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    first = engine.submit("a", params)
    assert [d.request_id for d in engine.step()] == [first]
    second = engine.submit("b", params)
    assert {d.request_id for d in engine.step()} == {first, second}


def test_end_of_text_stops_unless_ignored(model: Llama, tokenizer: Tokenizer) -> None:
    eos = tokenizer.eos_id
    assert eos is not None
    params = SamplingParams(max_tokens=20, seed=2, logit_bias={eos: -100.0})
    free = Engine(model, tokenizer).generate(["The quick"], params)[0]
    assert free.finish_reason == "length"
    cut = next(i for i in range(3, 20) if free.token_ids[i] not in free.token_ids[:i])
    engine = Engine(model, tokenizer, eos_ids=[free.token_ids[cut]])
    stopped = engine.generate(["The quick"], params)[0]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: cut + 1]
    assert stopped.text == tokenizer.decode(free.token_ids[:cut])
    assert engine.generate(["The quick"], dataclasses.replace(params, ignore_eos=True))[0] == free

    at_once = SamplingParams(temperature=0, logit_bias={eos: 1000.0})
    assert Engine(model, tokenizer).generate(["x"], at_once)[0].token_ids == [eos]


@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_cut_the_text_across_tokens(engine: Engine, length: int) -> None:
    params = dataclasses.replace(VARIED, max_tokens=60)
    whole = engine.generate(["The quick"], params)[0].text
    for start in range(2, len(whole) - length, 3):
        stop = whole[start : start + length]
        request_id = engine.submit("The quick", dataclasses.replace(params, stop=(stop, "never there")))
        deltas = drain(engine)[request_id, 0]
        assert "".join(d.text for d in deltas) == whole[: whole.index(stop)]
        assert deltas[-1].finish_reason == "stop"


def test_streams_hold_whole_characters_and_add_up_to_the_text(engine: Engine, tokenizer: Tokenizer) -> None:
    # The bias leaves only tokens of 🙂, é and a, so that their bytes mix.
    spelled = set(tokenizer.encode("🙂é a"))
    bias = dict.fromkeys(spelled, 100.0)
    params = SamplingParams(max_tokens=60, seed=5, logit_bias=bias, n=3)
    expected = engine.generate(["🙂"], params)
    request_id = engine.submit("🙂", params)
    deltas = drain(engine)
    for index, completion in enumerate(expected):
        pieces = [d.text for d in deltas[request_id, index]]
        assert "".join(pieces) == completion.text == tokenizer.decode(completion.token_ids)
        assert len(pieces) == 60
    prompt = tokenizer.encode("漢🙂")
    # Each token is forced in turn, so the output is the bytes of whole characters.
    forced = []
    for token in prompt:
        request_id = engine.submit([1], SamplingParams(max_tokens=1, temperature=0, logit_bias={token: 1e4}))
        forced.append(drain(engine)[request_id, 0][0].token_ids[0])
    assert forced == prompt


def test_logprobs_equal_those_of_transformers(
    engine: Engine, model: Llama, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_pretrained(model, tokenizer, tmp_path)
    peer: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    got = engine.generate(["The quick", "a"], dataclasses.replace(VARIED, logprobs=5, repetition_penalty=1.2))
    for completion in got:
        assert completion.logprobs is not None
        ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
        with torch.no_grad():
            logprobs = peer(ids).logits[0].log_softmax(-1)[len(completion.prompt_token_ids) - 1 : -1]
        assert [r.token_id for r in completion.logprobs] == completion.token_ids
        for report, expected in zip(completion.logprobs, logprobs, strict=True):
            assert report.logprob == pytest.approx(expected[report.token_id].item(), abs=1e-4)
            assert [v for _, v in report.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-4)
    assert engine.generate(["a"])[0].logprobs is None


def test_abort_lets_a_waiting_request_start_at_once(model: Llama, tokenizer: Tokenizer) -> None:
    engine = Engine(model, tokenizer, max_num_seqs=1)
    long = SamplingParams(max_tokens=100, ignore_eos=True)
    running, waiting, third = (engine.submit("a", long) for _ in range(3))
    engine.step()
    engine.abort(waiting)
    engine.abort(running)
    assert (engine.stats.running, engine.stats.waiting) == (0, 1)
    assert [d.request_id for d in engine.step()] == [third]
    engine.abort(third)
    engine.abort(third)
    assert not engine.has_work
    assert engine.step() == []


def test_an_abort_during_a_step_leaves_no_delta(engine: Engine, model: Llama) -> None:
    kept, dropped = engine.submit("a", VARIED), engine.submit("b", VARIED)
    hook = model.norm.register_forward_hook(lambda *_: engine.abort(dropped))
    try:
        assert [d.request_id for d in engine.step()] == [kept]
    finally:
        hook.remove()
    assert engine.stats.running == 1
    assert engine.stats.generated_tokens == 1


@pytest.mark.parametrize("moment", ["planned", "computed", "sampled"])
def test_an_abort_during_a_step_changes_nothing_for_the_others(
    engine: Engine,
    model: Llama,
    moment: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client that leaves must not shift the samples of those behind it, nor let the step fail."""
    want = {prompt: engine.generate([prompt], VARIED)[0].token_ids for prompt in ("b", "c")}
    dropped, *kept = [engine.submit(prompt, VARIED) for prompt in ("a", "b", "c")]
    deltas = engine.step()
    original = Sampler.sample

    def sample(sampler: Sampler, logits: torch.Tensor, rows: Sequence[Row]) -> list[Sample]:
        samples = original(sampler, logits, rows)
        engine.abort(dropped)
        return samples

    if moment == "sampled":
        monkeypatch.setattr(Sampler, "sample", sample)
    module = model.embed_tokens if moment == "planned" else model.norm
    hook = module.register_forward_hook(lambda *_: None if moment == "sampled" else engine.abort(dropped))
    try:
        second = engine.step()
    finally:
        hook.remove()
        monkeypatch.undo()
    assert {d.request_id for d in second} == {*kept}
    deltas += second
    for rest in drain(engine).values():
        deltas += rest
    for request_id, prompt in zip(kept, want, strict=True):
        assert [t for d in deltas if d.request_id == request_id for t in d.token_ids] == want[prompt]
    assert not caplog.records


@pytest.mark.parametrize(
    ("prompt", "values", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5, 10_000], {}, "token id 10000 is outside the model's vocabulary"),
        ([-1], {}, "token id -1 is outside"),
        ([1.5], {}, "give text or a list of token ids"),
        (7, {}, "a prompt is int; give text or a list of token ids"),
        (
            [1] * 160,
            {},
            "the prompt has 160 tokens, which leaves no room for an answer within max_seq_len 160",
        ),
        ([1] * 150, {"max_tokens": 11}, "exceed max_seq_len 160; set max_tokens to at most 10"),
        ([1], {"logit_bias": {99_999: 1.0}}, "token id 99999 is outside"),
        ("\ud800", {}, "lone surrogate"),
    ],
)
def test_a_bad_request_is_refused_and_others_continue(
    engine: Engine, prompt: object, values: dict[str, object], message: str
) -> None:
    expected = engine.generate(["The quick"], VARIED)[0]
    request_id = engine.submit("The quick", VARIED)
    engine.step()
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        engine.submit(prompt, SamplingParams(**values))  # type: ignore[arg-type]
    rest = drain(engine)[request_id, 0]
    assert [t for d in rest for t in d.token_ids] == expected.token_ids[1:]
    # Among several prompts it stops `generate` before anything runs, and leaves no request behind.
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        engine.generate(["a", prompt], SamplingParams(**values))  # type: ignore[arg-type, list-item]
    assert not engine.has_work


def test_a_request_may_reach_the_last_position_of_the_context(engine: Engine) -> None:
    done = engine.generate([[1] * 150], SamplingParams(max_tokens=10, ignore_eos=True))[0]
    assert len(done.token_ids) == 10
    assert done.finish_reason == "length"


def test_without_a_tokenizer_token_ids_work_and_text_is_refused(model: Llama, engine: Engine) -> None:
    bare = Engine(model, None)
    got = bare.generate([[4, 5, 6]], VARIED)[0]
    assert got.token_ids == engine.generate([[4, 5, 6]], VARIED)[0].token_ids
    assert got.text == ""
    with pytest.raises(ValueError, match="no tokenizer to encode text with"):
        bare.submit("text")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        bare.submit([1], SamplingParams(stop="x"))


def test_each_prompt_may_have_its_own_sampling_params(engine: Engine) -> None:
    params = [
        dataclasses.replace(VARIED, seed=i, n=1 + i % 3, max_tokens=4 + i, temperature=i / 4)
        for i in range(len(PROMPTS))
    ]
    alone = [engine.generate([prompt], own) for prompt, own in zip(PROMPTS, params, strict=True)]
    assert engine.generate(PROMPTS, params) == [completion for one in alone for completion in one]
    with pytest.raises(ValueError, match="sampling_params has 0 entries and prompts 6; give one for each"):
        engine.generate(PROMPTS, [])
    with pytest.raises(ValueError, match="sampling_params has 2 entries and prompts 6; give one for each"):
        engine.generate(PROMPTS, params[:2])
    assert not engine.has_work


def test_one_string_is_one_prompt(engine: Engine) -> None:
    params = SamplingParams(max_tokens=3, seed=1)
    assert engine.generate("The quick", params) == engine.generate(["The quick"], params)


def test_progress_counts_completions_and_tokens_and_is_off_by_default(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    params = SamplingParams(max_tokens=5, n=2, seed=1, ignore_eos=True)
    silent = engine.generate(PROMPTS, params)
    assert capsys.readouterr().err == ""
    assert engine.generate(PROMPTS, params, progress=True) == silent
    last = capsys.readouterr().err.split("\r")[-1]
    assert "12/12" in last
    assert "60 tokens, " in last


def test_generate_refuses_to_run_while_other_requests_are_in_progress(engine: Engine) -> None:
    request_id = engine.submit("a", VARIED)
    with pytest.raises(ValueError, match="other requests in progress"):
        engine.generate(["b"])
    assert len(drain(engine)[request_id, 0]) == VARIED.max_tokens


def test_only_the_request_whose_logits_are_not_finite_fails(tokenizer: Tokenizer, model: Llama) -> None:
    broken = Llama(model.config, seed=0)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.embed_tokens.weight[17] = math.nan
    engine = Engine(broken, tokenizer, max_num_seqs=2)
    params = dataclasses.replace(VARIED, logit_bias={17: -100.0})
    expected = Engine(model, tokenizer).generate([[1, 2], [3]], params)
    good, bad, later = (engine.submit(p, params) for p in ([1, 2], [17] * 9, [3]))
    deltas = drain(engine)
    assert [d.finish_reason for d in deltas[bad, 0]] == ["error"]
    assert "not finite" in str(deltas[bad, 0][0].error)
    got = [[t for d in deltas[i, 0] for t in d.token_ids] for i in (good, later)]
    # The later request took the failed one's place.
    assert got == [c.token_ids for c in expected]
    with pytest.raises(GenerationError, match="not finite"):
        engine.generate([[17]])


def test_submit_and_abort_work_from_other_threads(engine: Engine) -> None:
    expected = engine.generate(PROMPTS, VARIED)
    kept: dict[int, Completion] = {}
    start = threading.Barrier(5)

    def client() -> None:
        start.wait()
        for prompt, completion in zip(PROMPTS, expected, strict=True):
            engine.abort(engine.submit("The dog", VARIED))
            kept[engine.submit(prompt, VARIED)] = completion

    clients = [threading.Thread(target=client) for _ in range(4)]
    for thread in clients:
        thread.start()
    start.wait()
    deltas: dict[int, list[int]] = defaultdict(list)
    # In this order: a client may submit its last request after `has_work` has looked.
    while any(t.is_alive() for t in clients) or engine.has_work:
        for delta in engine.step():
            deltas[delta.request_id] += delta.token_ids
    assert len(kept) == 24
    assert {i: deltas[i] for i in kept} == {i: c.token_ids for i, c in kept.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0; it must be at least 1"),
        ({"max_seq_len": 161}, "max_seq_len is 161; it must be from 2 to 160, the model's limit"),
        ({"max_seq_len": 1}, "max_seq_len is 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens is 0; it must be at least 1"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0; it must be at least 1"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes is 0; it must be at least 1"),
        ({"kv_cache_memory_bytes": 10**18}, "of memory are free on cpu; lower it"),
        ({"kv_cache_memory_bytes": 10**4}, "lower max_seq_len, or raise kv_cache_memory_bytes"),
    ],
)
def test_invalid_options_are_refused_with_value_and_limit(
    model: Llama, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(model, None, **options)  # type: ignore[arg-type]
