from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.model.llama import Llama
from llama_ray.model.weight_files import CheckpointError
from llama_ray.pretrained import load_pretrained, save_pretrained
from tests.small_models import FOX, random_model, small_config, small_tokenizer


def add_token(directory: Path, content: str, special: bool) -> None:
    """Add a token that the embedding has no row for, as fine-tuning scripts do."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([content], special_tokens=special)
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize("special", [True, False])
def test_a_tokenizer_with_added_tokens_beyond_the_embedding_loads(tmp_path: Path, special: bool) -> None:
    tokenizer = small_tokenizer()
    save_pretrained(random_model(small_config(tokenizer.vocab_size)), tokenizer, tmp_path)
    add_token(tmp_path, "<pad>", special)
    model, loaded = load_pretrained(tmp_path)
    assert loaded is not None
    assert loaded.vocab_size == model.config.vocab_size + 1
    engine = Engine(model, loaded)
    [got] = engine.generate([FOX], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    peer = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = AutoTokenizer.from_pretrained(tmp_path)(FOX, return_tensors="pt")
    theirs = peer.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert theirs[0].tolist() == got.prompt_token_ids + got.token_ids
    if not special:
        with pytest.raises(ValueError, match="is outside the model's vocabulary"):
            engine.generate(["a <pad> b"])


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    save_pretrained(Llama(small_config(270)), tokenizer, tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer has 2[0-9]+ tokens; it must have at most 270"):
        load_pretrained(tmp_path)


def test_a_tokenizer_whose_bos_the_model_lacks_is_refused(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    save_pretrained(Llama(small_config(tokenizer.vocab_size)), tokenizer, tmp_path)
    add_token(tmp_path, "<begin>", special=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    [bos] = content["post_processor"]["special_tokens"].values()
    bos["ids"] = [tokenizer.vocab_size]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"tokenizer has {tokenizer.vocab_size + 1} tokens"):
        load_pretrained(tmp_path)
