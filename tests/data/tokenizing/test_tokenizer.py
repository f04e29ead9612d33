from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from tokenizers import decoders, models, processors
from transformers import AutoTokenizer

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.tokenizer import BOS, EOS, Tokenizer
from tests.data.helpers import ANY_TEXT, BYTE_FALLBACK, OURS, TEXTS, ours

KINDS = pytest.mark.parametrize("tokenizer", [OURS, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])


@KINDS
@given(text=ANY_TEXT)
def test_decoding_inverts_encoding(tokenizer: Tokenizer, text: str) -> None:
    if tokenizer is BYTE_FALLBACK:
        text = text.replace("▁", "")  # SentencePiece uses this character for a space.
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids[1:-1])
    assert all(0 <= id < tokenizer.vocab_size for id in ids)
    assert tokenizer.decode(ids) == text


def test_text_is_never_encoded_as_a_special_token() -> None:
    ids = OURS.encode(f"a{EOS}b{BOS}")
    assert OURS.decode(ids, skip_special=True) == f"a{EOS}b{BOS}"
    assert OURS.decode([OURS.bos_id or 0, *ids], skip_special=False) == f"{BOS}a{EOS}b{BOS}"


def test_training_is_deterministic_and_bounded() -> None:
    again = ours()
    assert again.fingerprint == OURS.fingerprint
    assert again.vocab_size == 350
    assert Tokenizer.train(iter(TEXTS), 351).fingerprint != OURS.fingerprint
    assert Tokenizer.train(iter(["ab"]), 5000).vocab_size == 258


def test_a_vocab_size_below_the_minimum_is_refused() -> None:
    with pytest.raises(TokenizerError, match="vocab_size is 257; it must be at least 258"):
        Tokenizer.train(iter(TEXTS), 257)


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(TokenizerError, match=r"lone surrogate \(U\+D83C\) at character 2"):
        OURS.encode("ab\ud83c")


def test_a_saved_directory_loads_here_and_in_transformers(tmp_path: Path) -> None:
    OURS.save(tmp_path)
    # As in a model directory; transformers must not rebuild the tokenizer from the model type.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for loaded in (Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json")):
        assert loaded.fingerprint == OURS.fingerprint
        assert (loaded.bos_id, loaded.eos_id) == (OURS.bos_id, OURS.eos_id)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (OURS.bos_id, OURS.eos_id)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == OURS.encode(text)
        assert theirs(text).input_ids == OURS.encode(text, bos=True)
        assert theirs.decode(OURS.encode(text)) == text


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ("<s>", "</s>")),
        ({}, ("<s>", "</s>")),
        ({"bos_token": {"content": "a", "special": True}, "eos_token": "b"}, ("a", "b")),
        ({"bos_token": None, "eos_token": "</s>"}, (None, "</s>")),
        ({"bos_token": "", "eos_token": {"content": "</s>"}}, (None, "</s>")),
    ],
)
def test_bos_and_eos_of_a_foreign_tokenizer(
    tmp_path: Path, config: dict[str, object] | None, expected: tuple[str | None, str | None]
) -> None:
    BYTE_FALLBACK.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert (loaded.bos_id, loaded.eos_id) == tuple(name and vocab[name] for name in expected)
    if loaded.bos_id is None:
        with pytest.raises(TokenizerError, match="has no bos_token"):
            loaded.encode("a", bos=True)


BOS_FIRST = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
BOS_AND_EOS = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
POST_PROCESSORS = {
    "none": None,
    "bos": BOS_FIRST,
    "bos and eos": BOS_AND_EOS,
    "eos": processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)]),
    "bytes": processors.ByteLevel(trim_offsets=False),
    "sequence": processors.Sequence([processors.ByteLevel(trim_offsets=False), BOS_FIRST]),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=False),
}


def write_foreign(
    directory: Path, config: dict[str, object], post_processor: processors.PostProcessor | None = None
) -> Path:
    """Write a tokenizer like that of Llama 2 as other libraries do."""
    backend = tokenizers.Tokenizer.from_str(BYTE_FALLBACK.to_json())
    if post_processor is not None:
        backend.post_processor = post_processor
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


NAMED = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("post_processor", POST_PROCESSORS.values(), ids=POST_PROCESSORS)
@pytest.mark.parametrize(
    "switches", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
def test_the_ids_of_a_prompt_are_those_of_transformers(
    tmp_path: Path, post_processor: processors.PostProcessor | None, switches: dict[str, object]
) -> None:
    write_foreign(tmp_path, {**NAMED, **switches}, post_processor)
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the ab", " ab\n  é日🎉", ""):
        assert ours.encode_prompt(text) == theirs(text).input_ids
        assert ours.encode_prompt(text, add_special_tokens=False) == ours.encode(text)
    for text in ("the</s> ab<s>", "</s>"):
        for add in (True, False):
            parsed = ours.encode_prompt(text, add_special_tokens=add, parse_special=True)
            assert parsed == theirs(text, add_special_tokens=add).input_ids
        assert ours.encode_prompt(text, add_special_tokens=False) == ours.encode(text) != parsed
    # Documents of training data begin and end whatever is added to prompts.
    assert ours.encode("ab", bos=True, eos=True) == [1, *ours.encode("ab"), 2]


@pytest.mark.parametrize("post_processor", POST_PROCESSORS.values(), ids=POST_PROCESSORS)
def test_prompts_of_a_model_trained_on_documents_begin_as_they_do(
    tmp_path: Path, post_processor: processors.PostProcessor | None
) -> None:
    given = Tokenizer.load(write_foreign(tmp_path, NAMED, post_processor))
    trained = given.for_documents()
    trained.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == trained.fingerprint
    assert Tokenizer.load(tmp_path).for_documents().fingerprint == trained.fingerprint
    added_at_end = given.encode_prompt("")[-1:] == [2]
    prompt = trained.encode("the ab", bos=True, eos=added_at_end)
    assert (
        trained.encode_prompt("the ab")
        == AutoTokenizer.from_pretrained(tmp_path)("the ab").input_ids
        == prompt
    )
    if given.encode_prompt("")[:1] == [1]:
        assert trained.fingerprint == given.fingerprint


@pytest.mark.parametrize("missing", ["bos_token", "eos_token"])
def test_a_tokenizer_without_bos_or_eos_is_not_for_documents(tmp_path: Path, missing: str) -> None:
    tokenizer = Tokenizer.load(write_foreign(tmp_path, NAMED | {missing: None}))
    with pytest.raises(TokenizerError, match=f"has no {missing}"):
        tokenizer.for_documents()


TURN = {"content": "<turn>", "special": True, "lstrip": False, "rstrip": False, "single_word": False}
PLAIN = {**TURN, "content": "<plain>", "special": False, "normalized": False}


@pytest.mark.parametrize(
    "config",
    [
        # Tokens that only the configuration has, not in the order of their ids.
        {"added_tokens_decoder": {"272": PLAIN, "271": TURN}, "eos_token": "<turn>"},
        # Entries of the vocabulary that only the configuration calls special.
        {"eos_token": "ab", "pad_token": "b", "additional_special_tokens": ["he"]},
        {"extra_special_tokens": {"image_token": "he"}, "boi_token": "é"},
    ],
)
def test_tokens_of_the_configuration_are_those_of_transformers(
    tmp_path: Path, config: dict[str, object]
) -> None:
    write_foreign(tmp_path, {**NAMED, **config})
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    ids = list(range(259, ours.vocab_size))
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    stream = ours.stream()
    assert "".join([stream.push(id) for id in ids]) + stream.flush() == ours.decode(ids)
    assert ours.encode_prompt("a <plain>t") == theirs("a <plain>t").input_ids


def test_special_tokens_in_a_file_of_their_own_are_read(tmp_path: Path) -> None:
    write_foreign(tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"})
    names = {"bos_token": {"content": "a", "lstrip": False}, "eos_token": "b"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    ours.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").eos_id == ours.eos_id


def test_added_tokens_in_a_file_of_their_own_are_read(tmp_path: Path) -> None:
    write_foreign(tmp_path, NAMED | {"eos_token": "<turn>"})
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<plain>": 272, "<turn>": 271}))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = ours.encode_prompt("a <plain>t")
    assert (ours.eos_id, ids) == (theirs.eos_token_id, theirs("a <plain>t").input_ids)
    ours.save(tmp_path)
    assert not (tmp_path / "added_tokens.json").exists()
    copy = Tokenizer.load(tmp_path)
    assert (copy.fingerprint, copy.eos_id, copy.encode_prompt("a <plain>t")) == (ours.fingerprint, 271, ids)


def test_chat_templates_in_files_of_their_own_are_kept(tmp_path: Path) -> None:
    write_foreign(tmp_path, NAMED | {"chat_template": "old"})
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    Tokenizer.load(tmp_path).save(tmp_path / "one")
    assert AutoTokenizer.from_pretrained(tmp_path / "one").chat_template == "{{ messages }}"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    Tokenizer.load(tmp_path).save(tmp_path / "two")
    both = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template == both


def test_saving_keeps_the_entries_of_a_foreign_config(tmp_path: Path) -> None:
    BYTE_FALLBACK.save(tmp_path / "one")
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": "{{ messages }}",
        "model_max_length": 4096,
    }
    (tmp_path / "one" / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.load(tmp_path / "one").save(tmp_path / "two")
    saved = json.loads((tmp_path / "two" / "tokenizer_config.json").read_text())
    assert saved.items() >= config.items()


def test_a_gpt2_style_tokenizer_uses_one_token_as_bos_and_eos(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "Ġ": 1, "<|endoftext|>": 2}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (2, 2, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.txt", "", "no tokenizer at"),
        ("tokenizer.json", "{", "cannot be read as a Hugging Face tokenizer.json"),
        ("tokenizer_config.json", "{", "is not JSON"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<nowhere>"}',
            "eos_token '<nowhere>'; name one that is in the vocabulary",
        ),
        ("tokenizer_config.json", '{"eos_token": 2}', "names the token 2; it must be a string or null"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"9": "<x>"}}',
            "added_tokens_decoder cannot be read",
        ),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": {}}}',
            "added_tokens_decoder cannot be read",
        ),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder cannot be read"),
        ("special_tokens_map.json", "[]", "holds a list; it must hold a JSON object"),
    ],
)
def test_unusable_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    if not name.startswith(("other", "tokenizer.json")):
        OURS.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)
