"""The shape of the model that the job trains: from a preset and flags, or from the weights that it begins with."""

from __future__ import annotations

import dataclasses
from typing import Any

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, Namespace

from llama_ray.data.mixtures.opening import common_tokenizer, read_infos
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.model.config import PRESETS, LlamaConfig, RopeScaling
from llama_ray.model.stored_config import load_config
from llama_ray.pretrained import load_shape
from llama_ray.training.config import TrainConfig
from llama_ray.training.initial_weights import POSITIONS, position_changes, starting_shape
from llama_ray.training.starting_point import StartingPoint

DEFAULT_PRESET = "llama-30m"

_TYPES: dict[str, Any] = {
    "rope_theta": float,
    "norm_eps": float,
    "tie_embeddings": bool,
    "rope_scaling": RopeScaling,
}


def add_shape(parser: ArgumentParser) -> None:
    """Add a flag for each field of `LlamaConfig`, and `--preset`."""
    parser.add_argument(
        "--preset",
        type=str | None,
        metavar="NAME",
        help=f"Shape of the model: {', '.join(PRESETS)}. Without a preset: that of the weights of --init_from, or else "
        f"the sizes of {DEFAULT_PRESET} and the vocabulary of the data.",
    )
    group = parser.add_argument_group("The model's shape; each flag replaces one value of the preset")
    described = {
        param.arg_name: param.description for param in parse_docstring(LlamaConfig.__doc__ or "").params
    }
    for field in dataclasses.fields(LlamaConfig):
        kind = _TYPES.get(field.name, int)
        group.add_argument(f"--{field.name}", type=kind | None, help=described[field.name])


def shape_of(flags: Namespace, config: TrainConfig, start: StartingPoint | None) -> LlamaConfig:
    """Return the shape that the flags name, or that of the weights to go on with, which flags may not contradict.

    Raises ValueError.
    """
    given = {field.name: flags[field.name] for field in dataclasses.fields(LlamaConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    if scaling := given.get("rope_scaling"):
        given["rope_scaling"] = RopeScaling(**vars(scaling))
    if start is None and config.init_from is None:
        return LlamaConfig.preset(flags.preset or DEFAULT_PRESET, **given)
    if flags.preset is not None:
        whole = LlamaConfig.preset(flags.preset, **given)
        # The weights know their vocabulary and how positions are counted.
        own = {*given, "vocab_size", *POSITIONS}
        names = (field.name for field in dataclasses.fields(LlamaConfig))
        given |= {name: getattr(whole, name) for name in names if name not in own}
    if start is not None:
        return starting_shape(load_config(start.directory), given, start.name)
    ref = str(config.init_from)
    stored = load_shape(ref)
    shape = starting_shape(stored, given, ref)
    for line in position_changes(stored, shape, ref):
        print(line, flush=True)
    return shape


def with_vocabulary(
    shape: LlamaConfig, flags: Namespace, data: tuple[DataSource, ...], *, started: bool
) -> LlamaConfig:
    """Return `shape` with the vocabulary of the data, unless the user gives one or the weights have it.

    `started` says that there are weights of a run, whose vocabulary does not change.
    """
    infos = read_infos(data)
    common_tokenizer(data, infos)
    size = infos[data[0].name].vocab_size
    if started or flags.vocab_size is not None:
        return shape
    if flags.init_from is not None:
        return (
            dataclasses.replace(shape, vocab_size=max(size, shape.vocab_size))
            if flags.resize_vocab
            else shape
        )
    return shape if flags.preset is not None else dataclasses.replace(shape, vocab_size=size)
