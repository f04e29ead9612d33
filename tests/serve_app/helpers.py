"""The tests' model, and short ways to ask it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import openai
import torch

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.completion import Completion
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained
from serve_app.registry.messages import (
    AdapterVersion,
    ApiReport,
    EngineInfo,
    ModelSpec,
    ModelVersion,
    ReplicaPlan,
    ReplicaReport,
    ServedModel,
    Table,
    VersionStatus,
)
from serve_app.replica.questions import reply
from serve_app.replica.served_engine import ServedEngine
from serve_app.routing.admission import Admission, QueueLimit
from serve_app.routing.client import RoutedClient
from serve_app.routing.replicas import Replicas
from serve_app.routing.tables import Tables
from serve_app.streams.messages import Answered, Submission
from serve_app.streams.questions import Question, Reply
from serve_app.streams.receiver import Receiver
from serve_app.streams.sender import Connection, Sender
from tests.small_models import small_config, small_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
]
EMOJI = "🙂"
ADAPTERS = ("quiet", "loud")
LOUD_TEMPLATE = "{% for message in messages %}{{ message.content | upper }}!{% endfor %}"
MAX_SEQ_LEN = 4096
NO_LIMIT = QueueLimit(1, -1)
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


class LocalReplicas:
    """Replicas without Ray: engines in this process, used in turn, which send their events over real connections.

    `lose` has the replica that answers break its connection, as the end of its process would.
    """

    def __init__(self, directory: Path, number: int = 1, **options: object) -> None:
        version = ModelVersion("tiny", "tiny", str(directory))
        engines = [Engine.from_pretrained(directory, device="cpu", **options) for _ in range(number)]
        self.served = [ServedEngine(engine, version) for engine in engines]
        self.submissions: list[Submission] = []
        self._connections: list[Connection] = []

    async def submit(self, deployment: str, submission: Submission) -> Answered:
        """See `Replicas`."""
        number = len(self.submissions) % len(self.served)
        self.submissions.append(submission)
        # A sender for each request: losing one is then the loss of a replica that has no other.
        connection = await Sender().connect(submission.reply_to)
        self._connections.append(connection)
        try:
            return await self.served[number].answer(submission, connection)
        finally:
            connection.close()

    async def ask(
        self, deployment: str, ref: str, question: Question, adapter: AdapterVersion | None = None
    ) -> Reply:
        """See `Replicas`."""
        return await reply(self.served[0], question, adapter)

    def lose(self) -> None:
        """End the connection of the last submission at once, whatever it has not sent."""
        self._connections[-1].lose()

    def stop(self) -> None:
        """End the engines."""
        for served in self.served:
            served.stop()


def table_of(directory: Path, max_model_len: int = MAX_SEQ_LEN) -> Table:
    """A table in which the directory's model is ready on one replica."""
    version = ModelVersion(directory.name, directory.name, str(directory))
    tuned = Tokenizer.load(directory).chat_template is not None
    template: Literal["plain", "from the checkpoint"] = "from the checkpoint" if tuned else "plain"
    info = EngineInfo(0, max_model_len, 1000, "cpu", 1.0, template)
    status = VersionStatus(version, "serving", ready={"LlamaReplica": 1}, info=info)
    spec = ModelSpec(directory.name, str(directory))
    return Table(1, (ServedModel(spec, version.ref, None, (status,)),))


class FixedFollower:
    """A follower whose table changes only when it is set."""

    def __init__(self, table: Table) -> None:
        self.table_now = table
        self.reports: list[ApiReport] = []

    async def plan(self, report: ReplicaReport) -> ReplicaPlan:
        """See `Follower`."""
        raise NotImplementedError

    async def table(self, report: ApiReport) -> Table:
        """See `Follower`."""
        self.reports.append(report)
        while report.revision == self.table_now.revision:
            await asyncio.sleep(0.01)
        return self.table_now


@asynccontextmanager
async def local_client(
    follower: FixedFollower,
    replicas: Replicas,
    *,
    limit: QueueLimit = NO_LIMIT,
    resume_timeout_s: float = 30,
) -> AsyncIterator[RoutedClient]:
    """A client of replicas in this process."""
    tables = Tables(follower, "api")
    receiver = await Receiver.listen("127.0.0.1")
    watching = asyncio.create_task(tables.watch())
    try:
        await tables.current()
        yield RoutedClient(tables, replicas, receiver, Admission({"tiny": limit}), resume_timeout_s)
    finally:
        watching.cancel()
        receiver.close()
