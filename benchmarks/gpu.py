"""Prove and measure the GPU path with one command: ceilings, tests, training, decoding, prefill, long contexts.

    make gpu                                         # all parts; 8 minutes at most
    python3 benchmarks/gpu.py --parts tests,decode   # some of them
    python3 benchmarks/gpu.py --device cpu --tiny    # the same script without a GPU: figures mean nothing

Needs Python 3.11, torch with Triton, transformers, safetensors, tokenizers, numpy, psutil and pytest, and nothing else:
neither this project's environment nor a network. Each part is a process of its own with a time limit. Its figures are
added to `results.jsonl` in the output directory as they come, so that an interrupted run keeps what it measured, and
the table that the command ends with is made from that file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The project is not installed on such a machine.
sys.path.insert(0, str(ROOT))

from on_gpu.results import Results  # noqa: E402
from on_gpu.setting import Setting  # noqa: E402

LIMITS_S = {
    "ceilings": 40,
    "tests": 150,
    "train": 150,
    "train-peer": 120,
    "train-fp8": 90,
    "train-long": 90,
    "train-small": 60,
    "train-documents": 120,
    "decode": 90,
    "decode-peer": 60,
    "prefill": 60,
    "long-context": 60,
}
"""Every part, in order, and the seconds after which it is ended."""


def main() -> int:
    """Run the parts that were asked for and print the table; return 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(LIMITS_S), help="a comma-separated list (all)")
    parser.add_argument("--skip", default="", help="parts to leave out")
    parser.add_argument("--minutes", type=float, default=8, help="time limit for all of it (8)")
    parser.add_argument("--out", type=Path, default=Path(".gpu"), help="output directory (.gpu)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a trial")
    parser.add_argument("--tiny", action="store_true", help="models of a few thousand weights")
    parser.add_argument("--part", choices=LIMITS_S, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    setting = Setting(arguments.device, arguments.tiny, arguments.out.absolute())
    if arguments.part:
        run_here(arguments.part, setting)
        return 0
    chosen = [p for p in arguments.parts.split(",") if p and p not in arguments.skip.split(",")]
    if unknown := set(chosen) - set(LIMITS_S):
        parser.error(f"--parts names {', '.join(sorted(unknown))}; the parts are {', '.join(LIMITS_S)}")
    if problem := setting.problem():
        parser.error(problem)
    setting.out.mkdir(parents=True, exist_ok=True)
    results = Results(setting.out)
    end = time.monotonic() + 60 * arguments.minutes
    failed = [part for part in chosen if not _run(part, setting, results, end)]
    print(results.table(setting.machine()), flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}; see {setting.out}/*.log", flush=True)
    return bool(failed)


def _run(part: str, setting: Setting, results: Results, end: float) -> bool:
    """Run `part` in a process of its own, until `end` at most; return whether it ended well."""
    limit_s = min(LIMITS_S[part], end - time.monotonic())
    if limit_s <= 0:
        print(f"{part}: not begun, the time is over; --minutes gives more, --parts {part} runs it alone")
        return False
    log = setting.out / f"{part}.log"
    command = [sys.executable, __file__, "--part", part, "--out", str(setting.out)]
    command += ["--device", setting.device_name, *(["--tiny"] if setting.tiny else [])]
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        try:
            code = process.wait(limit_s)
            ending = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            ending = f"ended at its limit of {limit_s:.0f} s"
        finally:
            process.kill()
            process.wait()
    print(f"{part}: {ending}, {time.monotonic() - start:.0f} s", flush=True)
    for result in results.of(part):
        print(f"  {result}", flush=True)
    if ending != "done":
        print("".join(f"  | {line}\n" for line in log.read_text().splitlines()[-25:]), flush=True)
    return ending == "done"


def run_here(part: str, setting: Setting) -> None:
    """Run `part` in this process."""
    from on_gpu import ceilings, decoding, tests, training

    parts = {
        "ceilings": ceilings.run,
        "tests": tests.run,
        "train": training.large,
        "train-peer": training.large_peer,
        "train-fp8": training.float8,
        "train-long": training.long_sequences,
        "train-small": training.small,
        "train-documents": training.documents,
        "decode": decoding.decode,
        "decode-peer": decoding.decode_peer,
        "prefill": decoding.prefill,
        "long-context": decoding.long_context,
    }
    parts[part](setting, Results(setting.out, part))


if __name__ == "__main__":
    sys.exit(main())
