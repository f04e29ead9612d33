"""A load: which requests are sent when, and what became of each. Imports nothing, so that clients start at once."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from typing import Any, Self

SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}


@dataclass(frozen=True)
class Load:
    """Requests of `prompt_tokens` random ids each, answered with exactly `new_tokens` tokens.

    Closed loop: each of `streams` clients sends `requests` requests, the next one when an answer is complete; None goes
    on until the one who asked says stop. Open loop: one request at each of `arrivals`, in seconds after the start.
    Requests have different prompts, or one of `prompts` ones; `fields` are added to each body. With `keep` an outcome
    has the events of the stream.
    """

    streams: int = 1
    requests: int | None = 1
    arrivals: list[float] | None = None
    prompt_tokens: int = 64
    new_tokens: int = 64
    vocab_size: int = 32000
    seed: int = 0
    prompts: int | None = None
    fields: dict[str, Any] = field(default_factory=lambda: dict(SAMPLING))
    keep: bool = False

    @classmethod
    def poisson(cls, rate: float, count: int, **fields: Any) -> Self:
        """Return an open loop of `count` requests, on average `rate` a second."""
        # Every contestant of a turn gets the same arrivals.
        rng = random.Random(fields.get("seed", 0))
        now, arrivals = 0.0, []
        for _ in range(count):
            now += rng.expovariate(rate)
            arrivals.append(now)
        return cls(arrivals=arrivals, **fields)

    def prompt(self, number: int) -> list[int]:
        """Return the prompt of request `number`."""
        if self.prompts is not None:
            number %= self.prompts
        rng = random.Random(f"{self.seed}/{number}")
        # The first ids are special tokens.
        return [rng.randrange(3, self.vocab_size) for _ in range(self.prompt_tokens)]

    def body(self, number: int, model: str) -> dict[str, Any]:
        """Return the body of request `number`, a completion that is streamed."""
        return {
            "model": model,
            "prompt": self.prompt(number),
            "max_tokens": self.new_tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | self.fields


@dataclass
class Outcome:
    """What became of request `number`; moments are in seconds of `time.monotonic`, the same for all processes.

    `due` is when it was sent, or should have been (open loop). `arrivals` has one moment for each time that text
    arrived, which may bring several tokens; `tokens` is what the server counted.
    """

    number: int
    due: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None
    version: str | None = None
    events: list[str] = field(default_factory=list)


@dataclass
class Measured:
    """The outcomes of a load, the seconds that it took, and the processor time of the client in them."""

    outcomes: list[Outcome]
    seconds: float
    client_cpu_s: float

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` returned."""
        outcomes = [Outcome(**outcome) for outcome in values.pop("outcomes")]
        return cls(outcomes, **values)
