"""How conversations become data for tuning: flags of `prepare_data.py`."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llama_ray.data.conversations.formats import ConversationFormat
from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.utils.errors import printable
from llama_ray.utils.fields import check_fields, limits


@dataclass(frozen=True)
class ConversationConfig:
    """How conversations become rows of tokens.

    Args:
        seq_len: Tokens of a row, which is the sequence length of training. Whole conversations are packed into rows.
        conversation_format: Form of the records: messages, prompt_completion, alpaca or sharegpt; auto looks at the
            fields of each record.
        chat_template: File of a chat template (Jinja) to use in place of the tokenizer's own. It is kept with the data,
            the checkpoints and the registered versions.
        too_long: What becomes of a conversation of more than `seq_len` tokens: refuse counts it as a bad record, drop
            leaves it out.
        template_date: Date that chat templates see, YYYY-MM-DD: the same for all conversations, now and later. The
            default is the one that Llama 3.1's own template falls back to.
    """

    seq_len: int | None = field(default=None, metadata=limits(2, 2**24))
    conversation_format: ConversationFormat = "auto"
    chat_template: str | None = None
    too_long: Literal["refuse", "drop"] = "refuse"
    template_date: str = "2024-07-26"

    def __post_init__(self) -> None:
        check_fields(self)
        try:
            datetime.date.fromisoformat(self.template_date)
        except ValueError:
            raise ValueError(
                f"template_date is {printable(self.template_date)!r}; it must be a date, such as 2024-07-26"
            ) from None

    @property
    def now(self) -> str:
        """The time that templates see, as `ChatPrompt` has it."""
        return f"{self.template_date}T00:00:00"

    def apply(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer with `chat_template`, if there is one. Raises TokenizerError for a file that is none."""
        if self.chat_template is None:
            return tokenizer
        try:
            text = Path(self.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise TokenizerError(
                f"chat_template is {printable(self.chat_template)}, which cannot be read ({reason}); give a file"
            ) from error
        return tokenizer.with_chat_template(text)
