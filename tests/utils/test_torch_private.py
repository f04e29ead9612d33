"""Each private name of torch does what this project needs of it; a failure names the feature that breaks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from llama_ray.utils import torch_private


@contextmanager
def needed_for(feature: str) -> Iterator[None]:
    """Name `feature` in the failure, whatever the reason."""
    try:
        yield
    except Exception as error:
        pytest.fail(f"with torch {torch.__version__}, {feature} breaks: {error!r}")


class Operations(torch_private.TorchDispatchMode):
    """Records every operation with its arguments and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def test_a_dispatch_mode_sees_operations() -> None:
    numbers = torch.ones(2)
    with needed_for("planning (jobs/plan.py): tracing a step"):
        with Operations() as operations:
            numbers * (numbers + numbers)
        assert [func.name() for func, *_ in operations.calls] == ["aten::add.Tensor", "aten::mul.Tensor"]


def test_a_dimension_is_marked_as_dynamic() -> None:
    counter = CompileCounter()
    with needed_for("document masks on GPUs: compiled once for any number of documents"):
        double = torch.compile(lambda x: x * 2, backend=counter)
        for size in (2, 3):
            numbers = torch.ones(size)
            torch_private.mark_dynamic(numbers, 0)
            double(numbers)
        assert counter.frame_count == 1


def test_the_gradient_of_a_softmax_is_that_of_autograd() -> None:
    scores, grad = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    probabilities = scores.softmax(-1)
    [expected] = torch.autograd.grad(probabilities, scores, grad)
    with needed_for("attention within documents on a CPU"):
        torch.testing.assert_close(torch_private.softmax_backward(grad, probabilities.detach()), expected)


def test_tensors_are_found_in_nested_arguments() -> None:
    with needed_for("planning (jobs/plan.py): counting tensors inside lists"):
        assert torch_private.tree_leaves(([1, (2,)], {"a": 3})) == [1, 2, 3]


def test_fake_tensors_have_no_memory_and_take_real_inputs() -> None:
    with needed_for("planning (jobs/plan.py): models larger than this machine"):
        with torch_private.fake_tensors():
            huge = torch.empty(2**20, 2**20) * torch.ones(())
        assert huge.shape == (2**20, 2**20)
        assert huge.untyped_storage().nbytes() == 2**42


def test_the_active_fake_mode_is_known() -> None:
    with needed_for("planning (jobs/plan.py): telling a step's tensors from DTensor's shape inference"):
        assert torch_private.active_fake_mode() is None
        with torch_private.fake_tensors() as mode:
            assert torch_private.active_fake_mode() is mode


def test_a_fake_process_group_has_any_number_of_workers_and_ends() -> None:
    with needed_for("planning (jobs/plan.py): sharding over GPUs that do not exist"):
        with torch_private.fake_process_group(4096):
            assert (dist.get_rank(), dist.get_world_size()) == (0, 4096)
            dist.all_reduce(torch.ones(1))
        assert not dist.is_initialized()


# torch 2.13 renames it, 2.11 knows no other name.
@pytest.mark.filterwarnings("ignore:.*all_gather_into_tensor. is deprecated:FutureWarning")
def test_a_collective_is_known_with_its_ranks_and_bytes() -> None:
    with (
        needed_for("planning (jobs/plan.py): counting traffic"),
        torch_private.fake_process_group(8),
        Operations() as operations,
    ):
        dist.all_reduce(torch.ones(3), group=dist.new_group([0, 2]))
        dist.all_gather_into_tensor(torch.ones(8), torch.ones(1))
        found = [call for each in operations.calls if (call := torch_private.collective_call(*each))]
        assert found == [
            ("c10d::allreduce_", (0, 2), 12),
            ("c10d::_allgather_base_", tuple(range(8)), 32),
        ]


def test_the_local_tensor_is_the_shard_itself() -> None:
    with (
        needed_for("planning (jobs/plan.py): memory of sharded tensors"),
        torch_private.fake_process_group(2),
    ):
        whole = distribute_tensor(torch.ones(4), init_device_mesh("cpu", (2,)), [Shard(0)])
        with Operations() as operations:
            local = torch_private.local_tensor(whole)
        assert local.shape == (2,)
        assert torch_private.local_tensor(whole) is local
        assert not operations.calls


def test_the_offsets_of_a_shard_are_known() -> None:
    with needed_for("checkpoints of sharded models"), torch_private.fake_process_group(4):
        # This rank, 0, comes second in one dimension of the mesh and first in the other.
        mesh = DeviceMesh("cpu", [[3, 2], [1, 0]])
        shard = DTensor.from_local(torch.ones(2, 4), mesh, [Shard(0), Shard(1)], shape=(5, 8), stride=(8, 1))
        assert torch_private.shard_offsets(shard) == (3, 4)


def test_fsdp_divides_what_tensor_parallelism_has_divided_with_a_strided_shard() -> None:
    with (
        needed_for("training with FSDP and tensor parallelism: initial weights and Muon"),
        torch_private.fake_process_group(4),
    ):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor"))
        layer = nn.Linear(8, 8, bias=False)
        parallelize_module(layer, mesh["tensor"], ColwiseParallel())
        fully_shard(layer, mesh=mesh["shard"])
        placements = layer.weight.placements  # type: ignore[attr-defined]
        assert [torch_private.is_strided_shard(p) for p in placements] == [True, False]


def test_tensor_parallelism_ends_with_the_known_reduce_scatter() -> None:
    with (
        needed_for("selective activation checkpointing under tensor parallelism"),
        torch_private.fake_process_group(2),
        Operations() as operations,
    ):
        mesh = init_device_mesh("cpu", (2,))
        partial = DTensor.from_local(torch.ones(4), mesh, [torch.distributed.tensor.Partial()])
        partial.redistribute(mesh, [Shard(0)])
        assert torch_private.reduce_scatter_op() in [func for func, *_ in operations.calls]


def test_a_gloo_group_gathers_without_a_default_group(tmp_path: Path) -> None:
    with needed_for("tensor-parallel generation on a CPU"):
        store = dist.FileStore(str(tmp_path / "store"), 1)
        group = torch_private.gloo_group(store, 0, 1, timedelta(seconds=60))
        gathered = torch.zeros(3, dtype=torch.uint8)
        torch_private.all_gather_base(group, gathered, torch.arange(3, dtype=torch.uint8)).wait()
        assert gathered.tolist() == [0, 1, 2]
        group.abort()


@pytest.mark.cuda
def test_an_nccl_group_gathers_without_a_default_group(tmp_path: Path) -> None:
    with needed_for("tensor-parallel generation on GPUs"):
        store = dist.FileStore(str(tmp_path / "store"), 1)
        group = torch_private.nccl_group(store, 0, 1, timedelta(seconds=60))
        gathered = torch.zeros(3, dtype=torch.uint8, device="cuda")
        torch_private.all_gather_base(
            group, gathered, torch.arange(3, dtype=torch.uint8, device="cuda")
        ).wait()
        assert gathered.tolist() == [0, 1, 2]
        group.abort()


def test_importing_the_module_does_not_import_what_takes_seconds() -> None:
    heavy = "torch.distributed._tools", "torch.testing._internal.distributed"
    code = (
        "import sys, llama_ray.utils.torch_private\n"
        f"print([name for name in sys.modules if name.startswith({heavy})])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
