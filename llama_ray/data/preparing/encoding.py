"""From the conversations of a part to examples, and what is wrong with those that are none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from llama_ray.data.cleaning.drops import Drop
from llama_ray.data.conversations.config import ConversationConfig
from llama_ray.data.conversations.conversation import Conversation
from llama_ray.data.conversations.examples import Example, ExampleEncoder, Refusal
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
    ) -> None:
        assert config.seq_len is not None
        self._part, self._config, self._record, self._bad = part, config, record, bad
        self.row_tokens = config.seq_len
        self._encoder = _encoder(tokenizer, config.now)
        # A token that every model has a row for; nothing is learned of it.
        self.padding = min(self._encoder.end_of_turn_ids) if tokenizer.eos_id is None else tokenizer.eos_id
        self._files = {piece.file.name: piece.file for piece in part.pieces}

    def encode(self, documents: Iterable[Taken]) -> Iterator[Encoded]:
        """Yield what becomes of each document, a conversation as JSON. Raises TooManyBadRecordsError."""
        for batch in _batches(documents):
            conversations = [Conversation.from_json(taken.text) for taken in batch]
            for taken, conversation, examples in zip(
                batch, conversations, self._encoder.encode(conversations), strict=True
            ):
                if isinstance(examples, Refusal):
                    self._refuse(taken, examples)
                elif self._fits(taken, conversation, examples):
                    yield Encoded(taken.id, conversation.transcript(), [[example] for example in examples])

    def _fits(self, taken: Taken, conversation: Conversation, examples: list[Example]) -> bool:
        longest = max(len(example.ids) for example in examples)
        if longest <= self.row_tokens:
            return True
        detail = f"{longest:,} tokens, rows have {self.row_tokens:,}"
        if self._config.too_long == "drop":
            text = conversation.transcript()
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
