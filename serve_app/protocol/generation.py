"""What a request asks of a model, whichever of the API's bodies it came in."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ray.generation.sampling.params import SamplingParams


@dataclass(frozen=True)
class GenerationRequest:
    """Each prompt, text or token ids, is completed `params.n` times by what `model` names.

    `echo` puts the prompt before each text. Requests of one `session` are answered by the same version while there is a
    canary.
    """

    model: str
    prompts: list[str | list[int]]
    params: SamplingParams
    echo: bool = False
    session: str | None = None

    @property
    def choices(self) -> int:
        """How many texts it asks for; choice i belongs to prompt i // n."""
        return len(self.prompts) * self.params.n
