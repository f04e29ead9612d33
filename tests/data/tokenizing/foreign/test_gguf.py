from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from tokenizers import pre_tokenizers

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.tokenizer import BOS, EOS, Tokenizer
from tests.data.tokenizing.foreign.helpers import BYTE_LEVEL, MODEL, differences, train_sentencepiece

Write = Callable[[gguf.GGUFWriter], None]


def write(file: Path, *writes: Write) -> Path:
    writer = gguf.GGUFWriter(str(file), "llama")
    for add in writes:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def byte_level(writer: gguf.GGUFWriter) -> None:
    names = sorted(MODEL["vocab"], key=MODEL["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3 if name in (BOS, EOS) else 1 for name in names])
    writer.add_token_merges([" ".join(pair) for pair in MODEL["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def pre(name: str) -> Write:
    return lambda writer: writer.add_tokenizer_pre(name)


def with_pre_tokenizer(pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_json())
    backend.pre_tokenizer = pre_tokenizer
    backend.encode_special_tokens = True
    return backend


GPT_2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
# As their tokenizer.json has it.
ORIGINALS = {
    "gpt-2": GPT_2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT_2]),
    "llama-bpe": tokenizers.Tokenizer.from_str(BYTE_LEVEL.to_json()).pre_tokenizer,
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_ids_of_a_byte_level_vocabulary_are_those_of_its_original(tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer.load(write(tmp_path / "model.gguf", byte_level, pre(name)))
    reference = with_pre_tokenizer(ORIGINALS[name])
    assert not differences(tokenizer, lambda text: reference.encode(text, add_special_tokens=False).ids)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, BYTE_LEVEL.vocab_size)
    # llama.cpp begins prompts with bos for Llama 3 only, unless the file says so.
    assert (tokenizer.encode_prompt("") == [0]) == (name == "llama-bpe")


def test_without_a_name_the_split_is_llama_cpps_default(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path / "model.gguf", byte_level))
    words = [
        word
        for word, _ in tokenizers.Tokenizer.from_str(tokenizer.to_json()).pre_tokenizer.pre_tokenize_str(
            "a 12345$x don't"
        )
    ]
    assert words == ["a", "Ġ", "123", "45", "$", "x", "Ġdon", "'", "t"]


def test_the_ids_of_a_sentencepiece_vocabulary_are_those_of_sentencepiece(tmp_path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(train_sentencepiece(tmp_path)))

    def add(writer: gguf.GGUFWriter) -> None:
        ids = range(reference.vocab_size())
        writer.add_tokenizer_model("llama")
        writer.add_token_list([reference.id_to_piece(id) for id in ids])
        writer.add_token_scores([reference.get_score(id) for id in ids])
        writer.add_token_types([kind(id) for id in ids])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages }}")

    def kind(id: int) -> int:
        return (
            2
            if reference.is_unknown(id)
            else 3
            if reference.is_control(id)
            else 6
            if reference.is_byte(id)
            else 1
        )

    (tmp_path / "other").mkdir()
    tokenizer = Tokenizer.load(write(tmp_path / "other" / "model.gguf", add).parent)
    assert not differences(tokenizer, reference.encode)
    assert tokenizer.encode_prompt("a") == reference.encode("a", add_bos=True)
    assert tokenizer.chat_template is not None
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == tokenizer.fingerprint


def eos_beyond(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)


@pytest.mark.parametrize(
    ("writes", "message"),
    [
        (
            [byte_level, pre("deepseek-llm")],
            "its tokenizer.ggml.pre is 'deepseek-llm'; it must be one of default",
        ),
        ([lambda writer: writer.add_tokenizer_model("bert")], "its tokenizer is of the kind 'bert'"),
        ([], "has no tokenizer.ggml.model"),
        ([eos_beyond], "its tokenizer.ggml.eos_token_id is 3; it must be below 3"),
    ],
)
def test_another_tokenizer_is_refused(tmp_path: Path, writes: list[Write], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(write(tmp_path / "model.gguf", *writes))


def test_of_several_models_in_a_directory_none_is_taken(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write(tmp_path / name, byte_level)
    with pytest.raises(TokenizerError, match=r"holds 2 \.gguf files; name one of them"):
        Tokenizer.load(tmp_path)
