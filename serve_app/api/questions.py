"""Routes that are answered with one message: tokens, scores and embeddings of texts."""

from __future__ import annotations

from typing import TypeVar

from fastapi import FastAPI, Request, Response

from serve_app.api.disconnect import while_connected
from serve_app.api.generating import ERRORS, models_of, session_of
from serve_app.api.responses import VERSION_HEADER
from serve_app.protocol.embeddings import Embedding, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage
from serve_app.protocol.sampling import Usage
from serve_app.protocol.scoring import Score, ScoreRequest, ScoreResponse
from serve_app.protocol.tokenization import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from serve_app.streams import questions
from serve_app.streams.questions import Question

Reply = TypeVar("Reply")


def add_routes(api: FastAPI) -> None:
    """Add these routes."""
    _add_tokenization(api)

    @api.post("/v1/score", responses=ERRORS)
    async def score(body: ScoreRequest, request: Request, response: Response) -> ScoreResponse:
        """Return log-probabilities token by token, loss and bits per byte of each text."""
        texts = body.texts
        question = questions.Score([body.context] * len(texts), texts)
        ref, scored = await _ask(request, response, body.model, question, questions.Scored)
        return ScoreResponse(
            model=body.model,
            system_fingerprint=ref,
            data=[Score.of(index, score) for index, score in enumerate(scored.scores)],
            usage=Usage.of(sum(score.prompt_tokens for score in scored.scores), 0, cached=0),
        )

    @api.post("/v1/embeddings", responses=ERRORS)
    async def embeddings(body: EmbeddingRequest, request: Request, response: Response) -> EmbeddingResponse:
        """Return the mean of the last hidden states of each prompt. Experimental; other requests wait for each."""
        question = questions.Embed(body.prompts)
        _, reply = await _ask(request, response, body.model, question, questions.Embedded)
        data = [Embedding(index=i, embedding=body.written(e)) for i, e in enumerate(reply.embeddings)]
        usage = EmbeddingUsage(prompt_tokens=reply.prompt_tokens, total_tokens=reply.prompt_tokens)
        return EmbeddingResponse(model=body.model, data=data, usage=usage)


def _add_tokenization(api: FastAPI) -> None:
    @api.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest, request: Request, response: Response) -> TokenizeResponse:
        """Return the token ids of a text."""
        question = questions.Tokenize(body.prompt, body.add_special_tokens)
        _, reply = await _ask(request, response, body.model, question, questions.Tokenized)
        return TokenizeResponse(
            count=len(reply.token_ids),
            max_model_len=reply.max_model_len,
            tokens=reply.token_ids,
            token_strs=reply.texts if body.return_token_strs else None,
        )

    @api.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest, request: Request, response: Response) -> DetokenizeResponse:
        """Return the text of token ids."""
        question = questions.Detokenize(body.tokens)
        _, reply = await _ask(request, response, body.model, question, questions.Detokenized)
        return DetokenizeResponse(prompt=reply.text)

    @api.get("/tokenizer_info", responses=ERRORS)
    async def tokenizer_info(request: Request, response: Response, model: str | None = None) -> TokenizerInfo:
        """Return the special tokens and the chat template of a model."""
        question = questions.Describe()
        ref, reply = await _ask(request, response, model, question, questions.Description)
        return TokenizerInfo.of(
            ref,
            reply.special_tokens,
            reply.chat_templates,
            vocab_size=reply.vocab_size,
            model_max_length=reply.max_model_len,
        )


async def _ask(
    request: Request, response: Response, model: str | None, question: Question, kind: type[Reply]
) -> tuple[str, Reply]:
    """Return the version that answered, which the response names, and what it answered."""
    asking = models_of(request).ask(model, session_of(request, None), question)
    ref, reply = await while_connected(request, asking)
    assert isinstance(reply, kind)
    response.headers[VERSION_HEADER] = ref
    return ref, reply
