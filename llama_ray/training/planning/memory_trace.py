"""Where memory goes in a piece of PyTorch code: counted tensor by tensor, real tensors or fake ones."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama_ray.utils.torch_private import TorchDispatchMode, active_fake_mode, local_tensor, tree_leaves

Kind = Literal["parameters", "gradients", "optimizer", "activations", "communication"]
KINDS: tuple[Kind, ...] = ("parameters", "gradients", "optimizer", "activations", "communication")

_LASTING = ("parameters", "gradients", "optimizer")
_COLLECTIVES = ("c10d", "_c10d_functional", "fsdp")


class MemoryTrace(TorchDispatchMode):
    """Inside, every tensor that is made counts until it is freed; `peaks` has the fullest moments, in bytes by kind.

    What a tensor is for shows by and by: `watch` names parameters, gradients and optimizer state; tensors that go
    through a collective are communication buffers (gathered parameters among them); the rest are activations,
    which includes the temporary tensors of the backward pass. Memory that a kernel takes and gives back within
    itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, Kind]] = {}
        self._now: Counter[Kind] = Counter()
        self._total = 0
        self._part = ""
        self._fake_mode: Any = None
        self._resize = torch.UntypedStorage.resize_
        self._hooks: list[Any] = []
        self.peaks: dict[str, dict[Kind, int]] = {"": dict.fromkeys(KINDS, 0)}
        self._most: Counter[str] = Counter()

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Tell parameters, gradients and optimizer state of these from other tensors; also counts what exists."""
        for tensor in (*model.parameters(), *model.buffers()):
            self._count(tensor, "parameters")
        for parameter in model.parameters():
            if parameter.requires_grad:
                register: Any = parameter.register_post_accumulate_grad_hook
                self._hooks.append(register(lambda p: self._count(p.grad, "gradients")))

        def count_state(*_: Any) -> None:
            for state in optimizer.state.values():
                for value in state.values():
                    self._count(value, "optimizer")

        count_state()
        self._hooks.append(optimizer.register_step_post_hook(count_state))

    def begin(self, part: str) -> None:
        """From now on the fullest moment is looked for under this name; see `peaks`."""
        self._part = part
        self.peaks.setdefault(part, dict.fromkeys(KINDS, 0))
        self._look()

    @property
    def peak(self) -> dict[Kind, int]:
        """Bytes by kind at the fullest moment of all."""
        return max(self.peaks.values(), key=lambda peak: sum(peak.values()))

    def __enter__(self) -> Self:
        self._fake_mode = active_fake_mode()
        trace = self

        def resize_(
            storage: torch.UntypedStorage, size: int
        ) -> Any:  # FSDP frees and refills buffers this way
            result = trace._resize(storage, size)
            if (entry := trace._live.get(id(storage))) is not None:
                trace._set(storage, entry[0], entry[2])
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        super().__exit__(*args)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then count what it made."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again as operations on this rank's shards
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # DTensor works out shapes under a fake mode of its own; those tensors take no memory.
        if active_fake_mode() is self._fake_mode:
            if func.namespace in _COLLECTIVES:
                for tensor in tree_leaves((args, kwargs, result)):
                    self._count(tensor, "communication")
            else:
                for tensor in tree_leaves(result):
                    self._count(tensor, None)
        return result

    def _count(self, value: Any, kind: Kind | None) -> None:
        for storage in _storages(value):
            entry = self._live.get(id(storage))
            if entry is None:
                ref = weakref.ref(storage, partial(self._freed, id(storage)))
                self._live[id(storage)] = (ref, 0, kind or "activations")
                self._set(storage, ref, kind or "activations")
            elif (
                kind is not None
                and kind != entry[2]
                and not (kind == "communication" and entry[2] in _LASTING)
            ):
                self._set(storage, entry[0], kind)

    def _set(self, storage: torch.UntypedStorage, ref: weakref.ref[torch.UntypedStorage], kind: Kind) -> None:
        _, before, kind_before = self._live[id(storage)]
        size = storage.nbytes() if storage.device.type != "meta" or self._fake_mode else 0
        self._live[id(storage)] = (ref, size, kind)
        self._now[kind_before] -= before
        self._now[kind] += size
        self._total += size - before
        self._look()

    def _freed(self, key: int, ref: weakref.ref[torch.UntypedStorage]) -> None:
        _, size, kind = self._live.pop(key)
        self._now[kind] -= size
        self._total -= size

    def _look(self) -> None:
        if self._total > self._most[self._part]:
            self._most[self._part] = self._total
            self.peaks[self._part] = {kind: self._now[kind] for kind in KINDS}


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, DTensor):
        value = local_tensor(value)
    if isinstance(value, Tensor):
        yield value.untyped_storage()
