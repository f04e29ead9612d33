"""How the API has a request answered: by some replica, and by another one for the rest if that is lost."""

from __future__ import annotations

import asyncio
import logging
import secrets
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from serve_app.errors import INTERNAL_ERROR, ApiError
from serve_app.protocol.generation import GenerationRequest
from serve_app.registry.messages import AdapterVersion, ServedModel, Table
from serve_app.routing.admission import Admission, Place
from serve_app.routing.answer import Answer
from serve_app.routing.choice import choose
from serve_app.routing.losses import Losses
from serve_app.routing.replicas import Replicas
from serve_app.routing.tables import Tables
from serve_app.streams.messages import Answered, ChoiceDelta, Failure, Started, Submission
from serve_app.streams.questions import Question, Reply
from serve_app.streams.receiver import Lost, Receiver, Stream

_log = logging.getLogger(__name__)

_LAST_EVENTS_S = 5.0
"""How long the events of a call that has ended may be on their way."""
_REASONS: dict[Answered, str] = {
    "not_loaded": "the replica does not have that version",
    "engine_ended": "the engine of the replica that was answering has ended",
}


@dataclass(frozen=True)
class Accepted:
    """A replica has taken a request for the version `ref` of `model`, which is MODEL:ADAPTER `with_adapter`.

    Its prompts have `prompt_tokens` in all. `prompt_ids` are the token ids of each, if the request asked for them.
    """

    model: str
    ref: str
    prompt_tokens: int
    prompt_ids: list[list[int]] | None = None
    with_adapter: bool = False


Events = AsyncGenerator[Accepted | list[ChoiceDelta]]


class ModelClient(Protocol):
    """What the API needs of the models, wherever they run. All errors are ApiErrors."""

    @property
    def known(self) -> Table | None:
        """What is served; None as long as nobody has said."""

    async def table(self) -> Table:
        """Return what is served, as soon as it is known."""

    async def ask(self, model: str | None, session: str | None, question: Question) -> tuple[str, Reply]:
        """Return the version that answered a question about `model` (None: the first one), and its answer."""

    def generate(self, request: GenerationRequest) -> Events:
        """Yield `Accepted`, then lists of deltas, at most one for each choice.

        Closing the iterator frees all that the request holds.
        """


class RoutedClient:
    """The replicas that the table names. Use it in one event loop."""

    def __init__(
        self,
        tables: Tables,
        replicas: Replicas,
        receiver: Receiver,
        admission: Admission,
        resume_timeout_s: float,
    ) -> None:
        self._tables, self._replicas, self._receiver = tables, replicas, receiver
        self._admission, self._resume_timeout_s = admission, resume_timeout_s
        # asyncio holds its tasks weakly.
        self._calls: set[asyncio.Task[Answered]] = set()

    @property
    def known(self) -> Table | None:
        """See `ModelClient`."""
        return self._tables.table

    async def table(self) -> Table:
        """See `ModelClient`."""
        return await self._tables.current()

    async def generate(self, request: GenerationRequest) -> Events:
        """See `ModelClient`. A lost request goes on with the same version, or begins with the one that is current."""
        params, request_id = request.params, uuid.uuid4().hex
        if params.seed is None:
            # Another replica goes on with the same tokens.
            request = replace(request, params=replace(params, seed=secrets.randbits(63)))
        answer, losses = Answer(request), Losses(self._resume_timeout_s)
        ref, adapter, place = "", None, None
        with ExitStack() as held:
            while not answer.complete:
                table = await self._tables.current()
                if answer.started is None:
                    held.close()
                    model, ref, adapter = choose(table, request.model, request.session, request_id)
                    place = held.enter_context(self._enter(model, ref, table))
                    held.enter_context(self._tables.using(ref))
                assert place is not None
                deployment = deployment_of(table, ref)
                try:
                    with ExitStack() as asking:
                        asking.enter_context(self._tables.asking(deployment))
                        attempt = self._attempt(deployment, (ref, adapter), answer, losses, place, asking)
                        async with aclosing(attempt):
                            async for event in attempt:
                                yield event
                except Lost as loss:
                    _log.warning("a request is lost after %d tokens: %s", answer.completion_tokens, loss)
                    await losses.lost(loss, answer.completion_tokens)

    async def ask(self, model: str | None, session: str | None, question: Question) -> tuple[str, Reply]:
        """See `ModelClient`. A question that is lost is asked again."""
        losses, request_id = Losses(self._resume_timeout_s), uuid.uuid4().hex
        while True:
            table = await self._tables.current()
            served, ref, adapter = choose(table, model or table.models[0].spec.name, session, request_id)
            deployment = deployment_of(table, ref)
            with (
                self._enter(served, ref, table),
                self._tables.using(ref),
                self._tables.asking(deployment),
            ):
                try:
                    async with asyncio.timeout_at(losses.deadline):
                        reply = await self._replicas.ask(deployment, ref, question, adapter)
                except TimeoutError:
                    loss = Lost("no replica answered")
                except Lost as lost:
                    loss = lost
                else:
                    if isinstance(reply, Failure):
                        raise ApiError(reply.status, reply.message, param=reply.param, code=reply.code)
                    return ref, reply
            await losses.lost(loss, 0)

    async def _attempt(
        self,
        deployment: str,
        chosen: tuple[str, AdapterVersion | None],
        answer: Answer,
        losses: Losses,
        place: Place,
        asking: ExitStack,
    ) -> Events:
        """Have one replica answer what is missing; end `asking` when it begins. Raises Lost if it cannot."""
        request, stream, accepted = answer.request, self._receiver.open(), False
        ref, adapter = chosen
        model = place.model if adapter is None else f"{place.model}:{adapter.name}"
        submission = Submission(
            ref,
            request.prompts,
            request.params,
            self._receiver.address,
            stream.number,
            request.fit,
            request.encoding,
            request.reporting,
            answer.done,
            adapter,
        )
        call = self._call(deployment, submission, stream)
        try:
            while not answer.complete:
                async with asyncio.timeout_at(losses.deadline):
                    events = await stream.next()
                deltas, failure = list[ChoiceDelta](), None
                for event in events:
                    if isinstance(event, Started):
                        accepted = True
                        asking.close()
                        losses.accepted()
                        if answer.started is None:
                            ids = event.prompt_ids
                            yield Accepted(model, ref, event.prompt_tokens, ids, adapter is not None)
                        deltas += answer.start(event)
                    elif isinstance(event, Failure):
                        failure = event
                    else:
                        answer.take(event)
                        deltas += event
                if deltas:
                    yield _joined(deltas)
                if failure is not None:
                    raise ApiError(failure.status, failure.message, param=failure.param, code=failure.code)
        except TimeoutError:
            raise Lost("no replica took the rest of the request") from None
        finally:
            stream.close()
            # One that has been accepted ends by the message that closing the stream sends.
            if not accepted:
                call.cancel()

    def _enter(self, model: ServedModel, ref: str, table: Table) -> Place:
        status = model.status(ref)
        replicas = sum(status.ready.values()) if status else 0
        return self._admission.enter(model.spec.name, replicas, table.apis)

    def _call(self, deployment: str, submission: Submission, stream: Stream) -> asyncio.Task[Answered]:
        """Start a call that loses `stream` when no more can come from it."""
        task = asyncio.create_task(self._replicas.submit(deployment, submission))
        self._calls.add(task)
        task.add_done_callback(lambda task: self._ended(task, stream))
        return task

    def _ended(self, task: asyncio.Task[Answered], stream: Stream) -> None:
        self._calls.discard(task)
        if task.cancelled():
            # Mostly by `_attempt`, whose stream is closed by now.
            stream.lose(Lost("the call of the replica has been cancelled"))
        elif (error := task.exception()) is not None:
            if isinstance(error, Lost):
                stream.lose(error)
            else:
                _log.error("a call of a replica fails", exc_info=error)
                stream.lose(Lost(INTERNAL_ERROR, failed=True))
        elif (answered := task.result()) != "done":
            stream.lose(Lost(_REASONS[answered]))
        else:
            loop = asyncio.get_running_loop()
            loop.call_later(_LAST_EVENTS_S, stream.lose, Lost("the end of the answer has not arrived"))


def deployment_of(table: Table, ref: str) -> str:
    """Return the deployment whose replicas answer with the version `ref`; one that will, if none is ready."""
    for model in table.models:
        if (status := model.status(ref)) is not None:
            ready = [name for name, replicas in status.ready.items() if replicas]
            return next(iter([*ready, *status.ready]), model.spec.deployment)
    raise ApiError(404, f"model {ref} is no longer served", param="model", code="model_not_found")


def _joined(deltas: Sequence[ChoiceDelta]) -> list[ChoiceDelta]:
    """Return one delta for each choice, in the order in which the choices first appear."""
    by_choice: dict[int, list[ChoiceDelta]] = {}
    for delta in deltas:
        by_choice.setdefault(delta.index, []).append(delta)
    return [parts[0] if len(parts) == 1 else ChoiceDelta.joined(parts) for parts in by_choice.values()]
