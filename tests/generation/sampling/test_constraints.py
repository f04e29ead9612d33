from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
import torch
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
VOCAB_SIZE = 384  # of the model: larger than the tokenizer's, as padded embeddings are


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """The other kind of vocabulary, as Llama 2 has it: spaces are U+2581, and rare characters are made of bytes."""
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


def write(tokenizer: Tokenizer, params: SamplingParams, seed: int) -> tuple[str, Row]:
    """Let a model of random numbers write until it ends, at most 400 tokens."""
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
        text, _ = write(tokenizer, SamplingParams(json_schema=PERSON, **values), seed)
        jsonschema.validate(json.loads(text), PERSON)


def test_any_json_object(tokenizer: Tokenizer) -> None:
    # Random numbers hardly ever close what they open; they are helped to.
    closing = {tokenizer.encode(character)[0]: 4.0 for character in '"}]'}
    for seed in range(4):
        params = SamplingParams(json_schema='{"type": "object"}', logit_bias=closing)
        assert isinstance(json.loads(write(tokenizer, params, seed)[0]), dict)


@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece"])
@pytest.mark.parametrize(
    "regex",
    [r"[a-c]{3,5}", r"(?:yes|no|maybe not)", r"[0-9]{4}-[01][0-9]-\w", r"^(the |fox ){1,4}dog$", "ä?ß+z"],
)
def test_output_matches_its_expression(request: pytest.FixtureRequest, kind: str, regex: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    for seed in range(4):
        text, _ = write(tokenizer, SamplingParams(regex=regex), seed)
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
def test_what_cannot_be_enforced_is_refused_in_one_line(
    tokenizer: Tokenizer, values: dict[str, Any], message: str
) -> None:
    grammars = Grammars(tokenizer, VOCAB_SIZE, {1})
    for _ in range(2):  # a failure is not taken for a compiled grammar later
        with pytest.raises(ValueError, match=message) as error:
            grammars.constraint(SamplingParams(**values))
        assert "\n" not in str(error.value)


def test_a_model_without_tokenizer_or_end_cannot_be_constrained(tokenizer: Tokenizer) -> None:
    params = SamplingParams(regex="a")
    with pytest.raises(ValueError, match="regex needs a model with a tokenizer, and this one has none"):
        Grammars(None, VOCAB_SIZE, {1}).constraint(params)
    with pytest.raises(ValueError, match="regex needs a model with an end-of-text token"):
        Grammars(tokenizer, VOCAB_SIZE, ()).constraint(params)
    assert Grammars(None, VOCAB_SIZE, ()).constraint(SamplingParams()) is None


def allowed_of(constraint: Constraint, draft: list[int] | None = None) -> set[int]:
    bits = TokenMasks().allowed([constraint], [draft or []], VOCAB_SIZE)[0]
    return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")[:VOCAB_SIZE]).tolist())


def test_sequences_of_one_grammar_do_not_share_their_state(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(character)[0] for character in "abc")
    grammars = Grammars(tokenizer, VOCAB_SIZE, {1, 0})
    params = SamplingParams(regex="ab*c")
    first, second = grammars.constraint(params), grammars.constraint(params)
    assert first is not None
    assert second is not None
    first.push(a)
    assert {b, c} <= allowed_of(first)
    assert a in allowed_of(second)
    first.push(c)
    assert first.finished
    assert allowed_of(first) == {0, 1}, "every token that may end a text, and no other"
    assert not second.finished
    second.push(b)
    assert not first.error
    assert second.error


def test_looking_ahead_leaves_the_state(tokenizer: Tokenizer) -> None:
    a, b, c = (tokenizer.encode(character)[0] for character in "abc")
    constraint, other = (
        Grammars(tokenizer, VOCAB_SIZE, {1}).constraint(SamplingParams(regex="abca?")) for _ in range(2)
    )
    assert constraint is not None
    assert other is not None
    drafts: list[list[int]] = [[a, b], [], [a], [a, b, c], [b], [a, c], [a, b, c, 1]]
    masks = TokenMasks()
    for _ in range(2):
        rows = masks.allowed([constraint] * 7 + [other], [*drafts, []], VOCAB_SIZE)
        sets = [set(np.flatnonzero(np.unpackbits(r, bitorder="little")[:VOCAB_SIZE]).tolist()) for r in rows]
        assert c in sets[0]
        assert a in sets[1]
        assert b in sets[2]
        assert sets[3] == {1, a}
        assert all(sets[4:7]), "after a mistake, or the end, anything may come but not nothing"
        assert sets[7] == sets[1]
    for token in (a, b, c):
        constraint.push(token)
    assert constraint.error is None
    assert allowed_of(constraint) == {1, a}


def test_a_mask_removes_what_has_no_bit_and_nothing_else() -> None:
    logits = torch.arange(4 * 50, dtype=torch.float32).view(4, 50)
    bits = np.zeros((2, 8), dtype=np.uint8)
    bits[0, 0], bits[1, 6] = 0b10000001, 0b11111111
    expected = torch.full((4, 50), -torch.inf)
    expected[[0, 2]] = logits[[0, 2]]
    expected[3, [0, 7]] = logits[3, [0, 7]]
    expected[1, [48, 49]] = logits[1, [48, 49]]
    TokenMasks().apply(logits, torch.tensor([3, 1]), bits)
    assert logits.equal(expected)


def test_an_end_is_forbidden_unless_nothing_else_is_left() -> None:
    bits = np.array([0b00000110, 0b10000000], dtype=np.uint8)
    forbid_tokens(bits, [1, 15])
    assert bits.tolist() == [0b100, 0]
    forbid_tokens(bits, [2])
    assert bits.tolist() == [0b100, 0]


def test_min_tokens_and_a_constraint(tokenizer: Tokenizer) -> None:
    for seed in range(4):
        text, row = write(tokenizer, SamplingParams(regex="[ab]*", max_tokens=90, min_tokens=40), seed)
        assert len(row.output) >= 40
        assert re.fullmatch("[ab]*", text)
        text, row = write(tokenizer, SamplingParams(regex="[ab]{6}", max_tokens=90, min_tokens=40), seed)
        assert len(text) == 6, "what is complete ends, also before min_tokens"


def test_a_token_that_was_not_allowed_fails_its_row_alone(tokenizer: Tokenizer) -> None:
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


def test_what_the_vocabulary_cannot_spell_fails_its_row_alone() -> None:
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
