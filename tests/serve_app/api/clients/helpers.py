"""What all clients ask."""

from __future__ import annotations

from typing import Any

from llama_ray.data.chat.template import ChatPrompt
from llama_ray.generation.completion import Completion
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams

KEY = "sk-0123456789abcdefghij"
PROMPT = "The quick"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
MAX_TOKENS = 24


def completion(engine: Engine, prompt: str | list[int] = PROMPT, **params: Any) -> Completion:
    """What the engine writes after a prompt, greedily."""
    [answer] = engine.generate(
        [prompt], SamplingParams(**{"max_tokens": MAX_TOKENS, "temperature": 0} | params)
    )
    return answer


def answer(engine: Engine, messages: list[dict[str, Any]] = MESSAGES, **params: Any) -> Completion:
    """What the engine answers in a conversation, greedily."""
    [answer] = engine.generate(
        [ChatPrompt(messages)], SamplingParams(**{"max_tokens": MAX_TOKENS, "temperature": 0} | params)
    )
    return answer
