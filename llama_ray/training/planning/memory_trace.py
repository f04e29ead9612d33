"""Count the memory that PyTorch code uses, tensor by tensor; the tensors may be real or fake."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama_ray.utils.torch_private import TorchDispatchMode, active_fake_mode, local_tensor, tree_leaves

Kind = Literal["parameters", "gradients", "optimizer", "activations", "communication"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Memory = dict[Kind, int]
"""Bytes by kind."""

_LASTING = ("parameters", "gradients", "optimizer")
_COLLECTIVES = ("c10d", "_c10d_functional", "fsdp")


@dataclass(slots=True)
class _LiveStorage:
    """A storage that counts; `ref` removes it once the storage is freed."""

    ref: weakref.ref[torch.UntypedStorage]
    size: int
    kind: Kind


class MemoryTrace(TorchDispatchMode):
    """Context in which each new tensor counts until it is freed; `peaks` has the peak of each part.

    A tensor's kind is learned after it is made: `watch` names parameters, gradients and optimizer state; tensors that
    go through a collective are communication (gathered parameters among them); all others are activations, including
    the temporary tensors of the backward pass. Memory that a kernel allocates and frees within one call is not seen.

    Only one trace can run at a time in a process; see `_observed_resizes`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peaks: dict[str, Memory] = {"": dict.fromkeys(KINDS, 0)}
        """Bytes by kind at the peak of each part that `begin` named; "" is the part before the first of them."""
        self._part = ""
        self._peak_totals: Counter[str] = Counter()
        self._live: dict[int, _LiveStorage] = {}
        self._now: Counter[Kind] = Counter()
        self._total = 0
        self._fake_mode: object | None = None
        self._on_exit = ExitStack()

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Tell parameters, gradients and optimizer state of these from other tensors; count those that exist."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._count(tensor, "parameters")
        for parameter in model.parameters():
            if parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._on_exit.callback(register(lambda p: self._count(p.grad, "gradients")).remove)

        def count_state(*_: Any) -> None:
            for state in optimizer.state.values():
                for value in state.values():
                    self._count(value, "optimizer")

        count_state()
        self._on_exit.callback(optimizer.register_step_post_hook(count_state).remove)

    def begin(self, part: str) -> None:
        """Begin the part of the code whose peak is to be `peaks[part]`."""
        self._part = part
        self.peaks.setdefault(part, dict.fromkeys(KINDS, 0))
        self._note_peak()

    @property
    def peak(self) -> Memory:
        """Bytes by kind at the peak of all parts."""
        return max(self.peaks.values(), key=lambda peak: sum(peak.values()))

    def __enter__(self) -> Self:
        self._fake_mode = active_fake_mode()
        self._on_exit.enter_context(_observed_resizes(self._resized))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        self._on_exit.close()
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count its results."""
        if any(issubclass(t, DTensor) for t in types):
            # DTensor repeats the operation on this rank's shards.
            return NotImplemented
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # DTensor infers shapes under a fake mode of its own; those tensors take no memory.
        if active_fake_mode() is self._fake_mode:
            if func.namespace in _COLLECTIVES:
                for tensor in tree_leaves((args, kwargs, result)):
                    self._count(tensor, "communication")
            else:
                for tensor in tree_leaves(result):
                    self._count(tensor, None)
        return result

    def _count(self, value: Any, kind: Kind | None) -> None:
        """Count the storage of `value` if it is a new tensor; change its kind if the new one says more."""
        for storage in _storages(value):
            live = self._live.get(id(storage))
            if live is None:
                ref = weakref.ref(storage, partial(self._freed, id(storage)))
                live = self._live[id(storage)] = _LiveStorage(ref, 0, kind or "activations")
                self._update(storage, live, live.kind)
            elif kind is not None and _replaces(kind, live.kind):
                self._update(storage, live, kind)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        live = self._live.get(id(storage))
        if live is not None:
            self._update(storage, live, live.kind)

    def _update(self, storage: torch.UntypedStorage, live: _LiveStorage, kind: Kind) -> None:
        size = storage.nbytes() if storage.device.type != "meta" or self._fake_mode else 0
        self._now[live.kind] -= live.size
        self._now[kind] += size
        self._total += size - live.size
        live.size, live.kind = size, kind
        self._note_peak()

    def _freed(self, key: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        live = self._live.pop(key)
        self._now[live.kind] -= live.size
        self._total -= live.size

    def _note_peak(self) -> None:
        if self._total > self._peak_totals[self._part]:
            self._peak_totals[self._part] = self._total
            self.peaks[self._part] = {kind: self._now[kind] for kind in KINDS}


def _replaces(kind: Kind, known: Kind) -> bool:
    """Whether a tensor of the kind `known` becomes one of `kind`; a parameter that is sent remains a parameter."""
    return kind != known and not (kind == "communication" and known in _LASTING)


@contextmanager
def _observed_resizes(observe: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Call `observe` with each storage that is resized, as FSDP does to free and refill its buffers.

    Resizing a storage is not an operation on tensors, so a dispatch mode does not see it, and torch has no hook for
    it. Therefore the method `UntypedStorage.resize_` itself is replaced, for the whole process, and restored on exit.
    """
    resize = torch.UntypedStorage.resize_

    def resize_and_observe(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        observe(storage)
        return result

    torch.UntypedStorage.resize_ = resize_and_observe  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, DTensor):
        value = local_tensor(value)
    if isinstance(value, Tensor):
        yield value.untyped_storage()
