from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ray.data.tokenizing.errors import TokenizerError
from llama_ray.data.tokenizing.fast import FastBackend
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.data.tokenizing.training import EOS, TrainingOptions
from tests.data.helpers import TEXTS

NUMBERS = ["costs 1234567 and getHTTPResponseCode 1234567"] * 20


def tokens(options: TrainingOptions, text: str) -> list[str]:
    tokenizer = Tokenizer.train(iter(NUMBERS), 400, options)
    return [tokenizer.decode([id]) for id in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (TrainingOptions(), [" ", "123", "456", "7"]),
        (TrainingOptions(split_digits=1), [" ", "1", "2", "3", "4", "5", "6", "7"]),
        (TrainingOptions(split="gpt2"), [" 1234567"]),
        (TrainingOptions(split="gpt2", split_digits=3), [" 123", "456", "7"]),
        (TrainingOptions(split="o200k", split_digits=1), [" ", "1", "2", "3", "4", "5", "6", "7"]),
        (TrainingOptions(split="o200k"), [" ", "123", "456", "7"]),
    ],
)
def test_digits_are_split_as_asked_for(options: TrainingOptions, expected: list[str]) -> None:
    assert tokens(options, " 1234567") == expected


def test_names_in_code_are_split_at_capitals() -> None:
    assert tokens(TrainingOptions(), " getHTTPResponseCode") == [" getHTTPResponseCode"]
    assert tokens(TrainingOptions(split="o200k"), " getHTTPResponseCode") == [" get", "HTTPResponse", "Code"]


def test_rare_neighbours_stay_apart() -> None:
    assert Tokenizer.train(iter(NUMBERS), 400, TrainingOptions(min_frequency=100)).vocab_size == 258
    assert Tokenizer.train(iter(NUMBERS), 400, TrainingOptions(min_frequency=20)).vocab_size > 258


def test_special_tokens_come_after_bos_and_eos_and_are_no_text() -> None:
    options = TrainingOptions(special_tokens=("<|im_start|>", "<|im_end|>"))
    tokenizer = Tokenizer.train(iter(TEXTS), 300, options)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode_prompt("<|im_start|>a<|im_end|>", parse_special=True)[1::2] == [2, 3]
    assert not {2, 3} & set(tokenizer.encode("<|im_start|>a<|im_end|>"))
    assert tokenizer.end_of_turn_ids() == {3}


@pytest.mark.parametrize("split", ["llama3", "gpt2", "o200k"])
def test_each_split_is_one_that_gigatoken_has(split: str) -> None:
    tokenizer = Tokenizer.train(iter(TEXTS), 300, TrainingOptions(split=split))
    backend = FastBackend(tokenizer.to_json())
    for text in TEXTS:
        ids = backend.encode(text)
        assert ids is not None
        assert ids.tolist() == tokenizer.encode(text)


def test_neither_threads_nor_hash_seeds_change_a_byte(tmp_path: Path) -> None:
    script = (
        "import sys, os\n"
        "from pathlib import Path\n"
        "from llama_ray.data.tokenizing.tokenizer import Tokenizer\n"
        "texts = [path.read_text() for path in sorted(Path(os.__file__).parent.glob('json/*.py'))]\n"
        "Tokenizer.train(iter(texts), 900).save(sys.argv[1])\n"
    )
    for name, parallel, seed in (("one", "false", "1"), ("many", "true", "2")):
        settings = {"TOKENIZERS_PARALLELISM": parallel, "RAYON_NUM_THREADS": "8", "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script, str(tmp_path / name)]
        subprocess.run(command, env=os.environ | settings, check=True)
    one, many = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "many"))
    assert one == many


@pytest.mark.parametrize(
    ("options", "vocab_size", "message"),
    [
        ({"special_tokens": ("<x>",)}, 258, "vocab_size is 258; it must be at least 259"),
        ({}, 2**24 + 1, "it must be at most 16777216"),
        ({"special_tokens": ("<x>", "<x>")}, 400, "special_tokens has '<x>'; each must be a text of its own"),
        ({"special_tokens": (EOS,)}, 400, "special_tokens has '<|end_of_text|>'"),
        ({"special_tokens": (" ",)}, 400, "special_tokens has ' '"),
        ({"split": "words"}, 400, "split is 'words'; choose llama3, gpt2 or o200k"),
        ({"split_digits": 2}, 400, "split_digits is 2; choose 1 or 3"),
        ({"min_frequency": 0}, 400, "min_frequency is 0; it must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], vocab_size: int, message: str) -> None:
    with pytest.raises((TokenizerError, ValueError)) as error:
        Tokenizer.train(iter(TEXTS), vocab_size, TrainingOptions(**options))
    assert message in str(error.value)
