"""Will a run fit, and how long will it take: `python jobs/plan.py --preset llama-65b --gpus 64 --gpu_memory 80GiB`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from _cli import SHAPE_FLAGS, add_fields, main, parse, read_bytes, split_commas
from _data import SOURCES, sources_of, stages_of
from jsonargparse import ArgumentParser

from llama_ray.data.mixtures.weights import WHOLE
from llama_ray.model.config import PRESETS, LlamaConfig
from llama_ray.training.config import TrainConfig
from llama_ray.training.parallel.layout import GIB
from llama_ray.training.planning.plan import (
    ASSUMED_MFU,
    FRAGMENTATION,
    RUNTIME_BYTES,
    Cluster,
    Plan,
    make_plan,
)
from llama_ray.training.planning.search import nearest_that_fits
from llama_ray.training.planning.stages import StagePlan, plan_stages
from llama_ray.training.planning.step_trace import TRACED_DEPTHS
from llama_ray.utils.fields import Limits

CHANGEABLE_FLAGS = (
    "parallelism",
    "fsdp_size",
    "tensor_parallel",
    "activation_checkpointing",
    "batch_size",
    "gradient_accumulation_steps",
)
TRAINING_FLAGS = (
    *CHANGEABLE_FLAGS,
    "seq_len",
    "precision",
    "optimizer",
    "stages",
    "max_steps",
    "epochs",
    "max_repetitions",
    "lora_rank",
    "lora_targets",
)
CLUSTER_FLAGS = ("gpus", "gpus_per_node", "gpu_flops", "node_bandwidth", "network_bandwidth")


def run() -> None:
    """Read the flags, trace a step of the run on fake tensors, and print the plan."""
    flags = parse(_parser(), lists=["data"])
    shape = {name: flags[name] for name in SHAPE_FLAGS if flags[name] is not None}
    model = LlamaConfig.preset(flags.preset, **shape)
    settings = {name: flags[name] for name in TRAINING_FLAGS}
    split_commas(flags, ["lora_targets"])
    parsed = {"stages": stages_of(flags.stages), "lora_targets": tuple(flags.lora_targets or ())}
    # Only the shape of the weights that adapters are for matters here, and the preset has that.
    base = {"init_from": flags.preset} if flags.lora_rank else {}
    config = TrainConfig(**settings | parsed | base)
    sources = sources_of(flags.data) if flags.data else ()
    Limits(above=0).check("tokens", flags.tokens, float)
    cluster = Cluster(
        gpu_memory_bytes=read_bytes(flags.gpu_memory, "gpu_memory"),
        **{name: flags[name] for name in CLUSTER_FLAGS},
    )
    plan = make_plan(model, config, cluster, mfu=flags.mfu)
    adapters = f" and {config.lora.num_parameters(model):,} of adapters" if config.lora else ""
    print(
        f"{flags.preset}, {model.num_parameters():,} parameters{adapters}, on {cluster.gpus} GPUs: "
        f"{plan.layout.reason}"
    )
    _print_plan(plan, flags.tokens)
    if sources or config.stages or config.max_steps:
        _print_stages(plan_stages(plan, sources))
    if plan.fits:
        return
    other = nearest_that_fits(plan)
    if other is None:
        print("\nNo configuration near it fits; take GPUs with more memory.")
        return
    print(f"\nThe nearest configuration that fits: {', '.join(changed_flags(plan, other))}")
    _print_plan(other, flags.tokens)


def changed_flags(plan: Plan, other: Plan) -> list[str]:
    """Return the flags that lead from one plan to the other."""
    changed = [
        f"--{name} {getattr(other.config, name)}"
        for name in CHANGEABLE_FLAGS
        if getattr(other.config, name) != getattr(plan.config, name)
    ]
    more = [f"--gpus {other.cluster.gpus}"] if other.cluster.gpus != plan.cluster.gpus else []
    return changed + more


def _print_plan(plan: Plan, tokens: float) -> None:
    _print_memory(plan)
    print(
        f"A step of {plan.tokens_per_step:,} tokens takes {plan.step_s:.2f} s; "
        f"{tokens:.3g} tokens take {plan.days(tokens):,.1f} days."
    )
    _print_time(plan)


def _print_stages(stages: Sequence[StagePlan]) -> None:
    for stage in stages:
        segment, each = stage.segment, stage.plan
        shares = ", ".join(f"{name} {share / WHOLE:.4g}" for name, share in sorted(segment.shares.items()))
        length = "" if stage.days is None else f"; {stage.steps:,} steps take {_duration(stage.days)}"
        print(
            f"From step {segment.from_step:,}: {each.tokens_per_step // segment.seq_len:,} sequences of "
            f"{segment.seq_len:,} tokens{f' ({shares})' if shares else ''}, {each.step_s:.2f} s a step{length}."
        )
    if all(stage.steps for stage in stages):
        steps, tokens = sum(stage.steps or 0 for stage in stages), sum(stage.tokens or 0 for stage in stages)
        days = sum(stage.days or 0 for stage in stages)
        print(f"The run: {steps:,} steps, {tokens:.3g} tokens, {_duration(days)}.")


def _duration(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:.1f} hours"


def _print_memory(plan: Plan) -> None:
    verdict = "fits" if plan.fits else "does not fit"
    limit = plan.cluster.gpu_memory_bytes / GIB
    print(f"It {verdict}: {plan.needed_bytes / GIB:.1f} of {limit:.1f} GiB a GPU at the peak of a step.")
    for kind, size in plan.memory.items():
        print(f"  {kind:15}{size / GIB:8.2f} GiB")
    assumed = (plan.needed_bytes - sum(plan.memory.values())) / GIB
    parts = f"{FRAGMENTATION:.0%} fragmentation, {RUNTIME_BYTES / GIB:.1f} GiB runtime"
    print(f"  {'assumed':15}{assumed:8.2f} GiB ({parts})")
    shallow, deep = TRACED_DEPTHS
    if plan.model.num_layers > deep:
        print(f"  (traced with {shallow} and {deep} layers, extrapolated to {plan.model.num_layers})")


def _print_time(plan: Plan) -> None:
    cluster = plan.cluster
    rate = f"{plan.mfu:.0%} of {cluster.gpu_flops / 1e12:,.0f} TFLOP/s a GPU"
    print(f"  {'computing':15}{plan.compute_s:8.2f} s (assumed: {rate})")
    if cluster.gpus > 1:
        print(f"  {'overlapped':15}{plan.overlapped_s:8.2f} s of communication: parameters and gradients")
        print(f"  {'waiting':15}{plan.waited_s:8.2f} s for tensor-parallel peers and in the update")
        bandwidths = f"{cluster.node_bandwidth / 1e9:,.0f} and {cluster.network_bandwidth / 1e9:,.0f} GB/s"
        print(f"  (assumed: {cluster.reached:.0%} of {bandwidths} a GPU within and between nodes)")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="plan.py", description="Says whether a training run fits, and how long it takes."
    )
    add = parser.add_argument
    add("--preset", required=True, help=f"The model's shape: one of {', '.join(PRESETS)}.")
    for name in SHAPE_FLAGS:
        add(f"--{name}", type=int | None, help=f"Replaces the {name} of the preset.")
    add("--gpus", type=int, required=True, help="Number of GPUs; each runs one worker.")
    add("--gpu_memory", type=str, required=True, help="Memory of one GPU, such as 80GiB.")
    add(
        "--gpus_per_node",
        type=int,
        default=Cluster.gpus_per_node,
        help="GPUs of one machine; tensor parallelism stays within it.",
    )
    add(
        "--gpu_flops",
        type=float,
        default=Cluster.gpu_flops,
        help="Dense FLOP/s of one GPU; the default is an H100's in bf16.",
    )
    add("--mfu", type=float, default=ASSUMED_MFU, help="Share of --gpu_flops that computing is to reach.")
    add(
        "--node_bandwidth",
        type=float,
        default=Cluster.node_bandwidth,
        help="Bytes/s of one GPU to others of its node, each way; the default is NVLink 4.",
    )
    add(
        "--network_bandwidth",
        type=float,
        default=Cluster.network_bandwidth,
        help="Bytes/s of one GPU's network adapter, each way; the default is 400 Gb/s.",
    )
    add(
        "--data",
        type=SOURCES,
        metavar="DIR",
        help="Data to count epochs and repetitions in, as for train.py.",
    )
    add("--tokens", type=float, default=1e12, help="Number of tokens to train on.")
    add_fields(
        parser, TrainConfig, skip={f.name for f in dataclasses.fields(TrainConfig)} - {*TRAINING_FLAGS}
    )
    parser.set_defaults(batch_size=1)
    return parser


if __name__ == "__main__":
    main(run)
