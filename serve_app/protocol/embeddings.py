"""Bodies of OpenAI's embeddings API. Experimental: a model that is trained to continue text places texts crudely."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, field_validator

from serve_app.errors import bad_request
from serve_app.protocol.completions import as_prompts
from serve_app.protocol.sampling import MAX_CHOICES, Texts, TokenIds, WithoutEffect, one_message


class EmbeddingRequest(WithoutEffect):
    """The body of `POST /v1/embeddings`."""

    model: str = Field(
        description="A name of GET /v1/models: NAME, NAME@ALIAS, models:/NAME/7 or NAME:ADAPTER."
    )
    input: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)] = Field(
        description="Text or token ids; a list of them gets an embedding each."
    )
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: little-endian 32-bit floats, in base64."
    )
    dimensions: int | None = Field(None, description="Not supported.")

    @field_validator("input", mode="wrap")
    @classmethod
    def _one_message(cls, value: object, handler: ValidatorFunctionWrapHandler) -> object:
        allowed = "a string, a list of strings, a list of token ids (integers) or a list of such lists"
        return one_message(value, handler, allowed)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt. Raises ApiError (400) for what is not supported."""
        if self.dimensions is not None:
            message = "dimensions is not supported; leave it out: an embedding has the model's hidden size"
            raise bad_request("dimensions", message)
        prompts = as_prompts(self.input)
        if not 0 < len(prompts) <= MAX_CHOICES:
            message = f"input has {len(prompts)} prompts; it must have 1 to {MAX_CHOICES}"
            raise bad_request("input", message)
        return prompts

    def written(self, embedding: Sequence[float]) -> list[float] | str:
        """Return an embedding in `encoding_format`."""
        if self.encoding_format == "float":
            return [*embedding]
        return base64.b64encode(array("f", embedding).tobytes()).decode()


class Embedding(BaseModel):
    """The embedding of one prompt: the mean of the last hidden states of its tokens."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """The answer: an embedding for each prompt."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
