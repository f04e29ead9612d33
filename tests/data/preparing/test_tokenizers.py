from __future__ import annotations

import json
from pathlib import Path

from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.output_directory import WORK
from llama_ray.data.preparing.tokenizers import GivenTokenizers, make_tokenizer
from tests.data.helpers import OURS, TEXTS


def test_a_version_of_the_fast_library_that_was_not_checked_is_checked_after_a_restart(
    tmp_path: Path,
) -> None:
    (tmp_path / WORK).mkdir()
    OURS.save(tmp_path)
    config = PrepareConfig(["text"], str(tmp_path / "out"))
    kept = {"fast": True, "name": "gigatoken 0.0.1", "reason": "it gives the ids of tokenizers"}
    (tmp_path / WORK / "encoder.json").write_text(json.dumps(kept))
    tokenizer, choice = make_tokenizer(
        config, GivenTokenizers(OURS, None), TEXTS, tmp_path, lambda line: None
    )
    assert (tokenizer.fingerprint, choice.name) == (OURS.fingerprint, "tokenizers")
    again = make_tokenizer(config, GivenTokenizers(OURS, None), [], tmp_path, lambda line: None)[1]
    assert again == choice
