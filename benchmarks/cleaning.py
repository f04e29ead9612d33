"""Rates of the rules of cleaning on one core, beside datatrove's, and how often both say the same.

    python benchmarks/cleaning.py --peer /tmp/datatrove/bin/python

The texts are what people wrote in the installed packages: docstrings, Markdown and descriptions. datatrove wants an
environment of its own: `pip install datatrove==0.10.0 spacy nltk regex tokenizers "xxhash<4"`.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_ray.data.cleaning.duplicates.signatures import exact_key, sign
from llama_ray.data.cleaning.filters.named import FILTERS
from llama_ray.data.cleaning.filters.reading import Reading
from llama_ray.data.cleaning.language import identify

PEER = Path(__file__).parent / "peers" / "datatrove_cleaning.py"


def main() -> None:
    """Print a row for each rule."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", help="Python of an environment with datatrove 0.10.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=2)
    options = parser.parse_args()
    texts = choose(options.megabytes * 1e6)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} texts, {size / 1e6:.1f} MB, the mean one {size / len(texts) / 1e3:.1f} kB")
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    verdicts: dict[str, list[str]] = {}
    for _ in range(options.rounds):
        for name, seconds in measure(texts).items():
            ours.setdefault(name, []).append(size / seconds / 1e6)
        if options.peer:
            found = ask(options.peer, texts)
            verdicts = found["verdicts"]
            for name, seconds in found["seconds"].items():
                theirs.setdefault(name, []).append(size / seconds / 1e6)
    for name, rates in ours.items():
        row = f"{name:18} {statistics.median(rates):6.1f} MB/s"
        if name in theirs:
            ratio = statistics.median(one / other for one, other in zip(rates, theirs[name], strict=True))
            row += f", datatrove {statistics.median(theirs[name]):5.2f} MB/s, ratio {ratio:5.1f}"
        if name in verdicts:
            row += f", {agreement(name, texts, verdicts[name])}"
        print(row)


def measure(texts: list[str]) -> dict[str, float]:
    """Return the seconds of each rule; each finds the words of the texts for itself."""
    rules: dict[str, Callable[[str], object]] = {
        name: lambda text, rule=rule: rule(Reading(text)) for name, rule in FILTERS.items()
    }
    rules |= {"minhash": sign, "exact": exact_key, "language": identify}
    seconds = {}
    for name, rule in rules.items():
        rule(texts[0])
        started = time.process_time()
        for text in texts:
            rule(text)
        seconds[name] = time.process_time() - started
    return seconds


def agreement(name: str, texts: list[str], verdicts: list[str]) -> str:
    """Return how many texts are kept or dropped by both, and how many by the same rule."""
    mine = [FILTERS[name](Reading(text)).rule for text in texts]
    same_end = sum((not a) == (not b) for a, b in zip(mine, verdicts, strict=True)) / len(texts)
    same_rule = sum(a == b for a, b in zip(mine, verdicts, strict=True)) / len(texts)
    dropped = sum(map(bool, verdicts)) / len(texts)
    return f"{dropped:.0%} dropped, the same end {same_end:.2%}, the same rule {same_rule:.2%}"


def ask(python: str, texts: list[str]) -> dict[str, dict[str, list[str]]]:
    """Return what the peer found on the same texts."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps(text) + "\n" for text in texts)
        file.flush()
        found = subprocess.run([python, str(PEER), file.name], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def choose(size: float) -> list[str]:
    """Return texts of about `size` bytes from the installed packages, the same ones each time, kinds mixed."""
    packages = Path(sysconfig.get_paths()["purelib"])
    kinds = [prose(packages), docstrings(packages)]
    texts: list[str] = []
    total = 0
    while kinds and total < size:
        for kind in list(kinds):
            text = next(kind, None)
            if text is None:
                kinds.remove(kind)
            else:
                texts.append(text)
                total += len(text)
    return texts


def prose(packages: Path) -> Iterator[str]:
    """Yield Markdown and package descriptions of up to 20,000 characters."""
    for path in sorted([*packages.rglob("*.md"), *packages.glob("*/METADATA")]):
        text = path.read_text("utf-8", "replace").strip()
        if text:
            yield text[:20_000]


def docstrings(packages: Path) -> Iterator[str]:
    """Yield docstrings of at least 400 characters."""
    for path in sorted(packages.rglob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text and len(text) >= 400:
                    yield text


if __name__ == "__main__":
    main()
