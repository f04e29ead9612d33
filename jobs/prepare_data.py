"""Turn text or conversations into a dataset: `python jobs/prepare_data.py --source builtin --output data/builtin`."""

from __future__ import annotations

import logging

from _cli import add_config, add_fields, descriptions, from_flags, list_fields, main, parse, split_commas
from _sources import located, tokenizer_path
from jsonargparse import ArgumentParser

from llama_ray.data.cleaning.config import CleanConfig
from llama_ray.data.conversations.config import ConversationConfig
from llama_ray.data.preparing.config import PrepareConfig
from llama_ray.data.preparing.prepare import prepare
from llama_ray.data.tokenizing.training import TrainingOptions
from llama_ray.orchestration.cluster import connect
from llama_ray.storage.paths import absolute, existing

_COMMAS = ("clean", "language", "tokenizer_weights", "special_tokens")
"""Flags whose values may be separated by commas, too."""
_PARTS = {"cleaning": CleanConfig, "training": TrainingOptions, "conversations": ConversationConfig}
"""Fields of the configuration that are configurations, whose fields are flags, too."""


def run() -> None:
    """Read the flags and prepare the data on the cluster of RAY_ADDRESS, or a local one."""
    config = _config()
    # `prepare` reports the progress itself.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    prepare(config, log=lambda line: print(line, flush=True), connect=lambda: connect(log_to_driver=False))


def _config() -> PrepareConfig:
    flags = parse(_parser())
    split_commas(flags, _COMMAS)
    given = {name: tuple(flags[name] or ()) for kind in _PARTS.values() for name in list_fields(kind)}
    given["decontaminate"] = tuple(map(existing, given["decontaminate"]))
    flags.chat_template = flags.chat_template and existing(flags.chat_template)
    parts = {
        name: from_flags(kind, flags, **{field: given[field] for field in list_fields(kind)})
        for name, kind in _PARTS.items()
    }
    return from_flags(
        PrepareConfig,
        flags,
        source=[located(source) for source in flags.source or []],
        output=absolute(flags.output),
        tokenizer=flags.tokenizer and tokenizer_path(flags.tokenizer),
        compare_tokenizer=flags.compare_tokenizer and tokenizer_path(flags.compare_tokenizer),
        **parts,
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="prepare_data.py",
        usage="prepare_data.py --source [NAME=]WHERE... --output DIR [--config FILE] [FLAG VALUE]...",
        description="Turn text, or conversations with --task sft, into a tokenised dataset.",
    )
    add_config(parser)
    add_fields(parser, PrepareConfig, skip={*_PARTS, "vocab_size", "tokenizer"})
    for kind in _PARTS.values():
        add_fields(parser, kind)
    described = descriptions(PrepareConfig)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--vocab_size", type=int, default=32000, help=described["vocab_size"])
    either.add_argument("--tokenizer", type=str, help=described["tokenizer"])
    return parser


if __name__ == "__main__":
    main(run)
