from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.engine import Engine
from llama_ray.model.llama import Llama
from llama_ray.pretrained import save_pretrained


def test_an_embedding_is_the_mean_of_the_last_hidden_states(
    model: Llama, tokenizer: Tokenizer, engine: Engine, tmp_path: Path
) -> None:
    save_pretrained(model, tokenizer, tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for prompt in ("The quick brown fox", "a"):
        ids = torch.tensor([tokenizer.encode_prompt(prompt)])
        with torch.inference_mode():
            want = theirs.model(ids).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(torch.tensor(engine.embed(prompt)), want, atol=2e-4, rtol=2e-4)


def test_what_cannot_be_embedded_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="prompt"):
        engine.embed([])
    with pytest.raises(ValueError, match="max_seq_len"):
        engine.embed([1] * (engine.max_seq_len + 1))
