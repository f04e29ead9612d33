"""Which sequences use which blocks of the KV cache. This module handles block numbers and never touches tensors.

A block holds the keys and values of `block_size` tokens. Sequences with a common prefix share its blocks. A full block
stays cached under its content after its last user has released it, until it is needed for other content (Kwon et al.
2023, arXiv:2309.06180).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

SCRATCH = 0
"""The block that no sequence gets: padding may write here."""


class BlockPool:
    """Blocks 1 to `num_blocks` - 1, each of them blank, in use by one or more sequences, or idle with cached content.

    Idle blocks are evicted one at a time, the least recently used first. Without `caching` there are none.
    """

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self._caching = caching
        # A stack: low numbers come first.
        self._blank = list(range(num_blocks - 1, SCRATCH, -1))
        self._users = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._tokens: dict[int, tuple[int, ...]] = {}
        self._by_digest: dict[bytes, int] = {}
        # Cached blocks without users, the least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.evictions = 0

    @property
    def available(self) -> int:
        """Number of blocks that `allocate` can still return."""
        return len(self._blank) + len(self._idle)

    @property
    def in_use(self) -> int:
        """Number of blocks that sequences hold."""
        return self.num_blocks - 1 - self.available

    def users(self, block: int) -> int:
        """Return how many sequences hold a block."""
        return self._users[block]

    def allocate(self) -> int | None:
        """Return a block with arbitrary content for one sequence, or None if all are in use."""
        if self._blank:
            block = self._blank.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
            self.evictions += 1
        else:
            return None
        self._users[block] = 1
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """Add a user to each block."""
        for block in blocks:
            if self._users[block] == 0:
                del self._idle[block]
            self._users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a user from each of a sequence's blocks; those without users can be allocated again.

        The last blocks of a sequence are evicted before its first ones, which other sequences more likely share.
        """
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if self._digest[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None

    def publish(self, block: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Cache a full block under its content; return its digest, the `parent` of the next block.

        `parent` is the seed of `match` for a sequence's first block. Content that another block holds already is not
        cached twice.
        """
        digest = _digest(parent, tokens)
        if self._caching and digest not in self._by_digest and self._digest[block] is None:
            self._by_digest[digest], self._digest[block] = block, digest
            self._tokens[block] = tuple(tokens)
        return digest

    def match(self, tokens: Sequence[int], seed: bytes = b"") -> tuple[list[int], list[bytes]]:
        """Return the cached blocks that hold a prefix of `tokens`, and their digests.

        `seed` is what keys and values depend on beside tokens: the digest of an adapter, b"" for none. At least one
        token is left to compute. Tokens are compared as well as digests, so collisions do no harm. The blocks have no
        new user until `share` is called.
        """
        blocks: list[int] = []
        digests: list[bytes] = []
        if not self._by_digest:
            return blocks, digests
        parent, size = seed, self.block_size
        for start in range(0, len(tokens) - size, size):
            part = tokens[start : start + size]
            parent = _digest(parent, part)
            block = self._by_digest.get(parent)
            if block is None or self._tokens[block] != tuple(part):
                break
            blocks.append(block)
            digests.append(parent)
        return blocks, digests

    def clear(self) -> None:
        """Drop all cached content; blocks in use stay in use."""
        self._blank.extend(self._idle)
        self._idle.clear()
        self._by_digest.clear()
        self._tokens.clear()
        self._digest = [None] * self.num_blocks

    def _forget(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            del self._by_digest[digest], self._tokens[block]
            self._digest[block] = None


def _digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
