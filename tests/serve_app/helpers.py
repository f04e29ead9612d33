"""The tests' model, and short ways to ask it."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import openai
import torch

from llama_ray.generation.completion import Completion
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained
from serve_app.errors import ApiError
from serve_app.protocol.completions import Health
from serve_app.replica.replica import LlamaReplica
from serve_app.streams.messages import ChoiceDelta, Failure, GenerationRequest, ModelInfo, Started
from tests.small_models import small_config, small_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
]
EMOJI = "🙂"
MAX_SEQ_LEN = 4096
MAX_QUEUED = 32
"""Requests that wait for the served replica, beside the 16 that it works on."""


def save_model(directory: Path) -> None:
    """Save a random model; after an emoji, which is four tokens, it always writes another emoji."""
    tokenizer = small_tokenizer(TEXTS, 320)
    config = small_config(tokenizer.vocab_size, hidden_size=48, intermediate_size=96, max_seq_len=MAX_SEQ_LEN)
    model = Llama(config, seed=1)
    _chain(model, tokenizer.encode(EMOJI))
    save_pretrained(model, tokenizer, directory)


@torch.no_grad()
def _chain(model: Llama, tokens: list[int]) -> None:
    """Let each of four tokens be followed by the next one, and the last by the first."""
    assert len(tokens) == 4
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(6)
    # The last four dimensions of the hidden state say which of the tokens was read; no layer writes to them.
    model.embed_tokens.weight[:, -4:] = 0
    model.lm_head.weight[:, -4:] = 0
    for layer in model.layers:
        layer.self_attn.o_proj.weight[-4:] = 0
        layer.mlp.down_proj.weight[-4:] = 0
    for i, token in enumerate(tokens):
        model.embed_tokens.weight[token, i - 4] = 100
        model.lm_head.weight[tokens[(i + 1) % 4], i - 4] = 100


def expected(engine: Engine, prompt: str, **params: object) -> list[Completion]:
    """What the engine answers without HTTP."""
    return engine.generate([prompt], SamplingParams(**params))  # type: ignore[arg-type]


def stream_text(client: openai.OpenAI, prompt: str, **params: object) -> str:
    """The text that a streamed request joins to."""
    chunks = client.completions.create(model="tiny", prompt=prompt, stream=True, **params)  # type: ignore[call-overload]
    return "".join(chunk.choices[0].text for chunk in chunks)


class LocalModel:
    """A replica without Ray; if `dies` is set, its engine ends after the first text."""

    def __init__(self, directory: Path) -> None:
        self.replica = LlamaReplica(str(directory))
        self.dies = False

    async def info(self) -> ModelInfo:
        return await self.replica.info()

    async def check(self) -> Health:
        raise ApiError(503, "no model replica is running", code="unavailable", retry_after_s=5)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Started | list[ChoiceDelta]]:
        async for event in self.replica.generate(request):
            if isinstance(event, Failure):
                raise ApiError(event.status, event.message, code=event.code, param=event.param)
            yield event
            if self.dies and isinstance(event, list) and any(delta.text for delta in event):
                self.replica.stop()
