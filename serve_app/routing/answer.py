"""What a client has of an answer, from which a lost request goes on."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.protocol.generation import GenerationRequest
from serve_app.streams.messages import ChoiceDelta, Started


class Answer:
    """Collects what replicas send of one request, each of which goes on where the one before it was lost."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self._tokens: dict[int, list[int] | None] = {}
        self.started: Started | None = None
        self.completion_tokens = 0

    @property
    def complete(self) -> bool:
        """Whether every choice has its last delta."""
        complete = sum(tokens is None for tokens in self._tokens.values())
        return complete == self.request.choices

    @property
    def done(self) -> dict[int, list[int] | None]:
        """What `Submission.done` is for the rest."""
        return (
            {} if self.started is None else {i: self._tokens.get(i, []) for i in range(self.request.choices)}
        )

    def start(self, started: Started) -> list[ChoiceDelta]:
        """Take the first event of a replica; return the echo of the prompts that the client has not got yet."""
        first, self.started = self.started is None, self.started or started
        if not first or started.echo is None:
            return []
        n = self.request.params.n
        return [ChoiceDelta(i * n + j, text, []) for i, text in enumerate(started.echo) for j in range(n)]

    def take(self, deltas: Sequence[ChoiceDelta]) -> None:
        """Note what came."""
        for delta in deltas:
            tokens = self._tokens.setdefault(delta.index, [])
            assert tokens is not None
            tokens += delta.token_ids
            self.completion_tokens += len(delta.token_ids)
            if delta.finish_reason is not None:
                self._tokens[delta.index] = None
