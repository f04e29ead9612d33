"""The tests that need a GPU, and those of the Triton kernels, which run natively there."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from on_gpu.results import Results
from on_gpu.setting import Setting

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "tests/generation/backends/cuda"
# Warnings are shown, not errors as elsewhere: other versions of libraries warn of other things.
OPTIONS = ["-q", "-W", "default", "-p", "no:cacheprovider", "--durations=10"]


def run(setting: Setting, results: Results) -> None:
    """Run all tests of the modules that have one marked `cuda`, and of the kernels; raise SystemExit if one fails."""
    marked = [p for p in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.cuda" in p.read_text()]
    modules = [str(KERNELS), *(str(p) for p in marked if KERNELS not in p.parents)]
    # Kernels compile on one core each, so processes side by side save most of the time.
    parallel = ["-n", "8"] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", *OPTIONS, *parallel, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (setting.out / "tests.txt").write_text(done.stdout + done.stderr)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout)}
    note = ", ".join(f"{n} {word}" for word, n in counts.items() if word != "passed")
    results.add("tests", counts.get("passed", 0), "passed", note=note)
    if done.returncode:
        print(*re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE), sep="\n")
        raise SystemExit(1)
