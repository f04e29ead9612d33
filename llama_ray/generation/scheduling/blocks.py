"""Which blocks of the KV cache are whose. Knows numbers of blocks, nothing of tensors.

A block holds the keys and values of `block_size` tokens. Sequences with a common beginning share its blocks; a full
block stays findable by its content after its last user is gone, until its room is needed (Kwon et al. 2023,
arXiv:2309.06180).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

SCRATCH = 0
"""Never given to a sequence: padding may write here."""


class BlockPool:
    """Blocks 1 to `num_blocks` - 1, each free, in use by one or several sequences, or remembered for its content.

    Without `caching` nothing is remembered. Remembered blocks are forgotten one at a time, the least recently used
    first.
    """

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        self._caching = caching
        self._blank = list(range(num_blocks - 1, SCRATCH, -1))  # a stack: low numbers come first
        self._users = [0] * num_blocks
        self._digest: list[bytes | None] = [None] * num_blocks
        self._tokens: dict[int, tuple[int, ...]] = {}
        self._found: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered, without users; oldest first
        self.evictions = 0

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._blank) + len(self._idle)

    @property
    def in_use(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - 1 - self.available

    def users(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._users[block]

    def allocate(self) -> int | None:
        """A block for one sequence, with content of no meaning; None where all are in use."""
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
        """Count one more user of each."""
        for block in blocks:
            if self._users[block] == 0:
                del self._idle[block]
            self._users[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Count one user less of each; those without users can be had again.

        The end of a sequence is forgotten before its beginning, which more others are likely to share.
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
        """Remember a full block by its content -> its digest, the `parent` of the block after it.

        `parent` is b"" for a sequence's first block. A block whose content is remembered already, elsewhere, is not
        remembered twice.
        """
        digest = _digest(parent, tokens)
        if self._caching and digest not in self._found and self._digest[block] is None:
            self._found[digest], self._digest[block] = block, digest
            self._tokens[block] = tuple(tokens)
        return digest

    def match(self, tokens: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """The blocks that hold the beginning of `tokens`, and their digests; at least one token is left over.

        A digest that is found is believed only where the block's own tokens are these. The blocks are not shared yet.
        """
        blocks: list[int] = []
        digests: list[bytes] = []
        if not self._found:
            return blocks, digests
        parent, size = b"", self.block_size
        for start in range(0, len(tokens) - size, size):
            part = tokens[start : start + size]
            parent = _digest(parent, part)
            block = self._found.get(parent)
            if block is None or self._tokens[block] != tuple(part):
                break
            blocks.append(block)
            digests.append(parent)
        return blocks, digests

    def clear(self) -> None:
        """Forget all contents; blocks in use stay in use."""
        self._blank.extend(self._idle)
        self._idle.clear()
        self._found.clear()
        self._tokens.clear()
        self._digest = [None] * self.num_blocks

    def _forget(self, block: int) -> None:
        digest = self._digest[block]
        if digest is not None:
            del self._found[digest], self._tokens[block]
            self._digest[block] = None


def _digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()
