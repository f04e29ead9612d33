"""A contestant in its own process, so that contestants share neither threads nor memory."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peers import weights

CPU_CONTESTANTS = (
    "ours bf16",
    "ours int8",
    "ours int4",
    "llama.cpp bf16",
    "llama.cpp q8_0",
    "CTranslate2 fp32",
    "CTranslate2 int8",
    "transformers bf16",
)


class ContestantProcess:
    """A contestant in its own process; `call` runs one of its methods there.

    `name` is a system and a weight format ("ours int8"), and `options` go to the system's constructor. Raises
    RuntimeError with the process's traceback if construction or a call fails.
    """

    def __init__(self, name: str, cache: Path, preset: str, threads: int, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        args = (theirs, name, cache, preset, threads, options)
        self._process = context.Process(target=_serve_calls, args=args, daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def call(self, method: str, *args: Any) -> tuple[Any, float]:
        """Run `method(*args)` in the contestant's process; return its result and the seconds that it took there."""
        self._pipe.send((method, args))
        answer: tuple[Any, float] = self._answer()
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            ok, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name} died with exit code {self._process.exitcode}") from None
        if not ok:
            raise RuntimeError(f"{self.name}:\n{answer}")
        return answer


def _serve_calls(
    pipe: Connection, name: str, cache: Path, preset: str, threads: int, options: dict[str, Any]
) -> None:
    try:
        contestant = make(name, cache, preset, threads, options)
        pipe.send((True, None))
        while True:
            method, args = pipe.recv()
            start = time.perf_counter()
            result = getattr(contestant, method)(*args)
            pipe.send((True, (result, time.perf_counter() - start)))
    except EOFError:
        # The benchmark has closed its end of the pipe.
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))


def make(name: str, cache: Path, preset: str, threads: int, options: dict[str, Any]) -> Any:
    """Build the contestant `name` in this process, which alone imports its library."""
    system, kind = name.split()
    if system == "llama.cpp":
        from peers.llamacpp import LlamaCpp

        return LlamaCpp(weights.gguf_file(cache, preset, kind), threads=threads, **options)
    if system == "CTranslate2":
        from peers.ct2 import CTranslate2

        return CTranslate2(weights.ct2_directory(cache, preset), kind, threads=threads)
    import torch

    torch.set_num_threads(threads)
    directory = weights.hf_directory(cache, preset)
    if system == "ours":
        from peers.ours import Ours

        return Ours(directory, kind, **options)
    from peers import huggingface

    classes = {
        "transformers": huggingface.HuggingFace,
        "transformers-static": huggingface.Static,
        "transformers-continuous": huggingface.Continuous,
    }
    if system not in classes:
        raise ValueError(f"contestant {name!r} is unknown; choose from {', '.join(CPU_CONTESTANTS)}")
    return classes[system](directory, kind, **options)
