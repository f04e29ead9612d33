"""The files of a Hugging Face tokenizer: `tokenizer.json`, and what stands beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.foreign.read import NAMES, holds_tokenizer, read_foreign
from llama_ray.utils.errors import printable

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER_FILE, *NAMES)
"""What holds a tokenizer in a model's directory; the first that is there counts."""
CONFIG_FILE = "tokenizer_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MORE_CHAT_TEMPLATES = "additional_chat_templates"

_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_ADDED_TOKENS_FILE = "added_tokens.json"
# The vocabulary of `tokenizer.json` in the formats of SentencePiece, GPT-2, BERT and Mistral.
_VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "tekken.json")
# As transformers names them; `additional_special_tokens` was renamed.
_LISTS_OF_SPECIAL_TOKENS = ("additional_special_tokens", "extra_special_tokens")


def read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a directory or a file, and its configuration, {} if it has none.

    Of a directory the `tokenizer.json` is read, else its `tokenizer.model`, `tekken.json` or only GGUF file. The
    configuration is `tokenizer_config.json` with what older and newer versions of transformers keep in files of
    their own: special tokens and chat templates. Tokens that only the configuration adds are added to the tokenizer.
    Raises TokenizerError for a missing or unreadable file.
    """
    file = _tokenizer_file(path)
    foreign = read_foreign(file)
    backend, own = foreign or (_read_json(file), {})
    config = own | _read_object(file.with_name(CONFIG_FILE))
    if foreign:
        # Not the class with which transformers would convert the file in its own way.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "added_tokens_decoder" not in config:
        # Since transformers 4.34 these files repeat what tokenizer_config.json says.
        config |= _read_object(file.with_name(_SPECIAL_TOKENS_FILE))
        if ids := _read_object(file.with_name(_ADDED_TOKENS_FILE)):
            config["added_tokens_decoder"] = _in_new_form(ids, set(special_tokens(config)))
    try:
        _add_tokens(backend, _added(config))
    except (AttributeError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{file.with_name(CONFIG_FILE)}: added_tokens_decoder cannot be read ({error}); save it again"
        ) from error
    templates = _read_chat_templates(file.parent)
    return backend, config | ({"chat_template": templates} if templates else {})


def has_tokenizer(path: Path) -> bool:
    """Whether `path` is a file with a tokenizer, or a directory with one in a form that `read_tokenizer` knows."""
    if path.is_file():
        return holds_tokenizer(path)
    return any((path / name).is_file() for name in TOKENIZER_FILES)


def _tokenizer_file(path: Path) -> Path:
    """Return the file of a tokenizer that `path` is or holds. Raises TokenizerError if there is none, or a choice."""
    file = path
    if path.is_dir():
        names = (name for name in TOKENIZER_FILES if (path / name).is_file())
        models = sorted(path.glob("*.gguf"))
        if (name := next(names, None)) is not None or not models:
            file = path / (name or TOKENIZER_FILE)
        elif len(models) == 1:
            file = models[0]
        else:
            raise TokenizerError(f"{printable(str(path))} holds {len(models)} .gguf files; name one of them")
    if not file.is_file():
        raise TokenizerError(
            f"no tokenizer at {printable(str(file))}; give a {TOKENIZER_FILE}, a {NAMES[0]} (of SentencePiece or Llama "
            f"3), a {NAMES[1]}, a .gguf file or a directory that holds one"
        )
    return file


def _read_json(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises bare Exception.
        raise TokenizerError(
            f"{printable(str(file))} cannot be read as a Hugging Face {TOKENIZER_FILE} ({error}), and is in no other "
            "format of a tokenizer; save it again"
        ) from error


def superseded_files(directory: Path, files: Mapping[str, str]) -> list[str]:
    """Return the names of files in `directory` that belong to the tokenizer there and not to that of `files`.

    `files` are the texts of the new `tokenizer.json` and its configuration, or empty if there is no tokenizer any more.
    What `read_tokenizer` reads is contained in them. The vocabulary in other formats stays beside the same tokenizer.
    """
    templates = [
        f"{MORE_CHAT_TEMPLATES}/{file.name}" for file in (directory / MORE_CHAT_TEMPLATES).glob("*.jinja")
    ]
    names = [
        TOKENIZER_FILE,
        CONFIG_FILE,
        _SPECIAL_TOKENS_FILE,
        _ADDED_TOKENS_FILE,
        CHAT_TEMPLATE_FILE,
        *templates,
    ]
    if TOKENIZER_FILE not in files or not _is_same(directory / TOKENIZER_FILE, files[TOKENIZER_FILE]):
        names += _VOCABULARY_FILES
    return [name for name in names if name not in files]


def _is_same(file: Path, text: str) -> bool:
    """Return whether `file` holds the tokenizer of `text`, a new `tokenizer.json`."""
    try:
        old = tokenizers.Tokenizer.from_file(str(file))
    except Exception:  # The library raises bare Exception.
        return False
    old.no_truncation()
    old.no_padding()
    return bool(json.loads(old.to_str()) == json.loads(text))


def content(token: object) -> str | None:
    """Return the text of a token in a configuration: a string, {"content": ...} or null; '' is none, too."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise TokenizerError(f"{CONFIG_FILE} names the token {text!r:.80}; it must be a string or null")
    return text or None


def special_tokens(config: dict[str, Any]) -> Iterator[str]:
    """Yield all tokens that a configuration names as special; they may be missing from the vocabulary."""
    named = [value for key, value in config.items() if key.endswith("_token") and not isinstance(value, bool)]
    for key in _LISTS_OF_SPECIAL_TOKENS:
        value = config.get(key) or ()
        named += value.values() if isinstance(value, dict) else value
    named += [token for token in _added(config).values() if isinstance(token, dict) and token.get("special")]
    yield from (text for token in named if (text := content(token)) is not None)


def chat_templates(config: dict[str, Any]) -> dict[str, str]:
    """Return the chat templates of a configuration by name; {} if it has none."""
    stored = config.get("chat_template") or {}
    if isinstance(stored, str):
        return {"default": stored}
    if isinstance(stored, list) and all(isinstance(entry, dict) for entry in stored):
        stored = {entry.get("name"): entry.get("template") for entry in stored}
    if isinstance(stored, dict) and all(isinstance(text, str) for entry in stored.items() for text in entry):
        return stored
    raise TokenizerError(
        f"{CONFIG_FILE} has the chat_template {stored!r:.80}; it must be a text, or a list of names and templates"
    )


def _added(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("added_tokens_decoder") or {}


def _in_new_form(ids: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """Return the content of an `added_tokens.json`, ids by text, as `added_tokens_decoder` has it."""
    return {
        str(id): {"content": text, "special": text in special, "normalized": text not in special}
        for text, id in ids.items()
    }


def _add_tokens(backend: tokenizers.Tokenizer, added: dict[str, Any]) -> None:
    """Add tokens that `tokenizer.json` lacks, in the order of their ids, as transformers does."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    tokens = [AddedToken(**token) for _, token in sorted(added.items(), key=lambda item: int(item[0]))]
    backend.add_tokens([token for token in tokens if token.content not in known])


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`; {} if there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise TokenizerError(f"{file} is not JSON ({error}); correct it or save it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} holds a {type(value).__name__}; it must hold a JSON object")
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is not UTF-8 ({error.reason}); save it again") from error


def _read_chat_templates(directory: Path) -> str | list[dict[str, str]] | None:
    """Return the chat templates that are files, in the form of `tokenizer_config.json`."""
    files = {file.stem: file for file in sorted((directory / MORE_CHAT_TEMPLATES).glob("*.jinja"))}
    if (directory / CHAT_TEMPLATE_FILE).is_file():
        files["default"] = directory / CHAT_TEMPLATE_FILE
    templates = {name: _read_text(file) for name, file in files.items()}
    if templates.keys() <= {"default"}:
        return templates.get("default")
    return [{"name": name, "template": text} for name, text in templates.items()]
