"""Contestants in processes of their own, so that neither threads nor memory are shared; they answer one at a time."""

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


class Turn:
    """A contestant in its own process: `call` runs one of its methods there.

    `name` is who and in which format ("ours int8"); `options` go to its constructor. Raises RuntimeError, with what
    the process said, where it cannot be made or a call fails.
    """

    def __init__(self, name: str, cache: Path, preset: str, threads: int, options: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        args = (theirs, name, cache, preset, threads, options)
        self._process = context.Process(target=_live, args=args, daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def call(self, method: str, *args: Any) -> tuple[Any, float]:
        """Run `method(*args)` in the contestant's process -> (what it returned, the seconds that it took there)."""
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


def _live(
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
    except EOFError:  # the benchmark has closed its end
        pass
    except Exception:
        pipe.send((False, traceback.format_exc()))


def make(name: str, cache: Path, preset: str, threads: int, options: dict[str, Any]) -> Any:
    """The contestant called `name`, in this process. Its library is imported here: no other process needs it."""
    who, kind = name.split()
    if who == "llama.cpp":
        from peers.llamacpp import LlamaCpp

        return LlamaCpp(weights.gguf_file(cache, preset, kind), threads=threads, **options)
    if who == "CTranslate2":
        from peers.ct2 import CTranslate2

        return CTranslate2(weights.ct2_directory(cache, preset), kind, threads=threads)
    import torch

    torch.set_num_threads(threads)
    directory = weights.hf_directory(cache, preset)
    if who == "ours":
        from peers.ours import Ours

        return Ours(directory, kind, **options)
    from peers import huggingface

    made = {
        "transformers": huggingface.HuggingFace,
        "transformers-static": huggingface.Static,
        "transformers-continuous": huggingface.Continuous,
    }
    if who not in made:
        raise ValueError(f"contestant {name!r} is unknown; choose from {', '.join(CPU_CONTESTANTS)}")
    return made[who](directory, kind, **options)
