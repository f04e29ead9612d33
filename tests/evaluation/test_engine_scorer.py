from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.evaluation.results import EvaluationError
from llama_ray.evaluation.scoring import Generation, Scoring
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.pretrained import load_pretrained


def random_tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(300) for _ in range(count))


def test_log_probabilities_are_those_of_a_plain_forward_pass(checkpoint: Path, scorer: EngineScorer) -> None:
    rng = random.Random(0)
    context = random_tokens(rng, 70)
    requests = [Scoring((*context, *random_tokens(rng, n)), 70) for n in (1, 1, 9, 40)]
    # One token more than the model reads: nobody asks for what follows the last one.
    requests += [Scoring(random_tokens(rng, 129), 1), Scoring(random_tokens(rng, 2), 1), requests[0]]
    model, _ = load_pretrained(checkpoint)
    for request, scored in zip(requests, scorer.score(requests), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([request.tokens[:-1]]))[0, request.start - 1 :]
        wanted = torch.tensor(request.tokens[request.start :])
        expected = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
        assert scored.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert scored.greedy == tuple((logits.argmax(-1) == wanted).tolist())


def test_what_requests_share_is_computed_once(checkpoint: Path) -> None:
    rng = random.Random(1)
    examples = random_tokens(rng, 64)
    questions = [(*examples, *random_tokens(rng, 36)) for _ in range(6)]
    requests = [Scoring((*question, *random_tokens(rng, 3)), 100) for question in questions for _ in range(4)]
    rng.shuffle(requests)
    with Engine.from_pretrained(checkpoint, device="cpu") as engine:
        EngineScorer("m", engine).score(requests)
        # Whole blocks of 32 tokens are shared, and the last token of a request is no input.
        assert engine.stats.prompt_tokens == 102 + 5 * (102 - 64) + 18 * (102 - 96)


def test_requests_that_differ_in_their_last_token_are_one(checkpoint: Path) -> None:
    context = random_tokens(random.Random(3), 40)
    with Engine.from_pretrained(checkpoint, device="cpu") as engine:
        EngineScorer("m", engine).score([Scoring((*context, token), 40) for token in range(200)])
        assert engine.stats.prompt_tokens == 40 + 8


def test_generation_gives_each_prompt_its_own_text(scorer: EngineScorer) -> None:
    params = SamplingParams(max_tokens=8, temperature=0)
    rng = random.Random(2)
    prompts = [random_tokens(rng, n) for n in (40, 3, 12)]
    together = scorer.generate([Generation(prompt, params) for prompt in prompts])
    assert together == [scorer.generate([Generation(prompt, params)])[0] for prompt in prompts]


def test_a_request_that_the_model_cannot_read_is_refused_in_one_line(scorer: EngineScorer) -> None:
    with pytest.raises(EvaluationError, match="130 tokens") as error:
        scorer.score([Scoring((1,) * 131, 1)])
    assert "\n" not in str(error.value)
    # Nothing of it is left behind.
    assert scorer.score([Scoring((1, 2), 1)])
