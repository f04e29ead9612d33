"""What a grammar may cost, whom it may cost anything, and what becomes of its process."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import psutil
import pytest

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.constraints.grammars import Grammars
from llama_ray.generation.constraints.limits import MAX_IDLE_PROCESSES
from tests.generation.constraints.helpers import Processes, costly_schema

VOCAB_SIZE = 384
# Less than engines have, to save time.
CPU_S = 0.3
# On a busy machine, ten times as much time may have elapsed first.
TAKES_TOO_LONG = r"takes more than (0\.3 s of processor time|3 s) to compile"


@pytest.fixture
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    grammars = Grammars(tokenizer, VOCAB_SIZE, {1}, compile_cpu_s=CPU_S)
    yield grammars
    grammars.close()


def test_what_a_constraint_needs_is_said(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    for tokenizer_or_none, eos_ids, missing in (
        (None, {1}, "a model with a tokenizer"),
        (tokenizer, set[int](), "a model with an end-of-text token"),
    ):
        with pytest.raises(ValueError, match=f"regex needs {missing}"):
            Grammars(tokenizer_or_none, VOCAB_SIZE, eos_ids).constraints("regex", "a", 1)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="json_schema needs the package llguidance"):
        Grammars(tokenizer, VOCAB_SIZE, {1}).constraints("json_schema", "{}", 1)


def test_costly_grammars_are_refused_with_their_limit_and_keep_no_cheap_one_waiting(
    grammars: Grammars, processes: Processes
) -> None:
    used = psutil.Process().cpu_times()
    with ThreadPoolExecutor() as pool:
        costly = [pool.submit(grammars.constraints, "json_schema", costly_schema(i), 1) for i in range(5)]
        cheap = pool.submit(grammars.constraints, "regex", "[a-c]{3}", 1)
        done, _ = wait([cheap, *costly], return_when=FIRST_COMPLETED)
        assert done == {cheap}
        for refused in costly:
            with pytest.raises(ValueError, match=TAKES_TOO_LONG):
                refused.result()
    # A refusal is remembered.
    with pytest.raises(ValueError, match=TAKES_TOO_LONG):
        grammars.constraints("json_schema", costly_schema(), 1)
    assert len(processes.forks()) == 1, "the cheap one's"
    now = psutil.Process().cpu_times()
    assert now.user + now.system - used.user - used.system < CPU_S, "none of it in this process"


def test_a_grammar_whose_process_is_killed_is_compiled_again(
    grammars: Grammars, processes: Processes
) -> None:
    grammars.constraints("regex", "a", 1)
    known = set(processes.forks())
    with ThreadPoolExecutor() as pool:
        costly = pool.submit(grammars.constraints, "json_schema", costly_schema(), 1)
        while not (new := set(processes.forks()) - known):
            assert not costly.done()
        new.pop().kill()
        with pytest.raises(ValueError, match=TAKES_TOO_LONG):
            costly.result()
    processes.template().kill()
    assert grammars.constraints("regex", "b", 1)
    # The template's forks went with it.
    psutil.wait_procs(known, timeout=30)
    assert not any(fork.is_running() for fork in known)


def test_only_so_many_processes_are_kept_for_grammars_that_nobody_follows(
    grammars: Grammars, processes: Processes
) -> None:
    for i in range(MAX_IDLE_PROCESSES + 8):
        grammars.constraints("regex", f"a{{{i + 1}}}", 2)
    deadline = time.monotonic() + 30
    while len(processes.forks()) > MAX_IDLE_PROCESSES:
        assert time.monotonic() < deadline


def test_no_process_outlives_grammars_that_are_closed_or_dropped(
    tokenizer: Tokenizer, processes: Processes
) -> None:
    for close in (True, False):
        grammars = Grammars(tokenizer, VOCAB_SIZE, {1})
        (constraint,) = grammars.constraints("regex", "a+", 1)
        running = processes.all()
        assert len(running) == 2
        if close:
            grammars.close()
            with pytest.raises(RuntimeError, match="the engine is closed"):
                grammars.constraints("regex", "b", 1)
        del grammars, constraint
        gc.collect()
        assert not any(process.is_running() for process in running)


SCRIPT = """
import sys, threading
sys.path.insert(0, ".")
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.constraints.grammars import Grammars
from tests.generation.constraints.helpers import Processes, costly_schema
processes = Processes()
grammars = Grammars(Tokenizer.load(sys.argv[1]), 384, {1})
grammars.constraints("regex", "a", 1)
threading.Thread(target=lambda: grammars.constraints("json_schema", costly_schema(), 1)).start()
while len(running := processes.all()) < 3:
    pass
print(*[p.pid for p in running], flush=True)
threading.Event().wait()
"""


def test_no_process_outlives_one_that_is_killed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        processes = [psutil.Process(int(pid)) for pid in owner.stdout.readline().split()]
        assert len(processes) == 3
        owner.kill()
    assert not psutil.wait_procs(processes, timeout=30)[1]
