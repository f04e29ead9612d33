"""Bodies of `/v1/score`: how probable a text is to the model."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, field_validator

from serve_app.errors import bad_request
from serve_app.protocol.sampling import MAX_CHOICES, StrictBody, Texts, Usage, one_message
from serve_app.streams.questions import TextScore


class ScoreRequest(StrictBody):
    """The body of `POST /v1/score`."""

    model: str = Field(
        description="A name of GET /v1/models: NAME, NAME@ALIAS, models:/NAME/7 or NAME:ADAPTER."
    )
    input: str | Texts = Field(description="A text or several, each scored by itself.")
    context: str = Field("", description="Comes before each text, and is not scored.")

    @field_validator("input", mode="wrap")
    @classmethod
    def _one_message(cls, value: object, handler: ValidatorFunctionWrapHandler) -> object:
        return one_message(value, handler, "a string or a list of strings")

    @property
    def texts(self) -> list[str]:
        """Each text. Raises ApiError (400) for none, too many, or an empty one."""
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not texts or not all(texts):
            raise bad_request(
                "input", "input is empty, or one of its texts is; give at least one character each"
            )
        if len(texts) > MAX_CHOICES:
            raise bad_request("input", f"input has {len(texts)} texts; it must have at most {MAX_CHOICES}")
        return texts


class Score(BaseModel):
    """The score of a text. Log-probabilities are natural, `loss` is their negative mean, in nats per token.

    Where nothing comes before the first token, its log-probability is null, and the loss and `bits_per_byte` leave out
    what it stands for. `is_greedy`: every token is the one that the model finds most probable.
    """

    object: Literal["score"] = "score"
    index: int
    tokens: list[str]
    token_ids: list[int]
    token_logprobs: list[float | None]
    logprob: float
    loss: float | None
    bits_per_byte: float | None
    is_greedy: bool

    @classmethod
    def of(cls, index: int, score: TextScore) -> Self:
        """Return the score of text `index`."""
        known = [logprob for logprob in score.logprobs if logprob is not None]
        total = math.fsum(known)
        return cls(
            index=index,
            tokens=score.tokens,
            token_ids=score.token_ids,
            token_logprobs=score.logprobs,
            logprob=total,
            loss=-total / len(known) if known else None,
            bits_per_byte=-total / math.log(2) / score.scored_bytes if score.scored_bytes else None,
            is_greedy=score.is_greedy,
        )


class ScoreResponse(BaseModel):
    """The answer: a score for each text."""

    object: Literal["list"] = "list"
    model: str
    system_fingerprint: str
    data: list[Score]
    usage: Usage
