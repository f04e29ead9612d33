"""Exported files in the real llama.cpp: the same token ids, the same greedy tokens, the same conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_ray.data.chat.template import ChatPrompt
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.data.tokenizing.training import BOS, EOS, TrainingOptions
from llama_ray.exporting.export import ExportConfig, export
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.config import RopeScaling
from llama_ray.model.llama import Llama
from llama_ray.model.stored_config import load_config
from llama_ray.pretrained import save_pretrained
from tests.data.chat_templates import TEMPLATES, tokenizer_with
from tests.data.tokenizing.foreign.helpers import CORPUS, TEXTS, train_sentencepiece
from tests.exporting.llama_cpp import LlamaCpp
from tests.small_models import random_model, small_config

MESSAGES = [
    {"role": "user", "content": "Hi 漢字"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye."},
]


def exported(directory: Path, model: Llama, tokenizer: Tokenizer, dtype: str = "f32") -> Path:
    save_pretrained(model, tokenizer, directory / "model")
    file = directory / "model.gguf"
    export(ExportConfig(ref=str(directory / "model"), to=str(file), dtype=dtype))  # type: ignore[arg-type]
    return file


def trained(**options: Any) -> Tokenizer:
    return Tokenizer.train(iter(CORPUS), 700, TrainingOptions(**options))


def sentencepiece(directory: Path) -> Tokenizer:
    train_sentencepiece(directory)
    return Tokenizer.load(directory)


TOKENIZERS = {
    "as Llama 3": lambda _: trained(),
    "a digit at a time": lambda _: trained(split_digits=1),
    "as GPT-2": lambda _: trained(split="gpt2"),
    "SentencePiece": sentencepiece,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_ids_are_ours(tmp_path: Path, kind: str) -> None:
    tokenizer = TOKENIZERS[kind](tmp_path)
    # Some rows more than tokens, as models have that are padded to a round number.
    file = exported(tmp_path, Llama(small_config(tokenizer.vocab_size + 3, num_layers=1)), tokenizer)
    peer = LlamaCpp(file)
    texts = [*TEXTS[::5], "", " ", "a<|end_of_text|></s>b"]
    assert not [text for text in texts if peer.tokenize(text) != tokenizer.encode(text)]
    assert peer.tokenize("a b", add_special=True) == tokenizer.encode_prompt("a b")
    name = tokenizer.special_names()["eos_token"]
    assert peer.tokenize(f"a{name}", parse_special=True) == [*tokenizer.encode("a"), tokenizer.eos_id]
    again = Tokenizer.load(file)
    assert again.fingerprint == tokenizer.fingerprint


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied, with wide heads": {"tie_embeddings": True, "head_dim": 16},
    "linear scaling": {"rope_scaling": RopeScaling(rope_type="linear", factor=3.0)},
    "scaling of Llama 3": {
        "head_dim": 32,
        "rope_scaling": RopeScaling(rope_type="llama3", factor=8.0, original_max_seq_len=32),
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_ours(tmp_path: Path, shape: str) -> None:
    tokenizer = trained()
    model = random_model(small_config(tokenizer.vocab_size, norm_eps=1e-5, **SHAPES[shape]))
    file = exported(tmp_path, model, tokenizer)
    prompt = torch.randint(
        2, tokenizer.vocab_size, (100,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    with Engine(model, tokenizer) as engine:
        [ours] = engine.generate([prompt], SamplingParams(max_tokens=40, temperature=0))
    assert LlamaCpp(file).greedy(prompt, 40) == ours.token_ids
    assert load_config(file) == model.config


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_it_reads_every_kind_of_file(tmp_path: Path, dtype: str) -> None:
    tokenizer = trained()
    # Rows of 48 weights are no whole blocks of 32, and stay in float16.
    model = random_model(small_config(tokenizer.vocab_size, hidden_size=64, intermediate_size=48))
    file = exported(tmp_path, model, tokenizer, dtype)
    prompt = tokenizer.encode("import base64")
    with Engine(model, tokenizer) as engine:
        [ours] = engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0))
    assert LlamaCpp(file).greedy(prompt, 1) == ours.token_ids


@pytest.mark.parametrize(("name", "writes_bos"), [("llama-3.1", True), ("mistral", True), ("chatml", False)])
def test_a_conversation_is_written_as_ours(tmp_path: Path, name: str, writes_bos: bool) -> None:
    tokenizer = tokenizer_with(tmp_path / "tokenizer", TEMPLATES[name], bos_token=BOS, eos_token=EOS)
    model, file = tmp_path / "model", tmp_path / "model.gguf"
    save_pretrained(Llama(small_config(tokenizer.vocab_size, num_layers=1)), tokenizer, model)
    notes = export(ExportConfig(ref=str(model), to=str(file)))
    peer, ours = LlamaCpp(file), tokenizer.render_chat(ChatPrompt(MESSAGES))
    # It leaves out bos at the beginning of a conversation and, as for any prompt, adds it itself.
    assert peer.render_chat(MESSAGES) == ours.text.removeprefix(BOS)
    ids = peer.tokenize(ours.text.removeprefix(BOS), add_special=True, parse_special=True)
    assert ids == ([] if writes_bos else [tokenizer.bos_id]) + tokenizer.encode_chat(ours)
    more = f"llama.cpp begins conversations with {BOS}, which the chat template does not write"
    assert notes == ([] if writes_bos else [more])


def test_an_answer_ends_at_the_tokens_of_the_model(tmp_path: Path) -> None:
    """Neither is known to llama.cpp by its name."""
    tokenizer = trained()
    model = random_model(small_config(tokenizer.vocab_size, norm_eps=1e-5))
    prompt = tokenizer.encode("import base64")
    with Engine(model, tokenizer) as engine:
        [free] = engine.generate([prompt], SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
    end = next(
        id for place, id in enumerate(free.token_ids) if place > 4 and id not in free.token_ids[:place]
    )
    save_pretrained(model, tokenizer, tmp_path / "model")
    config = tmp_path / "model" / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [tokenizer.eos_id, end]}))
    file = tmp_path / "model.gguf"
    assert export(ExportConfig(ref=str(tmp_path / "model"), to=str(file))) == []
    assert LlamaCpp(file).greedy(prompt, 40) == free.token_ids[: free.token_ids.index(end) + 1]


def test_a_real_model_answers_as_here(tmp_path: Path, smollm2: Path) -> None:
    file = tmp_path / "smollm2.gguf"
    [note] = export(ExportConfig(ref=str(smollm2), to=str(file), dtype="f16"))
    assert note.startswith("of 21 bytes that this tokenizer has no token for, such as 0x04")
    with Engine.from_pretrained(smollm2, device="cpu") as engine:
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        chat = tokenizer.render_chat(ChatPrompt([{"role": "user", "content": "Name three colours."}]))
        prompt = tokenizer.encode_chat(chat)
        [ours] = engine.generate([prompt], SamplingParams(max_tokens=12, temperature=0))
    peer = LlamaCpp(file)
    assert peer.tokenize(chat.text, add_special=True, parse_special=True) == prompt
    assert peer.greedy(prompt, 12) == ours.token_ids
    # Texts of which all bytes have a token.
    assert not [
        text for text in TEXTS[::9] if peer.tokenize(text) != tokenizer.encode(text) and text.isprintable()
    ]
