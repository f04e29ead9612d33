"""An application that follows the registry: a real MLflow server, Ray Serve and HTTP, while aliases move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from llama_ray.generation.engine import Engine
from llama_ray.orchestration import pyfunc_model
from llama_ray.pretrained import save_pretrained
from llama_ray.tracking.registry import register
from llama_ray.tracking.runs import Run
from serve_app.args import ModelArgs, ServeArgs
from serve_app.registry.watch import SERVING_TAG
from tests.mlflow_server import MlflowServer
from tests.serve_app.application import Application, Body, Traffic, eventually, kill
from tests.serve_app.helpers import expected
from tests.small_models import random_model, small_config, small_tokenizer

NAME = "followed"
REPLICAS = f"LlamaReplica-{NAME}"
TEXTS = ("The quick", "def add(", "dog", "Zwölf", "a + b", "return")
PARAMS = [{"seed": seed, "max_tokens": 200, "ignore_eos": True} for seed in range(len(TEXTS))]
BODIES: list[Body] = [
    {"model": NAME, "prompt": text, **params} for text, params in zip(TEXTS, PARAMS, strict=True)
]
SHORT: Body = {"model": NAME, "prompt": "dog", "max_tokens": 2}
BAD = {3: "NaN", 4: "tokenizer", 5: "truncated"}


def ref(number: int) -> str:
    return f"models:/{NAME}/{number}"


class Registry:
    """A model with five versions on an MLflow server: two that are good, and those of `BAD`."""

    def __init__(self, server: MlflowServer, folder: Path) -> None:
        self.server, self.client = server, MlflowClient(server.url)
        self.directories = {number: folder / str(number) for number in (1, 2, *BAD)}
        tokenizer = small_tokenizer()
        for number, directory in self.directories.items():
            model = random_model(small_config(tokenizer.vocab_size, max_seq_len=512), seed=number)
            save_pretrained(model, tokenizer, directory)
        _fill_with_nan(self.directories[3])
        self._run = Run.create(experiment="e", name="r", params={}, tags={}, description="", uri=server.url)
        for number in self.directories:
            self._register(number)

    def move(self, alias: str, number: int) -> None:
        """Point an alias at a version."""
        self.client.set_registered_model_alias(NAME, alias, str(number))

    def _register(self, number: int) -> None:
        stored = self.server.folder / "artifacts"
        before = set(stored.rglob("tokenizer.json"))
        version = register(
            self._run,
            name=NAME,
            checkpoint=self.directories[number],
            python_model=Path(pyfunc_model.__file__),
            validation_loss=float(number),
            data_fingerprint="",
            tags={},
            description="",
        )
        assert version.version == number
        [tokenizer] = set(stored.rglob("tokenizer.json")) - before
        if number == 4:
            tokenizer.unlink()
        if number == 5:
            weights = tokenizer.with_name("model.safetensors")
            weights.write_bytes(weights.read_bytes()[:-1000])


def _fill_with_nan(directory: Path) -> None:
    file = directory / "model.safetensors"
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


class Followed(Application):
    """The application that follows `registry`."""

    def serves(self, number: int) -> bool:
        """Whether the model's name means version `number`, on both replicas."""
        metadata = self.model(NAME)
        return metadata is not None and (metadata["version"], metadata["replicas"]) == (number, 2)

    def until_serves(self, number: int) -> None:
        """Wait for it."""
        eventually(lambda: self.serves(number), f"version {number} on both replicas")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    registry = Registry(server, tmp_path_factory.mktemp("versions"))
    registry.move("champion", 1)
    yield registry
    server.stop()


@pytest.fixture(scope="module")
def offline(registry: Registry) -> dict[str, list[str]]:
    """What each good version answers to `BODIES` without a server."""
    answers = {}
    for number in (1, 2):
        engine = Engine.from_pretrained(registry.directories[number], device="cpu")
        answers[ref(number)] = [
            expected(engine, text, **params)[0].text for text, params in zip(TEXTS, PARAMS, strict=True)
        ]
    assert all(one != two for one, two in zip(*answers.values(), strict=True))
    return answers


@pytest.fixture(scope="module")
def running(serve_url: str, registry: Registry, model_dir: Path) -> Iterator[Followed]:
    followed = ModelArgs(
        model=f"models:/{NAME}@champion",
        canary="challenger",
        canary_share=0.5,
        keep_previous_s=3,
        num_cpus=0.5,
        min_replicas=2,
        max_replicas=2,
    )
    other = ModelArgs(model=str(model_dir), num_cpus=0.5, max_replicas=1)
    args = ServeArgs(
        models=[followed, other],
        tracking_uri=registry.server.url,
        registry_poll_s=0.2,
        graceful_shutdown_timeout_s=2,
    )
    application = Followed(serve_url, "following", args)
    application.start()
    yield application
    application.stop()


@pytest.fixture
def application(running: Followed, registry: Registry) -> Followed:
    """The application, which serves version 1 and has no canary."""
    registry.move("champion", 1)
    registry.client.delete_registered_model_alias(NAME, "challenger")
    running.until_serves(1)
    eventually(lambda: running.model(f"{NAME}@challenger") is None, "the end of the canary")
    return running


def versions(traffic: Traffic, offline: dict[str, list[str]]) -> set[str]:
    """Return which versions have answered, all requests after each other, each answer that of one version alone."""
    answers = [
        (stream, stream.result(), i) for i, streams in enumerate(traffic.streams) for stream in streams
    ]
    for _, answer, i in answers:
        assert answer.error is None
        assert answer.choices[0].text == offline[answer.version][i]
        assert answer.usage is not None
        assert answer.usage["completion_tokens"] == 200
    old = [stream for stream, answer, _ in answers if answer.version == ref(1)]
    new = [stream for stream, answer, _ in answers if answer.version == ref(2)]
    if new:
        assert max(stream.sent for stream in old) < min(stream.first for stream in new)
    return {answer.version for _, answer, _ in answers}


def were_under_way(traffic: Traffic) -> bool:
    """Whether answers of version 1 ended when requests that version 2 answers had been sent."""
    streams = [stream for sent in traffic.streams for stream in sent]
    old = [stream.ended for stream in streams if stream.result().version == ref(1)]
    return max(old) > min(stream.sent for stream in streams if stream.result().version == ref(2))


def test_a_moved_alias_is_followed_and_streams_under_way_end_on_the_old_version(
    application: Followed, registry: Registry, offline: dict[str, list[str]]
) -> None:
    with Traffic(application, BODIES) as traffic:
        traffic.wait_for_new_answers()
        registry.move("champion", 2)
        application.until_serves(2)
        traffic.wait_for_new_answers()
    assert versions(traffic, offline) == {ref(1), ref(2)}
    assert were_under_way(traffic)
    metadata = application.model(NAME)
    assert metadata is not None
    assert (metadata["aliases"], metadata["state"], metadata["validation_loss"]) == (
        ["champion"],
        "serving",
        2.0,
    )
    eventually(lambda: application.model(ref(1)) is None, "the end of the old version")


def test_the_previous_version_serves_again_at_once(application: Followed, registry: Registry) -> None:
    registry.move("champion", 2)
    application.until_serves(2)
    states = list[str]()

    def is_back() -> bool:
        metadata = application.model(ref(1))
        states.append(metadata["state"] if metadata and metadata["replicas"] == 2 else "gone")
        return states[-1] == "serving"

    registry.move("champion", 1)
    eventually(is_back, "version 1 again")
    assert set(states) <= {"previous", "serving"}


@pytest.mark.parametrize("number", BAD, ids=BAD.values())
def test_a_version_that_must_not_serve_leaves_the_old_one_serving_and_says_why(
    application: Followed, registry: Registry, number: int
) -> None:
    registry.move("champion", number)

    def rejected() -> bool:
        metadata = application.model(ref(number))
        return metadata is not None and metadata["state"] == "rejected"

    eventually(rejected, "the rejection")
    metadata = application.model(ref(number))
    assert metadata is not None
    tag = f"rejected: {metadata['reason']}"
    reasons = {3: "logits are not finite", 4: "tokenizer", 5: "model.safetensors"}
    assert reasons[number] in tag
    eventually(
        lambda: registry.client.get_model_version(NAME, str(number)).tags.get(SERVING_TAG) == tag, "the tag"
    )
    assert registry.client.get_model_version_by_alias(NAME, "champion").version == str(number)
    assert application.complete(SHORT).version == ref(1)
    assert application.http.get("/ready").status_code == 200


def test_a_canary_answers_whole_sessions_until_it_is_promoted_or_ended(
    application: Followed, registry: Registry
) -> None:
    def answering(session: str) -> str:
        found = {
            application.complete(SHORT, {"x-session-id": session}).version,
            application.complete(SHORT, {"x-session-id": session}).version,
            application.complete(SHORT | {"user": session}).version,
        }
        [version] = found
        return version

    registry.move("challenger", 2)
    eventually(lambda: application.model(f"{NAME}@challenger"), "the canary")
    by_session = {session: answering(session) for session in "abcdefghijkl"}
    assert set(by_session.values()) == {ref(1), ref(2)}
    for session in "abcdefgh":
        for name, version in (("champion", 1), ("challenger", 2)):
            body = SHORT | {"model": f"{NAME}@{name}"}
            assert application.complete(body, {"x-session-id": session}).version == ref(version)
        body = SHORT | {"model": ref(2)}
        assert application.complete(body, {"x-session-id": session}).version == ref(2)

    registry.client.delete_registered_model_alias(NAME, "challenger")
    eventually(lambda: application.model(f"{NAME}@challenger") is None, "the end of the canary")
    assert {answering(session) for session in by_session} == {ref(1)}

    registry.move("challenger", 2)
    eventually(lambda: application.model(f"{NAME}@challenger"), "the canary")
    registry.move("champion", 2)
    application.until_serves(2)
    assert {answering(session) for session in by_session} == {ref(2)}


def test_models_of_one_application_answer_to_their_names(application: Followed) -> None:
    assert application.complete(SHORT).version == ref(1)
    assert application.complete(SHORT | {"model": "tiny"}).version == "tiny"
    assert application.http.post("/v1/completions", json=SHORT | {"model": "other"}).status_code == 404


def test_the_end_of_the_follower_changes_nothing(
    application: Followed, registry: Registry, offline: dict[str, list[str]]
) -> None:
    with Traffic(application, BODIES) as traffic:
        old = application.pids("RegistryFollower")
        kill(old)
        eventually(lambda: application.pids("RegistryFollower") not in ([], old), "another follower")
        traffic.wait_for_new_answers()
    assert versions(traffic, offline) == {ref(1)}
    registry.move("champion", 2)
    application.until_serves(2)


def test_a_replica_that_ends_in_the_middle_of_a_change_comes_back_with_the_right_version(
    application: Followed, registry: Registry, offline: dict[str, list[str]]
) -> None:
    eventually(lambda: application.model(ref(2)) is None, "the end of the version that served before")
    with Traffic(application, BODIES) as traffic:
        traffic.wait_for_new_answers()
        registry.move("champion", 2)
        eventually(lambda: application.model(ref(2)), "a look at the registry")
        [ended, _] = application.pids(REPLICAS)
        kill([ended])
        eventually(lambda: len(set(application.pids(REPLICAS)) - {ended}) == 2, "another replica")
        application.until_serves(2)
        traffic.wait_for_new_answers()
    assert versions(traffic, offline) == {ref(1), ref(2)}


def test_while_mlflow_is_away_the_last_version_serves_also_after_a_restart(
    application: Followed, registry: Registry
) -> None:
    def notice() -> str:
        metadata = application.model(NAME)
        return (metadata and metadata["notice"]) or ""

    registry.server.stop()
    eventually(lambda: "out of reach" in notice(), "the notice")
    assert application.complete(SHORT).version == ref(1)

    application.stop()
    application.start()
    eventually(lambda: "serving version 1, the last one that served" in notice(), "the notice")
    assert application.complete(SHORT).version == ref(1)

    registry.server.start()
    eventually(lambda: not notice(), "the end of the notice")
    registry.move("champion", 2)
    application.until_serves(2)
