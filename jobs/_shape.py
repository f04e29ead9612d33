"""The shape of the model that the job trains: from a preset and flags, or from the weights that it begins with."""

from __future__ import annotations

import dataclasses
from typing import Any

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, Namespace

from llama_ray.data.mixtures.opening import common_tokenizer, read_infos
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.model.config import PRESETS, LlamaConfig, RopeScaling
from llama_ray.training.initial_weights import POSITIONS, position_changes, starting_shape

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


def shape_of(flags: Namespace) -> LlamaConfig:
    """Return the shape that the flags name, or that of the weights to begin with, which flags may not contradict.

    Raises ValueError.
    """
    given = {field.name: flags[field.name] for field in dataclasses.fields(LlamaConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    if scaling := given.get("rope_scaling"):
        given["rope_scaling"] = RopeScaling(**vars(scaling))
    if flags.init_from is None:
        return LlamaConfig.preset(flags.preset or DEFAULT_PRESET, **given)
    if flags.preset is not None:
        whole = LlamaConfig.preset(flags.preset, **given)
        # The weights know their vocabulary and how positions are counted.
        own = {*given, "vocab_size", *POSITIONS}
        names = (field.name for field in dataclasses.fields(LlamaConfig))
        given |= {name: getattr(whole, name) for name in names if name not in own}
    shape = starting_shape(flags.init_from, given)
    for line in position_changes(flags.init_from, shape):
        print(line, flush=True)
    return shape


def with_vocabulary(shape: LlamaConfig, flags: Namespace, data: tuple[DataSource, ...]) -> LlamaConfig:
    """Return `shape` with the vocabulary of the data, unless the user gives one or the weights have it."""
    infos = read_infos(data)
    common_tokenizer(data, infos)
    size = infos[data[0].name].vocab_size
    if flags.init_from is not None:
        return (
            dataclasses.replace(shape, vocab_size=max(size, shape.vocab_size))
            if flags.resize_vocab
            else shape
        )
    if flags.vocab_size is not None or flags.preset is not None:
        return shape
    return dataclasses.replace(shape, vocab_size=size)
