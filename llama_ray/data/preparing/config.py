"""What to prepare: the settings of a preparation, and the names of its sources."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.conversations.config import ConversationConfig
from llama_ray.data.conversations.fields import ConversationFields
from llama_ray.data.conversations.preferences import PreferenceFields
from llama_ray.data.dataset.info import Task
from llama_ray.data.records.fields import Fields, TextFields
from llama_ray.data.sources.files import SourceError
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.data.tokenizing.training import TrainingOptions
from llama_ray.storage.paths import is_uri
from llama_ray.utils.errors import printable
from llama_ray.utils.fields import check_fields, limits
from llama_ray.utils.redact import RedactedRepr

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FOR_TEXT = ("text_field", "template", "vocab_size", "tokenizer_weights", "compare_tokenizer")
"""Settings that have no effect on conversations."""
CLEANS_TEXT = ("clean", "unicode", "language", "language_threshold", "decontaminate", "decontaminate_words")
"""Settings of `CleanConfig` that have none."""
_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)", re.ASCII | re.DOTALL)
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_-]+")


class NamedSource(NamedTuple):
    """Where text comes from (see `files`), and the name that its texts, counts and shards go by."""

    name: str
    where: str


@dataclass(frozen=True, repr=False)
class PrepareConfig(RedactedRepr):
    r"""What to make a dataset from, and where to write it.

    Args:
        source: 'builtin' (source code of the standard library), a file, a folder, a glob or a URI; NAME=WHERE names it.
            Several sources make one dataset whose shards are labelled with their names.
        output: Directory for the dataset, on storage that all nodes of the cluster share.
        task: What the data are for: pretrain takes texts, sft (supervised fine-tuning) conversations, dpo (direct
            preference optimisation) pairs of a chosen and a rejected answer to one prompt.
        text_field: Field of a record that holds its text; dots lead into nested fields.
        template: Text with names of fields in braces, such as '{title}\n\n{body}', in place of one field.
        max_bad_records: Maximum number of broken records, which are left out; one more is an error.
        vocab_size: Maximum vocabulary size of the tokenizer to train; unused with `tokenizer`.
        tokenizer: A tokenizer.json, tokenizer.model (of SentencePiece or Llama 3), tekken.json or .gguf file, or a
            directory that holds one, to use instead of training a tokenizer; or the model of which it is:
            hf://ORG/NAME, models:/NAME/VERSION.
        tokenizer_weights: NAME=SHARE of each source in the text that a tokenizer is trained on; by default its bytes.
        compare_tokenizer: A second tokenizer, whose bytes a token on the validation split are told beside the first's.
        validation_fraction: Fraction of the texts for the validation split; at least one text.
        seed: Decides which texts are for validation, and which pieces `max_bytes` leaves out.
        max_bytes: Maximum bytes of the sources to use, as they are stored, in a pseudo-random choice; by default all.
        shard_bytes: Minimum bytes of a source, as they are stored, that make one shard and one task.
        workers: Maximum number of tasks at once; by default one for each CPU of the cluster.
        overwrite: Replace a dataset in `output`.
        cleaning: Which texts to take, and in which form.
        training: What the vocabulary of a trained tokenizer is like; unused with `tokenizer`.
        conversations: How conversations become rows of tokens; for another task than pretrain.
    """

    source: list[str]
    output: str
    task: Task = "pretrain"
    text_field: str = "text"
    template: str | None = None
    max_bad_records: int = field(default=0, metadata=limits(0, 2**63 - 1))
    vocab_size: int = field(default=32000, metadata=limits(1, Tokenizer.LARGEST_VOCABULARY))
    tokenizer: str | None = None
    tokenizer_weights: list[str] | None = None
    compare_tokenizer: str | None = None
    validation_fraction: float = field(default=0.01, metadata=limits(above=0, below=1))
    seed: int = field(default=0, metadata=limits(0, 2**63 - 1))
    max_bytes: int | None = field(default=None, metadata=limits(1, 2**63 - 1))
    shard_bytes: int = field(default=4 * 1024 * 1024, metadata=limits(1, 2**63 - 1))
    workers: int | None = field(default=None, metadata=limits(1))
    overwrite: bool = False
    cleaning: CleanConfig = field(default_factory=CleanConfig)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    conversations: ConversationConfig = field(default_factory=ConversationConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tokenizer is None:
            self.training.check(self.vocab_size)
        if is_uri(self.output):
            raise ValueError(f"output is {self.output!r}; give a directory on storage that all nodes share")
        if printable(self.output, limit=len(self.output)) != self.output:
            raise ValueError(f"output is '{printable(self.output)}'; it must be text in UTF-8 on one line")
        self.weights()
        self.fields()
        self._check_task()

    @property
    def row_tokens(self) -> int | None:
        """Tokens of the rows that conversations are packed into; None where texts are prepared."""
        return None if self.task == "pretrain" else self.conversations.seq_len

    @property
    def unit(self) -> str:
        """What a dataset is made of."""
        return {"pretrain": "text", "sft": "conversation", "dpo": "pair of answers"}[self.task]

    def fields(self) -> Fields:
        """Return what makes the text of a record. Raises ValueError for a template that is none."""
        if self.task == "dpo":
            return PreferenceFields()
        if self.task == "sft":
            return ConversationFields(self.conversations.conversation_format)
        return TextFields(self.text_field, self.template)

    def _check_task(self) -> None:
        """Raise ValueError for what the task needs, and for what it makes no use of."""
        tuning = self.task != "pretrain"
        needed = {"tokenizer": self.tokenizer, "seq_len": self.conversations.seq_len}
        if tuning and (missing := [name for name, value in needed.items() if value is None]):
            raise ValueError(
                f"{missing[0]} is missing; task {self.task} needs "
                + (
                    "the tokenizer of the model to tune"
                    if missing[0] == "tokenizer"
                    else "the length of its rows"
                )
                + f"; give --{missing[0]}"
            )
        unused = (
            _given(self, FOR_TEXT) + _given(self.cleaning, CLEANS_TEXT)
            if tuning
            else _given(self.conversations)
        )
        if self.task == "dpo" and self.conversations.conversation_format != "auto":
            raise ValueError(
                f"conversation_format is {self.conversations.conversation_format}; it has an effect on task sft only; "
                "leave it out"
            )
        if unused:
            kind = "texts (task pretrain)" if tuning else "conversations (task sft or dpo)"
            raise ValueError(f"{unused[0]} is given; it has an effect on {kind} only; leave it out")

    def sources(self) -> list[NamedSource]:
        """Return the sources with their names. Raises SourceError for a name that is given twice."""
        return named_sources(self.source)

    def weights(self) -> dict[str, float] | None:
        """Return source -> its share of the tokenizer's text, which sum to 1; None if its bytes decide."""
        return shares("tokenizer_weights", self.tokenizer_weights, self.sources())


def _given(config: DataclassInstance, names: Collection[str] | None = None) -> list[str]:
    """Return the fields of a configuration, or those of these `names`, that have another value than by default."""
    return [
        field.name
        for field in dataclasses.fields(config)
        if (names is None or field.name in names) and getattr(config, field.name) != field.default
    ]


def named_sources(given: Sequence[str]) -> list[NamedSource]:
    """Return the sources with their names. Raises SourceError for a name that is given twice, and for none."""
    if not given:
        raise SourceError("source is empty; give 'builtin', a file, a folder, a glob or a URI")
    found = [named_source(one) for one in given]
    name, count = Counter(source.name for source in found).most_common(1)[0]
    if count > 1:
        raise SourceError(
            f"{count} sources are named {name}; each must have a name of its own; write --source NAME=WHERE"
        )
    return found


def shares(flag: str, given: Sequence[str] | None, sources: Sequence[NamedSource]) -> dict[str, float] | None:
    """Return source -> share, which sum to 1, from NAME=SHARE; None if none are given.

    Raises ValueError, which names `flag`, for another text and a name that is unknown or given twice.
    """
    if given is None:
        return None
    names = [source.name for source in sources]
    found: dict[str, float] = {}
    for one in given:
        name, _, text = one.rpartition("=")
        share = _share(text)
        if name not in names or name in found or share is None:
            raise ValueError(
                f"{flag} is {printable(one)!r}; it must be NAME=SHARE with a positive share, once for each of "
                f"{printable(', '.join(names))}"
            )
        found[name] = share
    return {name: share / sum(found.values()) for name, share in found.items()}


def named_source(given: str) -> NamedSource:
    """Split NAME=WHERE; by default a source is named as its last part is, without suffixes and globs."""
    if match := _NAMED.fullmatch(given):
        return NamedSource(match[1], match[2])
    path = given.partition("?")[0] if is_uri(given) else given
    parts = [part for part in path.split("/") if part and not set(part) & set("*?[:")]
    name = _NOT_IN_NAMES.sub("-", parts[-1].lstrip(".").partition(".")[0] if parts else "").strip("-")
    return NamedSource(name or "text", given)


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if 0 < share < float("inf") else None
