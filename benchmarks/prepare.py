"""The preparation of data, beside `datasets.map` and datatrove with the same tokenizer, and its memory.

    python benchmarks/prepare.py speed --peers /tmp/peers/bin/python
    python benchmarks/prepare.py memory --gigabytes 5

`speed` makes a corpus of JSON Lines from the sources of the installed Python packages and alternates whole processes,
each with `workers` workers: ours with the start of Ray, theirs with the conversion to their own format. Tokenizer
training is timed apart. `peers` is the Python of an environment with datasets, transformers and datatrove[processing].
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from jsonargparse import auto_cli

from llama_ray.data.dataset.info import read_info

ROOT = Path(__file__).parents[1]
JOB = ROOT / "jobs" / "prepare_data.py"
PEERS = Path(__file__).parent / "peers"
FILE_BYTES = 8_000_000
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt", ".h", ".js"}


def speed(
    directory: str = "prepare-benchmark",
    peers: str = sys.executable,
    megabytes: int = 200,
    workers: int = 2,
    vocab_size: int = 32000,
    rounds: int = 2,
    more_text: list[str] | None = None,
) -> None:
    """Time whole preparations of the same files with the same tokenizer, in turns.

    Args:
        directory: Where the corpus, which is kept, and the results go.
        peers: Python of the environment with the peers.
        megabytes: Size of the corpus.
        workers: Processes that tokenise at once.
        vocab_size: Entries of the tokenizer.
        rounds: Runs of each; medians are told.
        more_text: Folders of other texts to begin with.
    """
    base = Path(directory).resolve()
    corpus = base / "corpus"
    if not corpus.exists():
        write_corpus(corpus, megabytes * 10**6, more_text or [])
    size = sum(path.stat().st_size for path in corpus.iterdir())
    print(f"corpus: {size / 1e6:.1f} MB of JSON Lines in {len(list(corpus.iterdir()))} files", flush=True)
    trained = base / "trained"
    seconds = run_ours(corpus, trained, workers, f"--vocab_size={vocab_size}")
    print(f"ours with tokenizer training: {seconds:.1f} s", flush=True)
    info = read_info(trained)
    count = info.tokens("train") + info.tokens("validation")
    tokenizer = trained / "tokenizer.json"
    contestants: dict[str, Callable[[], float]] = {
        "ours": lambda: run_ours(corpus, base / "ours", workers, f"--tokenizer={tokenizer}"),
        "ours, 1 worker": lambda: run_ours(corpus, base / "ours1", 1, f"--tokenizer={tokenizer}"),
        "datasets.map": lambda: run_peer(
            peers, "datasets_map.py", corpus, base / "datasets", tokenizer, workers
        ),
        "datatrove": lambda: run_peer(
            peers, "datatrove_local.py", corpus, base / "datatrove", tokenizer, workers
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            times[name].append(contestant())
            print(f"{name}: {times[name][-1]:.1f} s", flush=True)
    print(f"{count:,} tokens; floor (read, and write the tokens): {floor(corpus, base, count):.2f} s")
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name}: {median:.1f} s, {size / 1e6 / median:.1f} MB/s, {median / statistics.median(times['ours']):.1f}"
        )


def memory(directory: str = "prepare-memory", gigabytes: float = 5, workers: int = 2) -> None:
    """Prepare a generated corpus of jsonl.gz, parquet and text, and tell the peak memory of all its processes.

    Args:
        directory: Where the corpus, which is kept, and the dataset go.
        gigabytes: Size of the corpus, decompressed.
        workers: Processes that tokenise at once.
    """
    base = Path(directory).resolve()
    corpus = base / "corpus"
    if not corpus.exists():
        write_mixed(corpus, int(gigabytes * 10**9))
    peak = Peak()
    seconds = run_ours(corpus, base / "dataset", workers, "--vocab_size=32000", watch=peak.watch)
    info = read_info(base / "dataset")
    print(
        f"{info.text_bytes / 1e9:.2f} GB of text, {info.tokens('train') / 1e9:.2f} billion tokens in {seconds:.0f} s; "
        f"peak memory of all processes {peak.bytes / 2**30:.2f} GiB"
    )


def run_ours(
    corpus: Path, output: Path, workers: int, *flags: str, watch: Callable[[int], None] | None = None
) -> float:
    """Run the job in a Ray cluster of its own and return its seconds; `watch` is given its process id."""
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable,
        str(JOB),
        f"--source=text={corpus}",
        f"--output={output}",
        f"--workers={workers}",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    started = time.perf_counter()
    with subprocess.Popen([*command, *flags], env=environment, stderr=subprocess.DEVNULL) as job:
        if watch is not None:
            watch(job.pid)
    if job.returncode:
        raise SystemExit(f"{command} ended with {job.returncode}")
    return time.perf_counter() - started


def run_peer(python: str, script: str, corpus: Path, output: Path, tokenizer: Path, workers: int) -> float:
    """Run the script of a peer and return its seconds."""
    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(
        [python, str(PEERS / script), str(corpus), str(output), str(tokenizer), str(workers)],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


class Peak:
    """The largest sum of the memory of a process and all below it; shared pages count once."""

    def __init__(self) -> None:
        self.bytes = 0

    def watch(self, pid: int) -> None:
        """Look at the process twice a second until it ends."""
        job = psutil.Process(pid)
        while job.is_running() and job.status() != psutil.STATUS_ZOMBIE:
            self.bytes = max(self.bytes, sum(map(_pss, [job, *_below(job)])))
            threading.Event().wait(0.5)


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def texts(more: list[str]) -> Iterator[str]:
    """Yield the text files of `more`, the standard library and the installed packages."""
    roots = [*map(Path, more), Path(os.__file__).parent, Path(pa.__file__).parents[1]]
    for path in (path for root in roots for path in sorted(root.rglob("*")) if path.suffix in SUFFIXES):
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError):
            continue
        if text:
            yield text


def write_corpus(directory: Path, size: int, more: list[str]) -> None:
    """Write files of JSON Lines of `size` bytes in all."""
    partial = directory.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    total = index = 0
    for batch in _batches(texts(more), FILE_BYTES):
        content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in batch).encode()
        (partial / f"{index:04d}.jsonl").write_bytes(content)
        total, index = total + len(content), index + 1
        if total >= size:
            break
    partial.rename(directory)


def write_mixed(directory: Path, size: int) -> None:
    """Write jsonl.gz, parquet and plain text in turns, of `size` bytes in all; each text has a number."""
    partial = directory.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    total = index = 0
    while total < size:
        for batch in _batches(texts([]), 25 * FILE_BYTES):
            numbered = [f"{index}.{number}\n{text}" for number, text in enumerate(batch)]
            if index % 3 == 0:
                with gzip.open(partial / f"{index:04d}.jsonl.gz", "wt", compresslevel=1) as file:
                    file.writelines(json.dumps({"text": text}) + "\n" for text in numbered)
            elif index % 3 == 1:
                pq.write_table(
                    pa.table({"text": numbered}), partial / f"{index:04d}.parquet", row_group_size=5000
                )
            else:
                (partial / f"{index:04d}.txt").write_text("\n\n".join(numbered))
            total, index = total + sum(map(len, numbered)), index + 1
            if total >= size:
                break
    partial.rename(directory)


def _batches(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    filled = 0
    for text in texts:
        batch.append(text)
        filled += len(text)
        if filled >= size:
            yield batch
            batch, filled = [], 0
    if batch:
        yield batch


def floor(corpus: Path, base: Path, tokens: int) -> float:
    """Return the seconds that reading the corpus and writing as many bytes as its tokens take, nothing else."""
    started = time.perf_counter()
    for path in corpus.iterdir():
        path.read_bytes()
    scratch = base / "scratch"
    with scratch.open("wb") as file:
        for start in range(0, 2 * tokens, 1 << 20):
            file.write(bytes(min(1 << 20, 2 * tokens - start)))
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    scratch.unlink()
    return seconds


if __name__ == "__main__":
    auto_cli([speed, memory])
