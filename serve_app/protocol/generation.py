"""What a request asks of a model, whichever of the API's bodies it came in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_ray.generation.sampling.params import SamplingParams
from serve_app.streams.messages import Prompt


@dataclass(frozen=True)
class GenerationRequest:
    """Each prompt is completed `params.n` times by what `model` names.

    `echo` puts the prompt before each text. With `fit`, `params.max_tokens` is lowered to what the context leaves
    (otherwise a larger number is an error). Requests of one `session` are answered by the same version while there is a
    canary.
    """

    model: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    echo: bool = False
    session: str | None = None
    fit: bool = False

    @property
    def choices(self) -> int:
        """How many texts it asks for; choice i belongs to prompt i // n."""
        return len(self.prompts) * self.params.n
