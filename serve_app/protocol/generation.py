"""What a request asks of a model, whichever of the API's bodies it came in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llama_ray.generation.sampling.params import SamplingParams
from serve_app.streams.messages import Encoding, Prompt, Reporting


@dataclass(frozen=True)
class GenerationRequest:
    """Each prompt is completed `params.n` times by what `model` names.

    With `fit`, `params.max_tokens` is lowered to what the context leaves (otherwise a larger number is an error).
    Requests of one `session` are answered by the same version while there is a canary.
    """

    model: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    session: str | None = None
    fit: bool = False
    encoding: Encoding = field(default_factory=Encoding)
    reporting: Reporting = field(default_factory=Reporting)

    @property
    def choices(self) -> int:
        """How many texts it asks for; choice i belongs to prompt i // n."""
        return len(self.prompts) * self.params.n
