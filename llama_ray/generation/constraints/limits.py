"""What a grammar may cost. Processor time is that of its own process, whatever else the machine does."""

from __future__ import annotations

MAX_GRAMMAR_BYTES = 256 * 1024
"""Length of a schema as JSON, or of a regular expression, in UTF-8."""

MAX_SCHEMA_DEPTH = 120
"""Objects and lists of a schema that are within each other; the parser itself takes no more than 127."""

QUICK_CPU_S = 0.1
"""Processor time of the first attempt to compile a grammar. Most take a few milliseconds; one that needs more is begun
again, behind others of its kind, so that costly grammars do not keep the others waiting."""

COMPILE_CPU_S = 1.0
"""Processor time to compile a grammar and compute its first mask."""

QUICK_LANES, SLOW_LANES = 4, 2
"""Grammars that compile at once in a first and in a second attempt."""

MAX_SLOW = 16
"""Grammars that compile, or wait to compile, in a second attempt; further ones are refused."""

QUICK_NICE, SLOW_NICE = 5, 10
"""Compiling leaves most of a processor to whoever else wants it, such as the model's threads: about three quarters in a
first attempt, nine tenths in a second."""

MASK_CPU_S, FURTHER_MASK_CPU_S = 0.25, 0.02
"""Processor time for the masks of a grammar in one step: for the first of them, and for each further one."""

WALL_CLOCK_FACTOR = 10
"""Every limit of processor time is also one of elapsed time, this many times as long."""

MEMORY_BYTES = 512 * 1024 * 1024
"""Memory of a grammar's process, beyond what it shares with all others."""

MAX_MASKS = 1024
"""Masks of a grammar in one step. Candidates for which there is no room are computed in a later step."""

MAX_IDLE_PROCESSES = 16
"""Grammars whose processes are kept although no running sequence follows them."""

MAX_CACHED_GRAMMARS = 256
"""Grammars of which is kept whether they can be enforced."""

STEP_WAIT_S, REFILL_S = 0.02, 0.002
"""How long a step with other sequences waits for masks: at most `STEP_WAIT_S`, and `REFILL_S` a step on average."""

LONE_WAIT_S = 0.02
"""How long a step waits if none of its sequences can have a token without a mask."""


def mask_limit_s(masks: int) -> float:
    """Return the processor time that so many masks of one grammar may take."""
    return MASK_CPU_S + FURTHER_MASK_CPU_S * (masks - 1)
