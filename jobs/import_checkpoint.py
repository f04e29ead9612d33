"""Register a model that exists elsewhere: `python jobs/import_checkpoint.py hf://ORG/NAME --register_as NAME`."""

from __future__ import annotations

from _cli import from_flags, main, parse
from jsonargparse import ArgumentParser

from llama_ray.orchestration.importing import ImportConfig, import_checkpoint
from llama_ray.storage.paths import existing_ref


def run() -> None:
    """Read the flags, copy the model into the registry of MLFLOW_TRACKING_URI, and report the version."""
    flags = parse(_parser())
    config = from_flags(ImportConfig, flags)
    version, decision = import_checkpoint(
        existing_ref(flags.ref), config, lambda line: print(line, flush=True)
    )
    print(f"registered {version.uri}{f'; {decision.reason}' if decision else ''}", flush=True)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="import_checkpoint.py",
        usage="import_checkpoint.py REF --register_as NAME [FLAG VALUE]...",
        description="Register a model that exists elsewhere, with its tokenizer and chat template.",
    )
    parser.add_argument(
        "ref",
        type=str,
        metavar="REF",
        help="A directory in the Hugging Face layout, hf://ORG/NAME, a .gguf file, a training checkpoint, or one of "
        "these in an object store.",
    )
    parser.add_class_arguments(ImportConfig)
    return parser


if __name__ == "__main__":
    main(run)
