"""Adapters that peft has written, in one batch, against peft on transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.pretrained import save_pretrained
from tests.small_models import random_model, small_config, small_tokenizer

GREEDY = SamplingParams(max_tokens=10, temperature=0, prompt_logprobs=0, logprobs=0, ignore_eos=True)
PROMPTS = [[5, 9, 40, 7], [3, 3, 8], [60, 61], list(range(20, 60)), [5, 9, 40, 7]]
NAMES = ["attention", "stable", None, "attention", "stable"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tokenizer = small_tokenizer()
    save_pretrained(random_model(small_config(tokenizer.vocab_size)), tokenizer, directory)
    return directory


# peft asks transformers in a way that that has deprecated.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_a_mixed_batch_gives_each_request_what_peft_gives(base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    configs = {
        "attention": peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj", "o_proj"]),
        "stable": peft.LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules="all-linear"),
    }
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_pretrained(base)
    first, *others = configs
    theirs = peft.PeftModel(whole, configs[first], adapter_name=first)
    for name in others:
        theirs.add_adapter(name, configs[name])
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            # peft begins with zeros.
            weight.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path)
    theirs.eval()
    with Engine.from_pretrained(base, adapters={name: tmp_path / name for name in configs}) as engine:
        completions = engine.generate(PROMPTS, GREEDY, adapter=NAMES)
    for prompt, name, completion in zip(PROMPTS, NAMES, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        if name is None:
            with theirs.disable_adapter():
                logits = theirs(input_ids=ids).logits[0]
        else:
            theirs.set_adapter(name)
            logits = theirs(input_ids=ids).logits[0]
        assert completion.prompt_logprobs is not None
        assert completion.logprobs is not None
        found = [entry.logprob for entry in (*completion.prompt_logprobs, *completion.logprobs)]
        expected = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=1e-4)
        greedy = logits.argmax(-1)[len(prompt) - 1 : -1]
        assert completion.token_ids == greedy.tolist()
