"""Bodies of `/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them and lm-evaluation-harness reads them."""

from __future__ import annotations

from pydantic import BaseModel, Field

from serve_app.protocol.sampling import StrictBody, TokenIds

_MODEL = "As in a completion; by default the first model of GET /v1/models."


class TokenizeRequest(StrictBody):
    """The body of `POST /tokenize`. Special tokens in the text are parsed."""

    model: str | None = Field(None, description=_MODEL)
    prompt: str = Field(description="Text to tokenise.")
    add_special_tokens: bool = Field(True, description="Also those that a prompt gets, such as bos.")
    return_token_strs: bool = Field(False, description="Also return the text of each token.")


class TokenizeResponse(BaseModel):
    """The answer: token ids, and the model's limit of tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(StrictBody):
    """The body of `POST /detokenize`."""

    model: str | None = Field(None, description=_MODEL)
    tokens: TokenIds = Field(description="Token ids to turn into text, special ones included.")


class DetokenizeResponse(BaseModel):
    """The answer: the text, in the field that `POST /tokenize` takes it in."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The body of `GET /tokenizer_info`: special tokens, and the chat template (several by name, as a mapping)."""

    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | dict[str, str] | None = None
    vocab_size: int
    model_max_length: int
    model: str

    @classmethod
    def of(
        cls, ref: str, special: dict[str, str], templates: dict[str, str], **numbers: int
    ) -> TokenizerInfo:
        """Return what is known of the tokenizer of the version `ref`."""
        one = templates["default"] if [*templates] == ["default"] else templates or None
        known = {name: special[name] for name in special if name in cls.model_fields}
        return cls.model_validate({"chat_template": one, "model": ref} | known | numbers)
