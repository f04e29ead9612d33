"""Text to token ids and back: a byte-level BPE of our own, or any Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

# The split of GPT-4's cl100k_base as Llama 3 uses it: contractions, words with one leading character that is
# neither letter nor digit, numbers of at most three digits, punctuation, line ends, spaces.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Where a directory does not say which tokens begin and end a document, the first of these that it has does.
_BOS_NAMES = (BOS, "<s>", "<bos>", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = (EOS, "</s>", "<eos>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")


class TokenizerError(ValueError):
    """A tokenizer that cannot be made or read; the message is one line with the way out."""


class Tokenizer:
    """Encodes any Unicode text; ``decode(encode(text)) == text`` for the tokenizers that this project trains.

    Make one with :meth:`train` or :meth:`load`. Text never turns into a special token: a document that spells
    out ``<|end_of_text|>`` is encoded as the plain characters, so neither data nor prompts end a document.
    """

    SMALLEST_VOCABULARY = 256 + 2

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
        """Wraps a ``tokenizers`` object; ``config`` is its tokenizer_config.json ({} if it has none)."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._config = config
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.bos_id = _special_id("bos_token", config, vocabulary, _BOS_NAMES)
        self.eos_id = _special_id("eos_token", config, vocabulary, _EOS_NAMES)
        canonical = json.dumps(json.loads(backend.to_str()), sort_keys=True, separators=(",", ":"))
        self.fingerprint: str = hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> Tokenizer:
        """Learns a byte-level BPE vocabulary of at most ``vocab_size`` entries from ``texts``.

        The vocabulary holds all 256 bytes and both special tokens whatever the texts are; little text gives
        fewer merges and so a smaller vocabulary. The same texts in the same order give the same tokenizer.
        Raises TokenizerError for a ``vocab_size`` below 258.
        """
        if vocab_size < cls.SMALLEST_VOCABULARY:
            raise TokenizerError(
                f"vocab_size is {vocab_size}, must be at least {cls.SMALLEST_VOCABULARY} (256 bytes and 2 special "
                "tokens)"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        # Others that read the file (transformers, vLLM) then begin a prompt with bos, as training does.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A",
            pair=f"{BOS} $A {BOS}:1 $B:1",
            special_tokens=[(BOS, backend.token_to_id(BOS))],
        )
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
        }
        return cls(backend, config)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads a directory in the Hugging Face layout, or a ``tokenizer.json`` itself.

        bos and eos are those that the ``tokenizer_config.json`` beside it names; where it names none,
        well-known names in the vocabulary decide. Raises TokenizerError for a missing or unreadable file.
        """
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(
                f"no tokenizer at {file}: give a {TOKENIZER_FILE} or a directory that holds one "
                "(transformers' save_pretrained writes it)"
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} is not a Hugging Face {TOKENIZER_FILE}: {error}") from error
        config_file = file.with_name(CONFIG_FILE)
        try:
            config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
        except ValueError as error:
            raise TokenizerError(f"{config_file} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise TokenizerError(f"{config_file} holds a {type(config).__name__}, not a JSON object")
        return cls(backend, config)

    def save(self, directory: str | Path) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json`` for transformers' AutoTokenizer, too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / TOKENIZER_FILE))
        config = dict(self._config)
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        config.setdefault("bos_token", self._name(self.bos_id))
        config.setdefault("eos_token", self._name(self.eos_id))
        config.setdefault("clean_up_tokenization_spaces", False)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")

    def to_json(self) -> str:
        """What :meth:`save` writes to ``tokenizer.json``, for other libraries that read it."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of ``text``, between bos and eos where asked.

        Raises TokenizerError for a lone surrogate (not a character) and for a bos or eos that is not there.
        """
        return self._frame(self._encoded([text])[0], bos, eos)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without bos and eos; on all cores unless TOKENIZERS_PARALLELISM=false."""
        return self._encoded(texts)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids beyond the vocabulary are left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one by one."""
        if isinstance(self._backend.decoder, decoders.ByteLevel):
            return _ByteLevelStream(self._backend, self._special)
        return _WindowStream(self._backend, self._special)

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text holds a lone surrogate (U+{ord(error.object[error.start]):04X}) at character "
                f"{error.start}: only whole Unicode characters can be encoded"
            ) from error
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _frame(self, ids: list[int], bos: bool, eos: bool) -> list[int]:
        if (bos and self.bos_id is None) or (eos and self.eos_id is None):
            name = "bos_token" if bos and self.bos_id is None else "eos_token"
            raise TokenizerError(f"this tokenizer has no {name}: name one in its {CONFIG_FILE}")
        first = [self.bos_id] if bos and self.bos_id is not None else []
        last = [self.eos_id] if eos and self.eos_id is not None else []
        return [*first, *ids, *last]

    def _name(self, id: int | None) -> str | None:
        return None if id is None else self._backend.id_to_token(id)


class TextStream:
    """Turns ids into text one by one, whole characters only.

    The pushed pieces and the flush together are ``Tokenizer.decode`` of all ids (special tokens skipped).
    Each push costs the same however long the text already is.
    """

    def push(self, id: int) -> str:
        """The text that ``id`` completes; '' while bytes of a character are pending."""
        raise NotImplementedError

    def flush(self) -> str:
        """What is still pending at the end; bytes that never became a character turn into U+FFFD."""
        raise NotImplementedError


class _ByteLevelStream(TextStream):
    """Each token is a string of bytes, so an incremental UTF-8 decoder is all it takes."""

    def __init__(self, backend: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self._backend = backend
        self._special = special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        token = None if id in self._special else self._backend.id_to_token(id)
        return "" if token is None else self._utf8.decode(_token_bytes(token))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _WindowStream(TextStream):
    """For every other kind of token: decodes a short window and returns what the newest tokens added to it.

    The window is the tokens of the last piece that was returned plus the pending ones, as in vLLM's
    detokenizer: a token's text depends on its neighbours (a leading space is dropped at the start only). A
    run of byte tokens (``<0xE2>``) is kept back as a whole, because its text is known only at its end: one
    bad byte turns all of the run into U+FFFD.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: frozenset[int]) -> None:
        self._backend = backend
        self._special = special
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, id: int) -> str:
        token = None if id in self._special else self._backend.id_to_token(id)
        if token is None:
            return ""
        byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        text = "" if byte else self.flush()
        self._pending.append(id)
        return text if byte else text + self.flush()

    def flush(self) -> str:
        if not self._pending:
            return ""
        before = self._backend.decode(self._context)
        after = self._backend.decode(self._context + self._pending)
        self._context, self._pending = self._pending, []
        return str(after[len(before) :])


def _byte_of_character() -> dict[str, int]:
    """GPT-2's stand-ins for bytes: printable Latin-1 stands for itself, the rest moves to U+0100 and on."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in itself]
    return {chr(byte): byte for byte in itself} | {chr(0x100 + n): byte for n, byte in enumerate(moved)}


_BYTE_OF_CHARACTER = _byte_of_character()


def _token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; an added token's name is plain text."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


def _special_id(
    key: str, config: dict[str, Any], vocabulary: dict[str, int], well_known: tuple[str, ...]
) -> int | None:
    """The id that ``config[key]`` names (a string, {"content": ...} or null), else a well-known one."""
    if key not in config:
        return next((vocabulary[name] for name in well_known if name in vocabulary), None)
    named = config[key]
    if isinstance(named, dict):
        named = named.get("content")
    if named is None:
        return None
    if named not in vocabulary:
        raise TokenizerError(f"{CONFIG_FILE} names {key} {named!r}, which is not in the vocabulary")
    return vocabulary[named]
