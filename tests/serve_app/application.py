"""An application in the Serve instance of the tests: asked over HTTP, while its processes end or hang."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from serve_app.args import ServeArgs

PATIENCE_S = 60.0
"""How long a test waits for what should come within a second or two, beside busy neighbours."""
Body = dict[str, Any]


class Application:
    """The application `args`, called `name`, below the path `/NAME` of the Serve instance at `serve_url`."""

    def __init__(self, serve_url: str, name: str, args: ServeArgs) -> None:
        self.name, self.url = name, f"{serve_url}/{name}"
        self._args = args
        self.http = httpx.Client(
            base_url=self.url, timeout=PATIENCE_S, limits=httpx.Limits(max_connections=None)
        )

    def start(self) -> None:
        """Run the application; return when its replicas are ready."""
        from ray import serve

        from serve_app.app import build

        serve.run(build(self._args), name=self.name, route_prefix=f"/{self.name}")

    def stop(self) -> None:
        """End the application."""
        from ray import serve

        serve.delete(self.name)

    def complete(self, body: Body, headers: Mapping[str, str] | None = None) -> Answer:
        """Return the whole answer to a request."""
        return Answer.whole(self.http.post("/v1/completions", json=body, headers=headers))

    def stream(self, body: Body) -> Streaming:
        """Begin a streamed request."""
        return Streaming(self.http, body)

    def model(self, ref: str) -> Body | None:
        """Return the metadata of a model in `GET /v1/models`; None if it is not listed."""
        cards = self.http.get("/v1/models").raise_for_status().json()["data"]
        return next((card["metadata"] for card in cards if card["id"] == ref), None)

    def pids(self, deployment: str) -> list[int]:
        """Return the processes of the deployment's replicas that run, the oldest first."""
        from ray.serve.context import _get_global_client

        details = _get_global_client().get_serve_details()["applications"][self.name]["deployments"][
            deployment
        ]
        running = [replica for replica in details["replicas"] if replica["state"] == "RUNNING"]
        # Serve knows of the end of a process a moment later.
        running = [replica for replica in running if psutil.pid_exists(replica["pid"])]
        return [replica["pid"] for replica in sorted(running, key=lambda replica: replica["start_time_s"])]

    def call(self, deployment: str, method: str, timeout_s: float) -> None:
        """Wait until a replica has answered a call. Raises TimeoutError."""
        from ray import serve

        getattr(serve.get_deployment_handle(deployment, self.name), method).remote().result(
            timeout_s=timeout_s
        )


def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition()` holds. Raises AssertionError after `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {PATIENCE_S} s"
        time.sleep(0.02)


def kill(pids: Sequence[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to processes."""
    for pid in pids:
        os.kill(pid, number)


@dataclass
class Choice:
    """A choice as a client has it: its text, and what came of log-probabilities."""

    text: str = ""
    finish_reason: str | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, choice: Body) -> None:
        """Add what came in a response or a chunk."""
        assert self.finish_reason is None, "something came after the last part of a choice"
        self.text += choice["text"]
        self.finish_reason = choice["finish_reason"]
        if choice["logprobs"] is not None:
            self.tokens += choice["logprobs"]["tokens"]
            self.logprobs += choice["logprobs"]["token_logprobs"]
            self.offsets += choice["logprobs"]["text_offset"]


@dataclass
class Answer:
    """An answer as a client has it; `version` is what the header names, `error` the message of an error event."""

    version: str
    choices: dict[int, Choice] = field(default_factory=dict)
    usage: Body | None = None
    error: str | None = None

    @classmethod
    def whole(cls, response: httpx.Response) -> Answer:
        """Return what a response says that is no stream."""
        assert response.status_code == 200, response.text
        answer = cls(response.headers["x-model-version"])
        answer.add(response.json())
        return answer

    def add(self, part: Body) -> None:
        """Add a response or a chunk."""
        if "error" in part:
            self.error = part["error"]["message"]
            return
        assert part["system_fingerprint"] == self.version
        for choice in part["choices"]:
            self.choices.setdefault(choice["index"], Choice()).add(choice)
        self.usage = part.get("usage") or self.usage


class Streaming:
    """A streamed request, which a thread reads. Moments are seconds of `time.monotonic`."""

    def __init__(self, http: httpx.Client, body: Body) -> None:
        self.sent = time.monotonic()
        self.first = self.ended = math.inf
        """When its first chunk and its end came."""
        pool = ThreadPoolExecutor(1)
        self._answer = pool.submit(self._read, http, body)
        pool.shutdown(wait=False)

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self._answer.done()

    def wait_for_text(self) -> None:
        """Wait for the first chunk."""
        eventually(lambda: self.first < math.inf or self.done, "the first chunk of a stream")

    def result(self) -> Answer:
        """Return the answer when it has ended."""
        return self._answer.result(2 * PATIENCE_S)

    def _read(self, http: httpx.Client, body: Body) -> Answer:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read().decode()
            answer = Answer(response.headers["x-model-version"])
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    self.ended = time.monotonic()
                    return answer
                if line:
                    answer.add(json.loads(line.removeprefix("data: ")))
                    self.first = min(self.first, time.monotonic())
        raise AssertionError("a stream ended without [DONE]")


class Traffic:
    """Clients that each send one of `bodies` again and again, as streams, while the `with` block runs."""

    def __init__(self, application: Application, bodies: Sequence[Body]) -> None:
        self._application, self._bodies = application, bodies
        self.streams: list[list[Streaming]] = [[] for _ in bodies]
        """What each client has sent."""
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(len(bodies))

    def __enter__(self) -> Traffic:
        clients = [self._pool.submit(self._ask, number) for number in range(len(self._bodies))]
        self._pool.shutdown(wait=False)
        self._clients = clients
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        for client in self._clients:
            client.result()

    def wait_for_new_answers(self) -> None:
        """Wait until each client has the whole answer to a request that it has yet to send."""
        sent = [len(streams) for streams in self.streams]
        eventually(
            lambda: all(len(s) > n + 1 for n, s in zip(sent, self.streams, strict=True)),
            "an answer to each client",
        )

    def _ask(self, number: int) -> None:
        while not self._stopped.is_set():
            stream = self._application.stream(self._bodies[number])
            self.streams[number].append(stream)
            stream.result()
