from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llama_ray.training.profile import profiled


@pytest.mark.parametrize(("run_steps", "expected"), [(8, 2), (4, 1)])
def test_a_trace_holds_the_asked_steps_and_is_handed_on_once(
    run_steps: int, expected: int, tmp_path: Path
) -> None:
    written: list[Path] = []
    matrix = torch.ones(8, 8)
    with profiled(2, tmp_path / "profile", written.append) as step_done:
        for _ in range(run_steps):
            matrix @ matrix
            step_done()
    assert written == [tmp_path / "profile" / "trace.json"]
    events = json.loads(written[0].read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == expected


def test_no_steps_no_trace(tmp_path: Path) -> None:
    with profiled(0, tmp_path / "profile", lambda path: pytest.fail("written")) as step_done:
        step_done()
    assert not (tmp_path / "profile").exists()
