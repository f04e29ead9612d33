"""Random numbers of a step that depend on nothing that came before it."""

from __future__ import annotations

import hashlib

import torch


def seed_dropout(seed: int, step: int, data_rank: int) -> None:
    """Seed torch's generators with a function of these three numbers, so that a run that resumes drops the same.

    Workers that see different data drop differently, and so does another number of them.
    """
    digest = hashlib.sha256(f"dropout:{seed}:{step}:{data_rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
