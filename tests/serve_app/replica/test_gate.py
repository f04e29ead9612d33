"""What a version must do before it serves."""

from __future__ import annotations

import math
import string
from collections.abc import Callable

import pytest
import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.model.llama import Llama
from serve_app.replica import gate
from tests.data.helpers import BYTE_FALLBACK, KINDS, OURS
from tests.serve_app.replica.helpers import OPTIONS
from tests.small_models import random_model, small_config, small_tokenizer


def engine_of(model: Llama, tokenizer: Tokenizer | None = None, **fields: object) -> Engine:
    return Engine(model, tokenizer or small_tokenizer(), OPTIONS, **fields)


def test_the_loss_is_that_of_the_bundled_text() -> None:
    tokenizer = small_tokenizer()
    model = random_model(small_config(tokenizer.vocab_size, max_seq_len=1024))
    ids = torch.tensor(tokenizer.encode_prompt(gate.PLAIN_TEXT)[: gate.LOSS_TOKENS])
    with torch.no_grad():
        logits = model(ids[None])[0, :-1]
    want = torch.nn.functional.cross_entropy(logits, ids[1:])
    assert gate.check(engine_of(model), 60) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("max_seq_len", [2, 3, 8, 64])
def test_the_text_is_cut_to_a_short_context(max_seq_len: int) -> None:
    model = random_model(small_config(small_tokenizer().vocab_size, max_seq_len=max_seq_len))
    assert math.isfinite(gate.check(engine_of(model), 60))


def test_nothing_is_left_in_the_engine() -> None:
    engine = engine_of(random_model(small_config(small_tokenizer().vocab_size)))
    gate.check(engine, 60)
    assert not engine.has_work


def test_a_model_that_takes_too_long_fails_and_leaves_nothing_in_the_engine() -> None:
    engine = engine_of(random_model(small_config(small_tokenizer().vocab_size)))
    with pytest.raises(gate.GateError, match="gate_timeout_s, 0 s"):
        gate.check(engine, 0)
    assert not engine.has_work


def changed(change: Callable[[tokenizers.Tokenizer], None]) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(OURS.to_json())
    change(backend)
    return Tokenizer(backend, {})


def lower_case(backend: tokenizers.Tokenizer) -> None:
    backend.normalizer = normalizers.Lowercase()


def nfkc(backend: tokenizers.Tokenizer) -> None:
    backend.normalizer = normalizers.NFKC()


def dummy_prefix(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def unigram() -> Tokenizer:
    """A tokenizer like that of T5: without bytes, it drops what it does not know, and joins spaces and lines."""
    pieces = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        *((letter, -3.0) for letter in string.ascii_letters + string.digits),
    ]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>"])
    return Tokenizer(backend, {})


@pytest.mark.parametrize("kind", ["byte_level", "nested_byte_level", "byte_fallback", "metaspace"])
def test_tokenizers_that_keep_text_pass(kind: str) -> None:
    gate.check_tokenizer(KINDS[kind])


@pytest.mark.parametrize("change", [lower_case, nfkc, dummy_prefix])
def test_tokenizers_that_change_text_once_pass(change: Callable[[tokenizers.Tokenizer], None]) -> None:
    gate.check_tokenizer(changed(change))


def test_tokenizers_that_drop_unknown_characters_pass() -> None:
    gate.check_tokenizer(unigram())


def without_bytes() -> Tokenizer:
    """A tokenizer like that of Llama 2 that has lost the part of its decoder which joins bytes."""
    backend = tokenizers.Tokenizer.from_str(BYTE_FALLBACK.to_json())
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, {})


def test_a_tokenizer_that_writes_bytes_as_text_fails() -> None:
    with pytest.raises(gate.GateError, match=r"<0x"):
        gate.check_tokenizer(without_bytes())


def no_decoder(backend: tokenizers.Tokenizer) -> None:
    backend.decoder = decoders.Fuse()


def spaces_lost(backend: tokenizers.Tokenizer) -> None:
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(" ", "")])


def tabs_changed(backend: tokenizers.Tokenizer) -> None:
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\t", "    ")])


@pytest.mark.parametrize("change", [no_decoder, spaces_lost, tabs_changed])
def test_tokenizers_that_return_another_text_fail(change: Callable[[tokenizers.Tokenizer], None]) -> None:
    with pytest.raises(gate.GateError, match=r"^the tokenizer makes '.*' of '.*'"):
        gate.check_tokenizer(changed(change))


def test_a_tokenizer_without_words_fails() -> None:
    with pytest.raises(gate.GateError, match=r"^the tokenizer makes"):
        gate.check_tokenizer(KINDS["word_piece"])
