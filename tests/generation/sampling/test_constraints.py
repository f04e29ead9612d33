from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, normalizers

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.generation.sampling.constraints import Constraint, Grammars, TokenMasks, forbid_tokens
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


def generate_text(tokenizer: Tokenizer, params: SamplingParams, seed: int) -> tuple[str, Row]:
    """Sample from random logits until the output ends, at most 400 tokens."""
    eos = {tokenizer.eos_id or 0}
    constraint = Grammars(tokenizer, VOCAB_SIZE, eos).constraint(params)
    row = Row(params, seed=seed, prompt=[seed], end_ids=eos, constraint=constraint)
    sampler = Sampler()
    while len(row.output) < 400 and not (constraint and constraint.finished):
        token = sample(logits_after(row, VOCAB_SIZE, 1.0)[None], [row], sampler)[0].token_id
        assert token is not None
        if token in eos:
            break
        row.push(token)
    return tokenizer.decode(row.output, skip_special=False), row


@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece"])
@pytest.mark.parametrize(
    "values", [{}, {"temperature": 0}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.8}], ids=str
)
def test_output_is_json_of_its_schema(
    request: pytest.FixtureRequest, kind: str, values: dict[str, Any]
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    for seed in range(4):
        text, _ = generate_text(tokenizer, SamplingParams(json_schema=PERSON, **values), seed)
        jsonschema.validate(json.loads(text), PERSON)


def test_the_schema_of_any_object_yields_json_objects(tokenizer: Tokenizer) -> None:
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
def test_output_matches_its_regex(request: pytest.FixtureRequest, kind: str, regex: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    for seed in range(4):
        text, _ = generate_text(tokenizer, SamplingParams(regex=regex), seed)
        assert re.fullmatch(regex, text), text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regex": "[a"}, "regex cannot be enforced: .*unclosed character class"),
        ({"regex": "(?=a)b"}, "regex cannot be enforced: .*look-around"),
        ({"json_schema": {"type": "objec"}}, "json_schema cannot be enforced: Invalid type: objec"),
        ({"json_schema": {"not": {}}}, 'json_schema cannot be enforced: Unimplemented keys: .*"not"'),
        ({"json_schema": {"$ref": "#/nowhere"}}, "json_schema cannot be enforced: .*'/nowhere'"),
    ],
)
def test_a_constraint_that_cannot_be_enforced_is_refused_in_one_line(
    tokenizer: Tokenizer, values: dict[str, Any], message: str
) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, {1})
    # Twice: a failed grammar must not stay in the cache.
    for _ in range(2):
        with pytest.raises(ValueError, match=message) as error:
            grammars.constraint(SamplingParams(**values))
        assert "\n" not in str(error.value)


def test_a_constraint_needs_a_tokenizer_and_an_end_of_text_token(tokenizer: Tokenizer) -> None:
    params = SamplingParams(regex="a")
    with pytest.raises(ValueError, match="regex needs a model with a tokenizer, and this one has none"):
        Grammars(None, VOCAB_SIZE, {1}).constraint(params)
    with pytest.raises(ValueError, match="regex needs a model with an end-of-text token"):
        Grammars(tokenizer, VOCAB_SIZE, ()).constraint(params)
    assert Grammars(None, VOCAB_SIZE, ()).constraint(SamplingParams()) is None


def tokens_of(mask: NDArray[np.uint8]) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask, bitorder="little")[:VOCAB_SIZE]).tolist())


def allowed_by(constraint: Constraint) -> set[int]:
    return tokens_of(TokenMasks().allowed([constraint], [[]], VOCAB_SIZE)[0])


def test_constraints_of_one_grammar_have_separate_states(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(character)[0] for character in "abc")
    grammars = Grammars(tokenizer, VOCAB_SIZE, {1, 0})
    params = SamplingParams(regex="ab*c")
    first, second = grammars.constraint(params), grammars.constraint(params)
    assert first is not None
    assert second is not None
    first.push(a)
    assert {b, c} <= allowed_by(first)
    assert a in allowed_by(second)
    first.push(c)
    assert first.finished
    assert allowed_by(first) == {0, 1}, "only tokens that may end a text"
    assert not second.finished
    second.push(b)
    assert not first.error
    assert second.error


def test_masks_after_drafts_do_not_change_the_state(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(character)[0] for character in "abc")
    constraint, other = (
        Grammars(tokenizer, VOCAB_SIZE, {1}).constraint(SamplingParams(regex="abca?")) for _ in range(2)
    )
    assert constraint is not None
    assert other is not None
    drafts: list[list[int]] = [[a, b], [], [a], [a, b, c], [b], [a, c], [a, b, c, 1]]
    masks = TokenMasks()
    for _ in range(2):
        sets = [*map(tokens_of, masks.allowed([constraint] * 7 + [other], [*drafts, []], VOCAB_SIZE))]
        assert c in sets[0]
        assert a in sets[1]
        assert b in sets[2]
        assert sets[3] == {1, a}
        assert all(sets[4:7]), "after a wrong draft token or the end, the mask is arbitrary but not empty"
        assert sets[7] == sets[1]
    for token in (a, b, c):
        constraint.push(token)
    assert constraint.error is None
    assert allowed_by(constraint) == {1, a}


def test_a_mask_sets_only_logits_without_a_bit_to_minus_infinity() -> None:
    logits = torch.arange(4 * 50, dtype=torch.float32).view(4, 50)
    bits = np.zeros((2, 8), dtype=np.uint8)
    bits[0, 0], bits[1, 6] = 0b10000001, 0b11111111
    expected = torch.full((4, 50), -torch.inf)
    expected[[0, 2]] = logits[[0, 2]]
    expected[3, [0, 7]] = logits[3, [0, 7]]
    expected[1, [48, 49]] = logits[1, [48, 49]]
    TokenMasks().apply(logits, torch.tensor([3, 1]), bits)
    assert logits.equal(expected)


def test_tokens_are_forbidden_unless_that_leaves_none() -> None:
    bits = np.array([0b00000110, 0b10000000], dtype=np.uint8)
    forbid_tokens(bits, [1, 15])
    assert bits.tolist() == [0b100, 0]
    forbid_tokens(bits, [2])
    assert bits.tolist() == [0b100, 0]


def test_a_constrained_output_is_min_tokens_long_unless_it_is_complete_before(tokenizer: Tokenizer) -> None:
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


def test_a_token_that_was_not_allowed_fails_its_own_row_only(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, {1})
    params = SamplingParams(regex="a{30}")
    rows = [Row(params, end_ids=[1], constraint=grammars.constraint(params)) for _ in range(3)]
    rows[1].push(tokenizer.encode("z")[0])
    got = sample(torch.zeros(3, VOCAB_SIZE), rows)
    assert got[0] == got[2]
    assert got[0].error is None
    assert got[1].token_id is None
    assert got[1].error is not None
    assert "\n" not in got[1].error


def test_a_constraint_that_the_vocabulary_cannot_spell_fails_its_own_row_only() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.decoder = decoders.ByteLevel()
    grammars = Grammars(Tokenizer(backend, {}), 2, {1})
    rows = [
        Row(
            SamplingParams(regex=regex),
            output=[0],
            constraint=grammars.constraint(SamplingParams(regex=regex)),
        )
        for regex in ("ab", "ab?", "aaa")
    ]
    got = sample(torch.zeros(3, 2), rows)
    assert got[0].token_id is None
    assert (got[0].error or "").startswith("the output cannot go on as json_schema or regex want it")
    assert [s.token_id for s in got[1:]] == [1, 0]
