"""Adapters come and go by name, and one that does not fit is refused in one line."""

from __future__ import annotations

import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from llama_ray.data.chat.template import ChatPrompt
from llama_ray.generation.adapters.plain import AdaptedProduct
from llama_ray.generation.backends.backend import Backend
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.llama import Llama
from llama_ray.model.stored_model import open_model
from llama_ray.model.weights_hash import weights_hash
from llama_ray.pretrained import save_pretrained
from tests.generation.adapters.helpers import save_random_adapter
from tests.small_models import save_small_model, small_config, small_tokenizer

PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
OTHER_WEIGHTS = "adapter it: it was trained on the weights [0-9a-f]{12}, and this model's are"
TEMPLATE = "{% for message in messages %}[{{ message.content }}]{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return adapter_of(base, tmp_path / "adapter")


def adapter_of(base: Path, directory: Path, **fields: object) -> Path:
    with ExitStack() as stack:
        model = open_model(base, stack)
        return save_random_adapter(
            directory,
            model.config,
            5,
            base_weights=weights_hash(model),
            **fields,  # type: ignore[arg-type]
        )


def test_an_adapter_is_added_used_and_removed(base: Path, adapter: Path) -> None:
    with Engine.from_pretrained(base, adapters={"first": adapter}) as engine:
        assert engine.adapters == ["first"]
        request = engine.submit("The fox", PARAMS, adapter="first")
        engine.remove_adapter("first")
        assert engine.adapters == []
        deltas = [delta for _ in range(10) for delta in engine.step()]
        assert sum(len(delta.token_ids) for delta in deltas if delta.request_id == request) == 6
        with pytest.raises(ValueError, match="there is no adapter first; there are: none"):
            engine.generate("The fox", PARAMS, adapter="first")


def test_a_name_is_given_once(base: Path, adapter: Path) -> None:
    with Engine.from_pretrained(base, adapters={"first": adapter}) as engine:
        with pytest.raises(ValueError, match="there is an adapter first already; remove it first"):
            engine.add_adapter("first", adapter)
        with pytest.raises(ValueError, match="adapter has 1 entries and prompts 2; give one for each"):
            engine.generate(["a", "b"], PARAMS, adapter=["first"])


def test_an_adapter_of_other_weights_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        config = open_model(base, stack).config
    save_pretrained(Llama(config, seed=7), small_tokenizer(), tmp_path / "other")
    with Engine.from_pretrained(tmp_path / "other") as engine, pytest.raises(ValueError, match=OTHER_WEIGHTS):
        engine.add_adapter("it", adapter)


def test_an_adapter_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    config = small_config(300, hidden_size=64)
    wide = save_random_adapter(tmp_path / "wide", config, 1)
    with (
        Engine.from_pretrained(base) as engine,
        pytest.raises(ValueError, match="give an adapter of this base model"),
    ):
        engine.add_adapter("it", wide)


def test_the_limit_of_ranks_is_named(base: Path, tmp_path: Path) -> None:
    adapter = adapter_of(base, tmp_path / "high", rank=9)
    with pytest.raises(
        ValueError, match="its rank is 9; it must be at most max_lora_rank, 8; raise max_lora_rank"
    ):
        Engine.from_pretrained(base, adapters={"it": adapter}, max_lora_rank=8)


def test_a_whole_model_is_no_adapter(base: Path) -> None:
    with Engine.from_pretrained(base) as engine, pytest.raises(ValueError, match=r"no adapter_config\.json"):
        engine.add_adapter("it", base)


def test_conversations_are_rendered_by_the_template_of_the_adapter(base: Path, adapter: Path) -> None:
    small_tokenizer().save(adapter)
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    with Engine.from_pretrained(base, adapters={"it": adapter}) as engine:
        chat = ChatPrompt([{"role": "user", "content": "fox"}])
        assert engine.tokenizer is not None
        assert engine.tokenizer.decode(engine.encode(chat, adapter="it")) == "[fox]"
        assert engine.encode(chat) != engine.encode(chat, adapter="it")


def test_products_add_adapters_once_when_the_first_ones_are_read_together() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            backend = Backend(Llama(small_config(60, num_layers=4)))
            together = threading.Barrier(2)
            threads = [
                threading.Thread(target=lambda b=backend, t=together: (t.wait(), b.adapter_kernels(2)))
                for _ in range(2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            adapted = [module for module in backend.model.modules() if isinstance(module, AdaptedProduct)]
            assert len(adapted) == 4 * 7
    finally:
        sys.setswitchinterval(interval)
