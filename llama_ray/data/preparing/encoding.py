"""From the conversations of a part to examples, and what is wrong with those that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from llama_ray.data.cleaning.drops import Drop
from llama_ray.data.conversations.config import ConversationConfig
from llama_ray.data.conversations.conversation import Conversation
from llama_ray.data.conversations.examples import Example, ExampleEncoder, Refusal
from llama_ray.data.conversations.pairs import Units, units_of_pair
from llama_ray.data.conversations.preferences import Preference
from llama_ray.data.preparing.bad_records import BadRecords
from llama_ray.data.preparing.kept import Taken
from llama_ray.data.preparing.part_record import PartRecord
from llama_ray.data.preparing.parts import Part
from llama_ray.data.preparing.row_writer import Encoded
from llama_ray.data.sources.formats import Format
from llama_ray.data.sources.left_out import LeftOut
from llama_ray.data.tokenizing.tokenizer import Tokenizer

_BATCH_CHARACTERS = 256 * 1024
"""Conversations are encoded when they have so many characters: few exchanges with the process of the template."""


class ConversationEncoder:
    """Encodes the conversations of a part, and counts into `record` and `bad` what is no example."""

    def __init__(
        self,
        part: Part,
        tokenizer: Tokenizer,
        config: ConversationConfig,
        record: PartRecord,
        bad: BadRecords,
        *,
        pairs: bool = False,
    ) -> None:
        """With `pairs`, documents are pairs of answers (`Preference`) in place of conversations."""
        assert config.seq_len is not None
        self._read = _read_pair if pairs else _read_one
        self._part, self._config, self._record, self._bad = part, config, record, bad
        self.row_tokens = config.seq_len
        self._encoder = _encoder(tokenizer, config.now)
        # A token that every model has a row for; nothing is learned of it.
        self.padding = min(self._encoder.end_of_turn_ids) if tokenizer.eos_id is None else tokenizer.eos_id
        self._files = {piece.file.name: piece.file for piece in part.pieces}

    def encode(self, documents: Iterable[Taken]) -> Iterator[Encoded]:
        """Yield what becomes of each document, a conversation as JSON. Raises TooManyBadRecordsError."""
        for batch in _batches(documents):
            read = [self._read(taken.text) for taken in batch]
            found = iter(self._encoder.encode([each for one in read for each in one.conversations]))
            for taken, one in zip(batch, read, strict=True):
                units = one.units([next(found) for _ in one.conversations])
                if isinstance(units, Refusal):
                    self._refuse(taken, units)
                elif self._fits(taken, one.transcript(), units):
                    yield Encoded(taken.id, one.transcript(), units)

    def _fits(self, taken: Taken, text: str, units: Units) -> bool:
        longest = max(sum(len(example.ids) for example in unit) for unit in units)
        if longest <= self.row_tokens:
            return True
        detail = f"{longest:,} tokens, rows have {self.row_tokens:,}"
        if self._config.too_long == "drop":
            self._record.drops.add(
                self._part.source, taken.id, Drop("too_long", "text", 1, len(text), text, detail)
            )
        else:
            self._refuse(
                taken, Refusal("longer than a row; give a larger --seq_len, or --too_long drop", detail)
            )
        return False

    def _refuse(self, taken: Taken, refusal: Refusal) -> None:
        name, _, offset = taken.id.removeprefix(f"{self._part.source}/").rpartition(":")
        file = self._files[name]
        lines = file.layout.format is Format.JSON_LINES
        place = taken.place or ("" if lines else f" record {int(offset) + 1}")
        left_out = LeftOut(
            "record",
            refusal.reason,
            file.name,
            file.root,
            file.path,
            None if place else int(offset),
            place,
            refusal.detail,
        )
        self._record.left_out.add(left_out)
        self._bad.add(self._part.source, left_out)


class _Document(NamedTuple):
    """The conversations of a document, which follow each other in a row, and how they become units."""

    conversations: Sequence[Conversation]
    units: Callable[[Sequence[list[Example] | Refusal]], Units | Refusal]
    transcript: Callable[[], str]


def _read_one(text: str) -> _Document:
    conversation = Conversation.from_json(text)
    return _Document([conversation], _units_of_one, conversation.transcript)


def _read_pair(text: str) -> _Document:
    pair = Preference.from_json(text)
    return _Document([pair.chosen, pair.rejected], units_of_pair, pair.transcript)


def _units_of_one(encoded: Sequence[list[Example] | Refusal]) -> Units | Refusal:
    [examples] = encoded
    return examples if isinstance(examples, Refusal) else [[example] for example in examples]


def _batches(documents: Iterable[Taken]) -> Iterator[list[Taken]]:
    waiting: list[Taken] = []
    characters = 0
    for taken in documents:
        waiting.append(taken)
        characters += len(taken.text)
        if characters >= _BATCH_CHARACTERS:
            yield waiting
            waiting, characters = [], 0
    if waiting:
        yield waiting


# Of the tokenizer that a process uses for all its parts, and starts a process of templates for.
@lru_cache(maxsize=1)
def _encoder(tokenizer: Tokenizer, now: str) -> ExampleEncoder:
    return ExampleEncoder(tokenizer, now)
