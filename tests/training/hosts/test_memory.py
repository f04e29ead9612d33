from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import torch
from llama_ray.training.hosts.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(8 * 2**20)  # 32 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def run():
    usual = faults()
    kept = keep_freed_memory()
    faults()
    print(usual, int(kept), faults())

if sys.argv[1] == "thread":
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
else:
    run()
"""


# Ray Train runs a worker's loop in a thread.
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
@pytest.mark.parametrize("where", ["main", "thread"])
def test_freed_memory_is_reused_without_page_faults(where: str) -> None:
    pages = 10 * 32 * 2**20 // resource.getpagesize()
    job = subprocess.run([sys.executable, "-c", PROGRAM, where], capture_output=True, text=True, check=True)
    usual, kept, after = map(int, job.stdout.split())
    assert kept
    assert usual > 0.5 * pages
    # A thread's arena may still take one of the ten from the system.
    assert after < 0.2 * pages
