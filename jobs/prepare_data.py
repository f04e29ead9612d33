"""Turn text into a tokenised dataset: `python jobs/prepare_data.py --source builtin --output data/builtin`."""

from __future__ import annotations

import logging
from typing import get_args, get_type_hints

from _cli import from_flags, main, parse
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.preparing.config import PrepareConfig, named_source
from llama_ray.data.preparing.prepare import prepare
from llama_ray.data.sources.files import BUILTIN
from llama_ray.orchestration.cluster import connect
from llama_ray.storage.paths import absolute, existing

_COMMAS = ("clean", "language", "tokenizer_weights")
"""Flags whose values may be separated by commas, too."""
_SEVERAL = " Takes several values, and may be repeated."


def run() -> None:
    """Read the flags, connect to the cluster (RAY_ADDRESS, or a local one) and prepare the data."""
    config = _config()
    connect(log_to_driver=False)
    # `prepare` reports the progress itself.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    prepare(config, log=lambda line: print(line, flush=True))


def _config() -> PrepareConfig:
    flags = parse(_parser())
    for name in _COMMAS:
        if flags[name] is not None:
            flags[name] = [value for given in flags[name] for value in given.split(",") if value]
    lists = {name: tuple(flags[name] or ()) for name in _lists(CleanConfig)}
    lists["decontaminate"] = tuple(map(existing, lists["decontaminate"]))
    return from_flags(
        PrepareConfig,
        flags,
        source=[_located(given) for given in flags.source or []],
        output=absolute(flags.output),
        tokenizer=flags.tokenizer and existing(flags.tokenizer),
        compare_tokenizer=flags.compare_tokenizer and existing(flags.compare_tokenizer),
        cleaning=from_flags(CleanConfig, flags, **lists),
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="prepare_data.py",
        usage="prepare_data.py --source [NAME=]WHERE... --output DIR [--config FILE] [FLAG VALUE]...",
        description="Turn text into a tokenised dataset.",
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file of flags; flags given here override it."
    )
    described: dict[str, str] = {}
    for kind in (PrepareConfig, CleanConfig):
        documented = parse_docstring(kind.__doc__ or "").params
        described |= {param.arg_name: param.description or "" for param in documented}
        lists = _lists(kind)
        for name in lists:
            help = f"{described[name]}{_SEVERAL}"
            parser.add_argument(f"--{name}", action="extend", nargs="+", type=str, metavar="VALUE", help=help)
        parser.add_class_arguments(kind, skip={*lists, "cleaning", "vocab_size", "tokenizer"})
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--vocab_size", type=int, default=32000, help=described["vocab_size"])
    either.add_argument("--tokenizer", type=str, help=described["tokenizer"])
    return parser


def _lists(kind: type) -> list[str]:
    """Return the fields that hold several texts, whose flags take several values and may be repeated."""
    hints = get_type_hints(kind)
    return [name for name, hint in hints.items() if {list[str], tuple[str, ...]} & {hint, *get_args(hint)}]


def _located(given: str) -> str:
    """Return NAME=WHERE with the absolute path of what is there."""
    name, where = named_source(given)
    return f"{name}={where if where == BUILTIN else existing(where)}"


if __name__ == "__main__":
    main(run)
