"""Take a model elsewhere: `python jobs/export_checkpoint.py REF --to DIR` or `--to FILE.gguf`."""

from __future__ import annotations

from _cli import add_fields, from_flags, main, parse, read_bytes
from jsonargparse import ArgumentParser

from llama_ray.exporting.export import ExportConfig, export
from llama_ray.storage.paths import absolute, existing_ref


def run() -> None:
    """Read the flags, write the model, and say where it is."""
    parser = ArgumentParser(
        prog="export_checkpoint.py",
        usage="export_checkpoint.py REF --to DIR|FILE.gguf [FLAG VALUE]...",
        description="Write a model as a Hugging Face directory, or as a GGUF file for llama.cpp.",
    )
    parser.add_argument("ref", help="The model: a directory, checkpoint, .gguf file, models:/... or hf://...")
    add_fields(parser, ExportConfig, skip={"ref", "to", "max_shard_bytes"})
    parser.add_argument("--to", help="A directory, or a file that ends in .gguf.")
    parser.add_argument(
        "--max_shard_bytes", default="4GiB", help="Largest file of weights in a directory, such as 4GiB."
    )
    flags = parse(parser)
    if flags.to is None:
        raise ValueError("--to is missing; give a directory, or a file that ends in .gguf")
    config = from_flags(
        ExportConfig,
        flags,
        ref=existing_ref(flags.ref),
        to=absolute(flags.to),
        max_shard_bytes=read_bytes(flags.max_shard_bytes, "max_shard_bytes"),
    )
    for note in export(config):
        print(f"note: {note}", flush=True)
    print(f"exported {config.ref} to {config.to}", flush=True)


if __name__ == "__main__":
    main(run)
