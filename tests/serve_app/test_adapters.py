"""Adapters in the application of a real Ray Serve instance, asked by the official client."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from tests.serve_app.helpers import LOUD_TEMPLATE

PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def adapted(model_dir: Path, adapter_dirs: dict[str, Path]) -> Engine:
    """The served model and its adapters in this process: the reference for what HTTP answers."""
    adapters = {name: adapter_dirs[name] for name in ("quiet", "loud")}
    return Engine.from_pretrained(model_dir, device="cpu", adapters=adapters)


def complete(client: openai.OpenAI, model: str) -> openai.types.Completion:
    extra = {"ignore_eos": True}
    return client.completions.create(
        model=model, prompt="The quick", max_tokens=12, temperature=0, extra_body=extra
    )


def test_requests_for_a_model_and_its_adapters_run_side_by_side(
    client: openai.OpenAI, adapted: Engine
) -> None:
    names = [None, "quiet", "loud", "quiet", None, "loud"]
    models = ["tiny" if name is None else f"tiny:{name}" for name in names]
    expected = adapted.generate(["The quick"] * 6, PARAMS, adapter=names)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda model: complete(client, model), models))
    assert [answer.choices[0].text for answer in found] == [completion.text for completion in expected]
    assert [answer.model for answer in found] == models
    assert len({completion.text for completion in expected}) == 3


def test_a_conversation_is_rendered_by_the_template_of_its_adapter(
    client: openai.OpenAI, adapted: Engine
) -> None:
    [expected] = adapted.generate(["FOX!"], PARAMS, adapter="loud")
    answer = client.chat.completions.create(
        model="tiny:loud",
        messages=[{"role": "user", "content": "fox"}],
        max_tokens=12,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].message.content == expected.text


def test_questions_are_answered_with_the_adapter(served: str, adapted: Engine) -> None:
    def ask(path: str, **body: object) -> dict[str, object]:
        response = httpx.post(f"{served}{path}", json=body, timeout=60).raise_for_status().json()
        assert isinstance(response, dict)
        return response

    for name in ("quiet", "loud"):
        found = ask("/v1/embeddings", model=f"tiny:{name}", input="The quick")["data"][0]["embedding"]  # type: ignore[index]
        assert found == pytest.approx(adapted.embed("The quick", adapter=name), abs=1e-5)
        score = ask("/v1/score", model=f"tiny:{name}", input="The quick")["data"][0]  # type: ignore[index]
        scoring = SamplingParams(max_tokens=0, temperature=0, prompt_logprobs=0)
        [reported] = adapted.generate(["The quick"], scoring, adapter=name)
        assert reported.prompt_logprobs is not None
        expected = [entry.logprob for entry in reported.prompt_logprobs]
        assert [p for p in score["token_logprobs"] if p is not None] == pytest.approx(
            expected[-len(score["token_logprobs"]) :], abs=1e-5
        )
    info = httpx.get(f"{served}/tokenizer_info", params={"model": "tiny:loud"}, timeout=60).json()
    assert info["chat_template"] == LOUD_TEMPLATE


def test_adapters_are_listed_beside_the_model(client: openai.OpenAI, adapter_dirs: dict[str, Path]) -> None:
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert [name for name in cards if name.startswith("tiny:")] == ["tiny:quiet", "tiny:loud", "tiny:other"]
    assert cards["tiny:quiet"]["root"] == str(adapter_dirs["quiet"])
    assert cards["tiny:quiet"]["parent"] == "tiny"


def test_an_unknown_adapter_and_one_of_another_model_are_errors_that_say_so(client: openai.OpenAI) -> None:
    with pytest.raises(
        openai.NotFoundError, match=r"tiny has no adapter 'nobody' here; ask for 'tiny:quiet', "
    ):
        complete(client, "tiny:nobody")
    for _ in range(2):
        with pytest.raises(
            openai.NotFoundError, match="it was trained on the weights 0123456789ab, and this model's"
        ):
            complete(client, "tiny:other")
