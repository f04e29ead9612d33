"""Every command and snippet in docs/export.md does what it says."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from llama_ray.pretrained import save_pretrained
from llama_ray.storage.run_directory import MARKER
from tests.data.tokenizing.foreign.helpers import BYTE_LEVEL
from tests.exporting.llama_cpp import LlamaCpp
from tests.generation.adapters.helpers import save_random_adapter
from tests.jobs.helpers import run_here
from tests.small_models import random_model, small_config

GUIDE = Path(__file__).parents[2] / "docs" / "export.md"


def lines_of(code: str) -> list[str]:
    return code.replace("\\\n", " ").strip().splitlines()


def test_the_guide_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config(BYTE_LEVEL.vocab_size)
    for step in (100, 200, 300):
        checkpoint = tmp_path / "checkpoints" / "tuned" / f"step_{step:08d}"
        save_pretrained(random_model(config, step), BYTE_LEVEL, checkpoint)
        (checkpoint / MARKER).write_text(json.dumps({"step": step, "files": {}}))
    save_random_adapter(tmp_path / "adapters" / "mine", config, 1, base=str(checkpoint))
    blocks = re.findall(r"```(bash|python)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 5
    for language, code in blocks:
        if language == "python":
            exec(compile(code, str(GUIDE), "exec"), {})
            continue
        for line in lines_of(code):
            command, *words = shlex.split(line)
            if command == "llama-server":
                text = "Straße, 12345 and\n\n  spaces"
                assert LlamaCpp(Path(words[words.index("-m") + 1])).tokenize(text) == BYTE_LEVEL.encode(text)
                continue
            script, *flags = words
            done = run_here(Path(script).name, *flags)
            assert done.returncode == 0, f"{line}: {done.stderr}"
