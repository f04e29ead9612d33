from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from llama_ray.evaluation.engine_scorer import EngineScorer
from llama_ray.evaluation.parts import Part, PartedScorer, compute_with
from llama_ray.evaluation.results import EvaluationError
from llama_ray.evaluation.scoring import Generation, Scoring
from llama_ray.generation.sampling.params import SamplingParams

RNG = random.Random(0)
CONTEXTS = [tuple(RNG.randrange(300) for _ in range(124)) for _ in range(3)]
# More than a part holds.
SCORINGS = [Scoring((*CONTEXTS[i % 3], *(RNG.randrange(300) for _ in range(4))), 124) for i in range(700)]
GENERATIONS = [
    Generation((5, 6, 7), SamplingParams(max_tokens=5, temperature=0, stop=("a",))),
    Generation((5, 6), SamplingParams(max_tokens=4, seed=1, logit_bias={3: 1.0})),
]


def parted(scorer: EngineScorer, directory: Path, computed: list[Part]) -> PartedScorer:
    compute = compute_with(scorer, str(directory))

    def counted(parts: Sequence[Part]) -> Iterator[int]:
        computed.extend(parts)
        return compute(parts)

    return PartedScorer("m", scorer.tokenizer, scorer.max_seq_len, str(directory), counted)


def test_answers_are_the_same_and_computed_once(scorer: EngineScorer, tmp_path: Path) -> None:
    computed: list[Part] = []
    kept = parted(scorer, tmp_path, computed)
    reports: list[tuple[int, int]] = []
    answers = kept.score(SCORINGS, lambda done, total: reports.append((done, total)))
    assert answers == scorer.score(SCORINGS)
    assert len(computed) == 2
    assert reports[-1] == (700, 700)
    texts = kept.generate(GENERATIONS)
    assert texts == scorer.generate(GENERATIONS)
    before = len(computed)
    again = parted(scorer, tmp_path, computed)
    assert (again.score(SCORINGS), again.generate(GENERATIONS)) == (answers, texts)
    assert len(computed) == before


def test_what_was_killed_goes_on_with_the_parts_that_are_missing_or_damaged(
    scorer: EngineScorer, tmp_path: Path
) -> None:
    answers = parted(scorer, tmp_path, []).score(SCORINGS)
    first, second = sorted(tmp_path.iterdir())
    second.write_text(second.read_text()[:-100])
    computed: list[Part] = []
    assert parted(scorer, tmp_path, computed).score(SCORINGS) == answers
    assert [part.file for part in computed] == [second.name]
    first.unlink()
    assert parted(scorer, tmp_path, computed).score(SCORINGS) == answers
    assert [part.file for part in computed[1:]] == [first.name]


@pytest.mark.parametrize("requests", [SCORINGS[:2], GENERATIONS])
def test_a_part_survives_the_way_to_another_process(
    requests: Sequence[Scoring] | Sequence[Generation],
) -> None:
    part = Part(tuple(requests))  # type: ignore[arg-type]
    assert Part.from_json(part.to_json()) == part
    assert Part.from_json(part.to_json()).file == part.file


def test_storage_that_does_not_keep_is_told(scorer: EngineScorer, tmp_path: Path) -> None:
    lost = PartedScorer(
        "m", scorer.tokenizer, 128, str(tmp_path), compute_with(scorer, str(tmp_path / "else"))
    )
    with pytest.raises(EvaluationError, match="give an output on storage that all nodes share"):
        lost.score(SCORINGS[:1])
