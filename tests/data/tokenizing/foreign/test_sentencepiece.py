from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from tests.data.tokenizing.foreign.helpers import TEXTS, differences, train_sentencepiece

LLAMA_2: dict[str, object] = {}


@pytest.mark.parametrize(
    "options",
    [
        LLAMA_2,
        {"byte_fallback": False},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False, "split_digits": True},
        {"control_symbols": "[INST],[/INST]", "pad_id": 3},
    ],
    ids=[
        "Llama 2",
        "no bytes",
        "extra spaces",
        "no prefix",
        "more controls",
    ],
)
def test_the_ids_are_those_of_sentencepiece(tmp_path: Path, options: dict[str, object]) -> None:
    file = train_sentencepiece(tmp_path, **options)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = Tokenizer.load(file)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id(), reference.eos_id())
    assert tokenizer.vocab_size == reference.vocab_size()
    assert not differences(tokenizer, reference.encode)
    assert tokenizer.encode_prompt("a b") == reference.encode("a b", add_bos=True)
    text = "the naïve 日本語"
    assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))


@pytest.mark.parametrize("options", [{}, {"byte_fallback": False, "remove_extra_whitespaces": True}])
def test_the_pieces_of_a_unigram_model_are_as_likely_as_those_of_sentencepiece(
    tmp_path: Path, options: dict[str, object]
) -> None:
    """SentencePiece sums scores in single precision: of "0" and "00" in either order it may choose the other."""
    file = train_sentencepiece(tmp_path, model_type="unigram", **options)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = Tokenizer.load(file)
    different = differences(tokenizer, reference.encode)
    assert len(different) < len(TEXTS) / 10
    for text in different:
        sums = [
            sum(map(reference.get_score, ids)) for ids in (tokenizer.encode(text), reference.encode(text))
        ]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)
        assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.decode(reference.encode(text))


def test_runs_of_spaces_that_share_a_score_merge_from_the_left(tmp_path: Path) -> None:
    """Mistral's vocabulary has them."""
    file = train_sentencepiece(tmp_path)
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(file.read_bytes())
    have = {piece.piece for piece in model.pieces}
    for length in range(2, 7):
        if "▁" * length not in have:
            model.pieces.add(piece="▁" * length)
    for piece in model.pieces:
        if set(piece.piece) == {"▁"} and len(piece.piece) > 1:
            piece.score = -3.5
    file.write_bytes(model.SerializeToString())
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert not differences(Tokenizer.load(file), reference.encode)


def test_a_text_that_names_a_special_token_holds_none(tmp_path: Path) -> None:
    for kind in ("bpe", "unigram"):
        tokenizer = Tokenizer.load(train_sentencepiece(tmp_path, model_type=kind))
        assert not {0, 1, 2} & set(tokenizer.encode("<s>a</s><unk>"))


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(train_sentencepiece(tmp_path))
    tokenizer.save(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    assert (saved.fingerprint, saved.bos_id, saved.eos_id) == (tokenizer.fingerprint, 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "its normalizer maps characters"),
        ({"user_defined_symbols": "[REF]"}, r"its piece '\[REF\]' is user-defined"),
        ({"model_type": "char", "byte_fallback": False}, "its model is of words or characters"),
        ({"treat_whitespace_as_suffix": True}, "it puts spaces at the end of words"),
    ],
)
def test_what_cannot_give_the_same_ids_is_refused(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    file = train_sentencepiece(tmp_path, **options)
    with pytest.raises(
        TokenizerError, match=f"tokenizer.model cannot be read: {message}.*tokenizer.json|words"
    ):
        Tokenizer.load(file)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, part: float) -> None:
    file = train_sentencepiece(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(TokenizerError, match="it is no whole model of SentencePiece; copy it again") as error:
        Tokenizer.load(file)
    assert str(file) in str(error.value)
