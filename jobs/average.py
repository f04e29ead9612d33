"""Average models: `python jobs/average.py REF REF [...] --to DIR`, or `--run DIR --last 5 --register_as NAME`."""

from __future__ import annotations

from pathlib import Path

from _cli import add_fields, from_flags, main, parse
from jsonargparse import ArgumentParser, Namespace

from llama_ray.exporting.averages import AverageConfig, write_average
from llama_ray.storage.paths import absolute, existing, existing_ref, is_uri
from llama_ray.utils.fields import shown


def run() -> None:
    """Read the flags, average, and say where the average is."""
    flags = parse(_parser(), lists=["weights"])
    config = from_flags(
        AverageConfig,
        flags,
        refs=tuple(map(existing_ref, flags.refs)),
        run=None if flags.run is None else existing(flags.run),
        weights=None if flags.weights is None else tuple(flags.weights),
    )
    to = _destination(flags)
    if to is not None:
        write_average(config, to, log)
        log(f"averaged to {to}")
        return
    # It takes seconds to import, and is not needed for a directory.
    from llama_ray.orchestration.averages import register_average

    version = register_average(config, flags.register_as, flags.experiment, log)
    log(f"registered {version.uri}")


def log(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def _destination(flags: Namespace) -> Path | None:
    """Return the directory for the average; None where it is registered."""
    if (flags.to is None) == (flags.register_as is None):
        raise ValueError("it must be said where the average goes; give either --to DIR or --register_as NAME")
    if flags.to is None:
        return None
    to = Path(absolute(flags.to))
    if is_uri(flags.to) or to.is_file() or to.suffix == ".gguf":
        raise ValueError(
            f"--to is {shown(flags.to)}; it must be a directory on this machine; for another place or format export "
            "the average"
        )
    return to


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="average.py",
        usage="average.py REF REF [...]|--run DIR --to DIR|--register_as NAME [FLAG VALUE]...",
        description="Average the weights of models of one shape.",
    )
    parser.add_argument("refs", nargs="*", metavar="REF", help="The models, two or more.")
    add_fields(parser, AverageConfig, skip={"refs"})
    parser.add_argument("--to", help="Directory for the average, in the Hugging Face layout.")
    parser.add_argument("--register_as", metavar="NAME", help="Name to register the average under.")
    parser.add_argument(
        "--experiment", default="llama-ray", help="MLflow experiment of the registered average."
    )
    return parser


if __name__ == "__main__":
    main(run)
