"""Text to token ids and back, with a byte-level BPE trained here or any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from llama_ray.data.chat.encoding import ChatEncoder, ChatText
from llama_ray.data.chat.template import ChatPrompt, ChatTemplate
from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.files import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    chat_templates,
    content,
    read_tokenizer,
    special_tokens,
    superseded_files,
)
from llama_ray.data.tokenizing.text_stream import TextDecoder, TextStream
from llama_ray.data.tokenizing.token_bytes import max_token_bytes
from llama_ray.data.tokenizing.training import BOS, EOS, LARGEST_VOCABULARY, TrainingOptions, train
from llama_ray.storage.replacement import Replacement

# Without a tokenizer_config.json, the first of these names that the vocabulary holds is bos or eos.
_BOS_NAMES = (BOS, "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = (EOS, "</s>", "<eos>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")
# What ends an answer in the formats of Llama 3, ChatML, Llama 2, Phi and Gemma.
_END_OF_TURN_NAMES = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "</s>", "<|end|>", "<end_of_turn>")


class Tokenizer:
    """Encodes any Unicode text; for tokenizers trained here, `decode(encode(text)) == text`.

    Create one with `train` or `load`. Text is never encoded as a special token: a document that contains
    `<|end_of_text|>` is encoded as these characters, so neither data nor prompts can end a document.
    """

    LARGEST_VOCABULARY = LARGEST_VOCABULARY

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        """Wrap a `tokenizers` object; `config` is its tokenizer_config.json, {} if it has none."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._config = config
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.bos_id = _special_id("bos_token", config, vocabulary, _BOS_NAMES)
        self.eos_id = _special_id("eos_token", config, vocabulary, _EOS_NAMES)
        special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        special |= {vocabulary[name] for name in special_tokens(config) if name in vocabulary}
        self._special = frozenset(special)
        self._decoder = TextDecoder(backend, special)
        canonical = json.dumps(json.loads(backend.to_str()), sort_keys=True, separators=(",", ":"))
        templates = chat_templates(config)
        self.chat_template = ChatTemplate(templates, self.special_names()) if templates else None
        self.fingerprint: str = hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def train(
        cls, texts: Iterator[str], vocab_size: int, options: TrainingOptions | None = None
    ) -> Tokenizer:
        """Learn a byte-level BPE vocabulary of at most `vocab_size` entries from `texts`.

        The vocabulary always holds the 256 bytes, bos, eos and the special tokens of `options`; from little text it is
        smaller than `vocab_size`. The same texts give the same tokenizer, on any machine. Raises TokenizerError for a
        `vocab_size` that is too small for these entries, or above 2^24.
        """
        backend = train(texts, vocab_size, options or TrainingOptions())
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
        }
        return cls(backend, config)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a directory in the Hugging Face layout, or a `tokenizer.json`.

        The `tokenizer_config.json` beside it names bos and eos; for those that it does not name, well-known names in
        the vocabulary are used. Raises TokenizerError for a missing or unreadable file.
        """
        return cls(*read_tokenizer(Path(path)))

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers' AutoTokenizer can also read.

        Files of a tokenizer that `directory` holds are replaced or, where they would contradict the new ones, deleted.
        """
        files = self.files()
        with Replacement(Path(directory), marker=TOKENIZER_FILE) as new:
            for name, text in files.items():
                new.write(name, text)
            new.commit(superseded=superseded_files(Path(directory), files))

    def files(self) -> dict[str, str]:
        """Return what `save` writes: text by file name."""
        config = dict(self._config)
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("bos_token", self._name(self.bos_id))
        config.setdefault("eos_token", self._name(self.eos_id))
        config.setdefault("clean_up_tokenization_spaces", False)
        text: str = self._backend.to_str(pretty=True)
        return {TOKENIZER_FILE: text, CONFIG_FILE: json.dumps(config, indent=2, ensure_ascii=False) + "\n"}

    def to_json(self, vocab_size: int | None = None) -> str:
        """Return what `save` writes to `tokenizer.json`, for libraries that parse it.

        With the `vocab_size` of a model, added tokens that the model lacks (see `needed_vocab_size`) are left out.
        """
        text: str = self._backend.to_str()
        if vocab_size is None or vocab_size >= self.vocab_size:
            return text
        content = json.loads(text)
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
        return json.dumps(content)

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that no text makes and that the text of an answer does not have."""
        return self._special

    def max_token_bytes(self) -> int | None:
        """Return a bound of the bytes of text that one token can stand for, in UTF-8; None if there is none."""
        return max_token_bytes(self.to_json())

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the token ids of `text`, after bos and before eos if asked for.

        Raises TokenizerError for a lone surrogate (not a character), and for a bos or eos that the tokenizer lacks.
        """
        start = [_checked(self.bos_id, "bos_token")] if bos else []
        end = [_checked(self.eos_id, "eos_token")] if eos else []
        check_characters(text)
        # Unlike `encode`, `encode_batch_fast` computes no character offsets.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return [*start, *ids, *end]

    def encode_prompt(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Return the token ids of `text` as a prompt: with bos where the tokenizer's own post-processor adds it.

        The ids are those of transformers' AutoTokenizer, but for special tokens in `text`, which are characters here
        unless `parse_special`. Without `add_special_tokens` none is added. Raises TokenizerError for a lone surrogate.
        """
        check_characters(text)
        backend = self._parsing if parse_special else self._backend
        ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def render_chat(self, prompt: ChatPrompt) -> ChatText:
        """Return a conversation as `chat_template` writes it or, without one, as a plain transcript.

        Raises ValueError for messages that the template refuses.
        """
        return self.chat_encoder.render(self.chat_template or self._transcript, prompt)

    def encode_chat(self, text: ChatText) -> list[int]:
        """Return the token ids of a conversation: special tokens where its template wrote them.

        The template writes bos, as in transformers; a plain transcript gets it as any prompt does. The text of a
        special token in a message is characters. Raises TokenizerError for a lone surrogate.
        """
        check_characters(text.text)
        return self.chat_encoder.encode(text)

    def end_of_turn_ids(self) -> frozenset[int]:
        """Return the special tokens that end an answer: what the chat template writes there, and well-known names."""
        ids = map(self._backend.token_to_id, _END_OF_TURN_NAMES)
        known = frozenset(id for id in ids if id in self._special)
        if self.chat_template is None:
            return known
        ending = self.chat_template.end_of_turn().lstrip()
        names = {self._backend.id_to_token(id): id for id in self._special}
        longest = max((name for name in names if name and ending.startswith(name)), key=len, default=None)
        return known if longest is None else known | {names[longest]}

    def all_eos_ids(self, vocab_size: int) -> int | list[int] | None:
        """Return what ends a text and, where there is a chat template, an answer, as `generation_config.json` has it.

        That is eos, or a list that begins with it; a token that a model of `vocab_size` lacks is not named.
        """
        of_turns = sorted(self.end_of_turn_ids()) if self.chat_template is not None else []
        ends = [id for id in dict.fromkeys([self.eos_id, *of_turns]) if id is not None and id < vocab_size]
        return ends if len(ends) > 1 else next(iter(ends), None)

    def for_documents(self) -> Tokenizer:
        """Return the tokenizer of a model that is trained on documents between bos and eos.

        Such a model's prompts begin with bos. Most tokenizers see to that already and are returned as they are; others
        name a bos and do not add it. Raises TokenizerError for a tokenizer without bos or eos.
        """
        bos_id, eos_id = self.border_ids()
        added = self.encode_prompt("")
        if added[:1] == [bos_id]:
            return self
        bos, eos = self._name(bos_id), self._name(eos_id)
        ends = added[-1:] == [eos_id]
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A", eos] if ends else [bos, "$A"], special_tokens=[(bos, bos_id), (eos, eos_id)]
        )
        return Tokenizer(backend, self._config)

    def with_chat_template(self, text: str) -> Tokenizer:
        """Return the tokenizer with this chat template in place of its own ones."""
        return Tokenizer(
            tokenizers.Tokenizer.from_str(self.to_json()), self._config | {"chat_template": text}
        )

    def border_ids(self) -> tuple[int, int]:
        """Return bos and eos, between which a document stands. Raises TokenizerError for a tokenizer without them."""
        return _checked(self.bos_id, "bos_token"), _checked(self.eos_id, "eos_token")

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary are ignored."""
        return self._decoder.text(ids, skip_special)

    def stream(self, prompt: Sequence[int] = (), at_start: bool = True) -> TextStream:
        """Return a decoder for token ids that arrive one by one after those of `prompt`.

        The text of `prompt` followed by the stream's is the text of all ids. With `at_start` False the stream's text
        keeps a leading space, even if `prompt` has no text.
        """
        return self._decoder.stream(prompt, at_start)

    def tokens(self) -> list[str | None]:
        """Return the entries of the vocabulary in the order of their ids; None for an id that has none."""
        entries = {id: text for text, id in self._backend.get_vocab(with_added_tokens=True).items()}
        return [entries.get(id) for id in range(self.vocab_size)]

    def needed_vocab_size(self) -> int:
        """Return the vocabulary size that a model needs at least: `vocab_size`, but for added tokens at the end.

        Other libraries add such tokens (padding, for example) without a row in the model's embedding. Text is encoded
        without them, and a model cannot generate them.
        """
        added = self._backend.get_added_tokens_decoder().keys() - set(self.encode_prompt(""))
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        return max((id for id in ids if id not in added), default=-1) + 1

    @cached_property
    def chat_encoder(self) -> ChatEncoder:
        """What renders and encodes conversations."""
        # Made for the first conversation: it has read the vocabulary again.
        return ChatEncoder(self.to_json())

    @cached_property
    def _transcript(self) -> ChatTemplate:
        return ChatTemplate.plain()

    def special_names(self) -> dict[str, str]:
        """Return the special tokens' names, such as bos_token, with their texts."""
        named = {
            key: content(value)
            for key, value in self._config.items()
            if key.endswith("_token") and not isinstance(value, bool)
        }
        named = {"bos_token": self._name(self.bos_id), "eos_token": self._name(self.eos_id), **named}
        return {key: text for key, text in named.items() if text is not None}

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """A copy that finds special tokens in texts: the setting is the object's, and other threads encode."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def _name(self, id: int | None) -> str | None:
        return None if id is None else self._backend.id_to_token(id)


def _checked(id: int | None, name: str) -> int:
    if id is None:
        raise TokenizerError(f"this tokenizer has no {name}; name one in its {CONFIG_FILE}")
    return id


def check_characters(text: str) -> None:
    """Raise TokenizerError for a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"text holds a lone surrogate (U+{ord(error.object[error.start]):04X}) at character {error.start}; "
            "only whole Unicode characters can be encoded"
        ) from error


def _special_id(
    key: str, config: dict[str, Any], vocabulary: dict[str, int], well_known: tuple[str, ...]
) -> int | None:
    """Return the id of the token that `config[key]` names, else that of a well-known name; None if it names none."""
    if key not in config:
        return next((vocabulary[name] for name in well_known if name in vocabulary), None)
    named = content(config[key])
    if named is None:
        return None
    if named not in vocabulary:
        raise TokenizerError(f"{CONFIG_FILE} names {key} {named!r:.80}; name one that is in the vocabulary")
    return vocabulary[named]
