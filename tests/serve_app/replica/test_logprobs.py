from __future__ import annotations

import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.sampling.params import TokenLogprob
from serve_app.replica.logprobs import LogprobWriter
from serve_app.streams.messages import Logprobs
from tests.data.helpers import BYTE_FALLBACK, KINDS, OURS


def write(tokenizer: Tokenizer, prompt: list[int], ids: list[int], top: tuple[int, ...] = ()) -> Logprobs:
    writer = LogprobWriter(tokenizer, prompt, constrained=False, top=20)
    parts = [writer.write([TokenLogprob(id, -1.0, tuple((t, -2.0) for t in top))]) for id in ids]
    return Logprobs.joined(parts)


@pytest.mark.parametrize("tokenizer", KINDS.values(), ids=KINDS)
def test_tokens_join_to_the_text_and_stand_at_their_offsets(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the ab a b")
    prompt, new = ids[:2], ids[2:]
    got = write(tokenizer, prompt, new)
    text = "".join(got.tokens)
    assert tokenizer.decode(prompt) + text == tokenizer.decode(ids)
    for name, offset in zip(got.tokens, got.text_offset, strict=True):
        assert text[offset : offset + len(name)] == name


def test_alternatives_are_named_as_they_would_continue_the_text() -> None:
    the, [a] = BYTE_FALLBACK.encode("the"), BYTE_FALLBACK.encode("a")
    got = write(BYTE_FALLBACK, the, the, (a, BYTE_FALLBACK.eos_id or 0, BYTE_FALLBACK.encode("日")[-1]))
    [top] = got.top_logprobs
    assert list(top) == [" the", " a", "</s>", f"token_id:{BYTE_FALLBACK.encode('日')[-1]}"]


@pytest.mark.parametrize("tokenizer", [OURS, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
def test_a_token_after_an_incomplete_character_stands_after_it(tokenizer: Tokenizer) -> None:
    party, [letter] = tokenizer.encode("🎉")[-4:], tokenizer.encode("a")[-1:]
    got = write(tokenizer, tokenizer.encode("the"), [party[0], letter])
    assert got.text_offset == [0, 1]
    assert got.tokens[0] == f"token_id:{party[0]}"


@pytest.mark.parametrize("tokenizer", [OURS, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
def test_tokens_can_be_named_by_their_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the 🎉")
    prompt, new = ids[:1], ids[1:]
    writer = LogprobWriter(tokenizer, prompt, constrained=False, top=2, names="bytes")
    # Twice the same token: the second one is told apart.
    got = writer.write([TokenLogprob(id, -1.0, ((new[0], -2.0), (new[-1], -3.0))) for id in new])
    text = tokenizer.decode(prompt).encode() + b"".join(map(bytes.fromhex, got.tokens))
    assert text.decode() == "the 🎉"
