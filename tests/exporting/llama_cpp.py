"""The real llama.cpp: its server, in this process, on a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import xllamacpp


class LlamaCpp:
    """llama.cpp with the model of a GGUF file, on one thread."""

    def __init__(self, file: Path) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx, parameters.n_parallel = 256, 1
        parameters.warmup, parameters.verbosity = False, -1
        parameters.cpuparams.n_threads = 1
        self._server = xllamacpp.Server(parameters)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of a text; `add_special` is for a prompt."""
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return list(self._post("tokenize", body)["tokens"])

    def greedy(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """Return the most probable tokens after a prompt; without the one that ends the text."""
        body = {"prompt": list(prompt), "n_predict": max_tokens, "temperature": 0, "return_tokens": True}
        return list(self._post("completion", body | {"cache_prompt": False})["tokens"])

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as the model's chat template writes it."""
        return str(self._post("apply-template", {"messages": messages})["prompt"])

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = Request(f"{self._server.listening_address}/{path}", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)
