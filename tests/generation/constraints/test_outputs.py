from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, normalizers

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.constraints.grammar import Constraint, Ending
from llama_ray.generation.constraints.grammars import Grammars
from llama_ray.generation.constraints.waiting import Patience
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.sampler import Sampler
from tests.generation.helpers import Row, logits_after, sample

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["cats", "dögs", 7, None]}, "maxItems": 3},
        "at": {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^[0-9]{2}:[0-9]{2}$"}]},
    },
    "required": ["name", "age", "at"],
    "additionalProperties": False,
}
# The model's: larger than the tokenizer's, as padded embeddings are.
VOCAB_SIZE = 384


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Return a vocabulary like Llama 2's: spaces are U+2581, and rare characters fall back to bytes."""
    letters = [*map(chr, range(33, 127)), "▁", "\n", "th", "the", "▁the", "fo"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("f", "o")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in pieces[:3]])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> Iterator[dict[Tokenizer, Grammars]]:
    """Return the grammars of each vocabulary."""
    by_tokenizer = {t: Grammars(t, VOCAB_SIZE, {t.eos_id or 0}) for t in (tokenizer, sentencepiece)}
    yield by_tokenizer
    for each in by_tokenizer.values():
        each.close()


Generate = Callable[[Tokenizer, SamplingParams, int], tuple[str, Row]]


@pytest.fixture
def generate_text(grammars: dict[Tokenizer, Grammars]) -> Generate:
    def generate(tokenizer: Tokenizer, params: SamplingParams, seed: int) -> tuple[str, Row]:
        """Sample from random logits until the output ends, at most 400 tokens."""
        eos = {tokenizer.eos_id or 0}
        assert params.grammar is not None
        (constraint,) = grammars[tokenizer].constraints(*params.grammar, 1)
        row = Row(params, seed=seed, prompt=[seed], end_ids=eos, constraint=constraint)
        sampler = Sampler()
        while len(row.output) < 400:
            got = sample(logits_after(row, VOCAB_SIZE, 1.0)[None], [row], sampler)[0]
            if got.ending is not None or got.token_id in eos:
                assert got.ending in (None, Ending())
                break
            assert got.token_id is not None
            row.push(got.token_id)
        return tokenizer.decode(row.output, skip_special=False), row

    return generate


@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece"])
@pytest.mark.parametrize(
    "values", [{}, {"temperature": 0}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.8}], ids=str
)
def test_output_is_json_of_its_schema(
    request: pytest.FixtureRequest, generate_text: Generate, kind: str, values: dict[str, Any]
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    for seed in range(4):
        text, _ = generate_text(tokenizer, SamplingParams(json_schema=PERSON, **values), seed)
        jsonschema.validate(json.loads(text), PERSON)


def test_the_schema_of_any_object_yields_json_objects(tokenizer: Tokenizer, generate_text: Generate) -> None:
    # Random logits rarely close what they open, so closing characters get a bias.
    closing = {tokenizer.encode(character)[0]: 4.0 for character in '"}]'}
    for seed in range(4):
        params = SamplingParams(json_schema='{"type": "object"}', logit_bias=closing)
        assert isinstance(json.loads(generate_text(tokenizer, params, seed)[0]), dict)


@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece"])
@pytest.mark.parametrize(
    "regex",
    [r"[a-c]{3,5}", r"(?:yes|no|maybe not)", r"[0-9]{4}-[01][0-9]-\w", r"^(the |fox ){1,4}dog$", "ä?ß+z"],
)
def test_output_matches_its_regex(
    request: pytest.FixtureRequest, generate_text: Generate, kind: str, regex: str
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    for seed in range(4):
        text, _ = generate_text(tokenizer, SamplingParams(regex=regex), seed)
        assert re.fullmatch(regex, text), text


def test_a_constrained_output_is_min_tokens_long_unless_it_is_complete_before(
    tokenizer: Tokenizer, generate_text: Generate
) -> None:
    for seed in range(4):
        text, row = generate_text(
            tokenizer, SamplingParams(regex="[ab]*", max_tokens=90, min_tokens=40), seed
        )
        assert len(row.output) >= 40
        assert re.fullmatch("[ab]*", text)
        text, row = generate_text(
            tokenizer, SamplingParams(regex="[ab]{6}", max_tokens=90, min_tokens=40), seed
        )
        assert len(text) == 6, "a complete output ends even before min_tokens"


def test_constraints_of_one_grammar_have_separate_states(
    tokenizer: Tokenizer, grammars: dict[Tokenizer, Grammars]
) -> None:
    a, b, c = (tokenizer.encode(character)[0] for character in "abc")
    first, second = grammars[tokenizer].constraints("regex", "ab*c", 2)
    first.push(a)
    assert {b, c} <= allowed_by(first)
    assert a in allowed_by(second)
    first.push(c)
    assert outcome(first) == Ending()
    second.push(b)
    ending = outcome(second)
    assert isinstance(ending, Ending)
    assert ending.reason


def test_masks_after_drafts_do_not_change_the_state(
    tokenizer: Tokenizer, grammars: dict[Tokenizer, Grammars]
) -> None:
    a, b, c = (tokenizer.encode(character)[0] for character in "abc")
    eos = tokenizer.eos_id
    for draft in ([a, b, c], [a, c, b], [c], [a, b, c, eos], [a, b, c, a], [a, eos]):
        constraint, other = grammars[tokenizer].constraints("regex", "abca?", 2)
        assert a in allowed_by(constraint, draft)
        assert a in allowed_by(other)
        expected = [{a}, {b}, {c}, {a, eos}]
        for position in range(1, len(draft) + 1):
            if draft[:position] != [a, b, c, a][:position]:
                break
            got = constraint.outcome(draft[:position])
            assert got == Ending() if position == 4 else expected[position] <= tokens_of(got)
        for token in (a, b, c):
            constraint.push(token)
        assert allowed_by(constraint) == {a, eos}


def test_a_token_that_was_not_allowed_ends_its_own_row_only(
    tokenizer: Tokenizer, grammars: dict[Tokenizer, Grammars]
) -> None:
    params = SamplingParams(regex="a{30}")
    rows = [
        Row(params, end_ids=[1], constraint=c) for c in grammars[tokenizer].constraints("regex", "a{30}", 3)
    ]
    rows[1].push(tokenizer.encode("z")[0])
    got = sample(torch.zeros(3, VOCAB_SIZE), rows)
    assert got[0] == got[2]
    assert got[0].ending is None
    assert got[1].token_id is None
    assert got[1].ending is not None
    assert got[1].ending.reason
    assert "\n" not in got[1].ending.reason


def test_a_constraint_that_the_vocabulary_cannot_spell_ends_its_own_row_only() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.decoder = decoders.ByteLevel()
    grammars = Grammars(Tokenizer(backend, {}), 2, {1})
    rows = [
        Row(SamplingParams(regex=regex), output=[0], constraint=grammars.constraints("regex", regex, 1)[0])
        for regex in ("ab", "ab?", "aaa")
    ]
    got = sample(torch.zeros(3, 2), rows)
    assert got[0].ending == Ending("no token of this model's vocabulary can begin or continue what it allows")
    assert [s.token_id for s in got[1:]] == [1, 0]
    grammars.close()


def outcome(constraint: Constraint, draft: Sequence[int] = ()) -> NDArray[np.uint8] | Ending | None:
    """Return the outcome at the constraint's own position, once masks after `draft` have come."""
    while not constraint.settled:
        Patience().wait({constraint: draft}, alone=True)
    return constraint.outcome(())


def tokens_of(mask: NDArray[np.uint8] | Ending | None) -> set[int]:
    assert isinstance(mask, np.ndarray)
    return set(np.flatnonzero(np.unpackbits(mask, bitorder="little")[:VOCAB_SIZE]).tolist())


def allowed_by(constraint: Constraint, draft: Sequence[int] = ()) -> set[int]:
    return tokens_of(outcome(constraint, draft))
