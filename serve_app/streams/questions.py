"""Questions to one version of a model that are answered with a single message, and the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_ray.data.chat.template import ChatPrompt
from serve_app.streams.messages import Failure


@dataclass(frozen=True)
class Tokenize:
    """Which tokens is a text or a conversation? `add_special_tokens` puts those around a text that a prompt gets."""

    prompt: str | ChatPrompt
    add_special_tokens: bool = True


@dataclass(frozen=True)
class Tokenized:
    """Token ids, the text of each (bytes that are not UTF-8 are U+FFFD), and the model's limit of tokens."""

    token_ids: list[int]
    texts: list[str]
    max_model_len: int


@dataclass(frozen=True)
class Detokenize:
    """Which text do tokens stand for, special ones included?"""

    token_ids: list[int]


@dataclass(frozen=True)
class Detokenized:
    """A text."""

    text: str


@dataclass(frozen=True)
class Describe:
    """What does the tokenizer's configuration say?"""


@dataclass(frozen=True)
class Description:
    """Special tokens by the names of `tokenizer_config.json`, the chat templates by name, and two numbers."""

    special_tokens: dict[str, str]
    chat_templates: dict[str, str]
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True)
class Score:
    """How probable is each text, after its `context` if it has one?"""

    contexts: Sequence[str]
    texts: Sequence[str]


@dataclass(frozen=True)
class TextScore:
    """The tokens of a text with their natural log-probabilities; the first is None where nothing comes before it.

    `scored_bytes` of the text, in UTF-8, belong to tokens with a log-probability. `is_greedy`: each of them is the most
    probable token. `prompt_tokens` are all that were computed.
    """

    token_ids: list[int]
    tokens: list[str]
    logprobs: list[float | None]
    scored_bytes: int
    is_greedy: bool
    prompt_tokens: int


@dataclass(frozen=True)
class Scored:
    """A score for each text."""

    scores: list[TextScore]


@dataclass(frozen=True)
class Embed:
    """What are the mean last hidden states of prompts?"""

    prompts: Sequence[str | list[int]]


@dataclass(frozen=True)
class Embedded:
    """An embedding of each prompt, and the tokens of all of them."""

    embeddings: list[list[float]]
    prompt_tokens: int


Question = Tokenize | Detokenize | Describe | Score | Embed
Reply = Tokenized | Detokenized | Description | Scored | Embedded | Failure
