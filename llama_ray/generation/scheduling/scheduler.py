"""Who runs next, and in which blocks. Knows sequences and numbers of blocks, nothing of tensors."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from dataclasses import dataclass, field

from llama_ray.generation.scheduling.blocks import BlockPool
from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.utils.integers import ceil_div

_CALM_STEPS = 64


@dataclass(slots=True)
class Chunk:
    """Tokens of one sequence that a step computes: `length` from `sequence.computed` on, then guesses."""

    sequence: SequenceState
    length: int
    draft_room: int = 0
    """Tokens after those that may be guessed; there are blocks for them."""
    forks: list[SequenceState] = field(default_factory=list)
    """Candidates of the same request that start here, from the same logits."""
    draft: list[int] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the sequence's next token comes out of it."""
        return self.sequence.computed + self.length == len(self.sequence.tokens)


@dataclass(slots=True)
class Plan:
    """One step: what is computed, after the contents of some blocks are copied."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """(from, to) block numbers."""


class Scheduler:
    """First come, first served, within `max_num_batched_tokens` tokens a step and `max_num_seqs` sequences at once.

    Sequences that generate go first, one token each (Yu et al. 2022, Orca); what is left of the budget takes prompts
    in, in chunks, so that a long one delays no stream by more than a step (Agrawal et al. 2024, arXiv:2403.02310).
    While others wait a prompt gets at most half of what is left, so that short ones pass a long one. A prompt starts
    when blocks for all of it are free. When none is left for a sequence that generates, the one that came last
    gives up its blocks and waits again; its tokens are computed anew later.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool, self.max_num_seqs, self.max_num_batched_tokens = pool, max_num_seqs, max_num_batched_tokens
        self._seats, self._budget, self._calm_steps = max_num_seqs, max_num_batched_tokens, 0
        self.waiting: OrderedDict[int, SequenceState] = OrderedDict()  # by arrival
        self.running: list[SequenceState] = []  # in the order of arrival
        self.preemptions = 0
        self._requests: dict[int, list[SequenceState]] = {}
        self._arrivals = self._live = 0

    def add(self, sequence: SequenceState) -> None:
        """Queue a sequence behind all others."""
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._live += 1
        self._requests.setdefault(sequence.request_id, []).append(sequence)
        if sequence.leader is None:
            self.waiting[sequence.arrival] = sequence
        else:
            sequence.leader.followers.append(sequence)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return self._live - len(self.running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return self._live > 0

    def finish(self, sequence: SequenceState) -> None:
        """Take the blocks of a sequence back; it is not known here any more. One that is unknown is no error."""
        live = self._requests.get(sequence.request_id, [])
        if sequence not in live:
            return
        live.remove(sequence)
        self._live -= 1
        if not live:
            del self._requests[sequence.request_id]
        if sequence.running:
            self.running.remove(sequence)
            self._take_back(sequence)
        else:
            self.waiting.pop(sequence.arrival, None)
        self._queue_followers(sequence)

    def abort(self, request_id: int) -> None:
        """Drop all sequences of a request, waiting and running."""
        live = self._requests.get(request_id, [])
        for sequence in live:
            sequence.followers.clear()
        for sequence in list(live):
            self.finish(sequence)

    def knows(self, sequence: SequenceState) -> bool:
        """Whether it has been neither finished nor aborted."""
        return sequence in self._requests.get(sequence.request_id, ())

    def schedule(self, draft_tokens: int = 0) -> Plan:
        """Decide on one step. Sequences that generate may be given room for up to `draft_tokens` guesses each."""
        plan = Plan()
        budget = self._budget
        for sequence in [s for s in self.running if s.remaining == 1]:
            # It may have lost its blocks to one that came before it.
            if sequence.running and self._grow(sequence, 1, plan, preempting=True):
                chunk = Chunk(sequence, 1)
                plan.chunks.append(chunk)
                budget -= 1
                chunk.draft_room = self._draft_room(sequence, min(draft_tokens, budget), plan)
                budget -= chunk.draft_room
                self._fork(chunk)
        # Prompts never starve: a batch that fills the budget still lets a block of them in.
        self._take_prompts(plan, max(budget, self.pool.block_size))
        while not plan.chunks and self.running:
            # Prompts hold all blocks between them, and none is complete.
            self._preempt(self.running[-1], plan)
            self._take_prompts(plan, self._budget)
        return plan

    def undo(self, plan: Plan) -> None:
        """A plan could not be carried out: candidates that would have begun with it wait again."""
        for chunk in plan.chunks:
            for fork in [f for f in chunk.forks if f.running]:
                self._preempt(fork, Plan())

    def shrink(self) -> bool:
        """Memory ran out: compute fewer tokens a step, then with fewer sequences. False where it is one already."""
        self._calm_steps = 0
        if self._budget > self.pool.block_size:
            self._budget //= 2
            return True
        if len(self.running) <= 1:
            return False
        self._seats = (len(self.running) + 1) // 2
        for sequence in self.running[: self._seats - 1 : -1]:
            self._preempt(sequence, Plan())
        return True

    def succeeded(self) -> None:
        """A step went well; after some such, `shrink` is taken back."""
        if self._budget < self.max_num_batched_tokens or self._seats < self.max_num_seqs:
            self._calm_steps += 1
            if self._calm_steps >= _CALM_STEPS:
                self._budget = min(self._budget * 2, self.max_num_batched_tokens)
                self._seats, self._calm_steps = min(self._seats * 2, self.max_num_seqs), 0

    def _take_prompts(self, plan: Plan, budget: int) -> None:
        begun = [s for s in self.running if s.remaining > 1]
        while budget > 0 and (begun or self._next_admissible()):
            sequence = begun.pop(0) if begun else self._admit()
            others_wait = bool(begun or self.waiting)
            share = ceil_div(budget, 2) if others_wait and sequence.remaining > budget // 2 else budget
            length = self._grow(sequence, min(sequence.remaining, share), plan, preempting=False)
            if length:
                chunk = Chunk(sequence, length)
                plan.chunks.append(chunk)
                budget -= length
                self._fork(chunk)

    def _next_admissible(self) -> bool:
        """Whether a seat, and blocks for all of its tokens, are free for the first in the queue."""
        if not self.waiting or len(self.running) >= self._seats:
            return False
        sequence = next(iter(self.waiting.values()))
        blocks, digests = self.pool.match(sequence.tokens) if sequence.may_reuse else ([], [])
        self.pool.share(blocks)
        # One more than it needs now, or its first new token might already push somebody out.
        needed = ceil_div(len(sequence.tokens), self.pool.block_size) - len(blocks) + bool(self.running)
        if needed > self.pool.available:
            self.pool.release(blocks)
            return False
        sequence.blocks, sequence.digests = blocks, digests
        return True

    def _admit(self) -> SequenceState:
        _, sequence = self.waiting.popitem(last=False)
        sequence.computed = sequence.reused = len(sequence.blocks) * self.pool.block_size
        self._seat(sequence)
        return sequence

    def _seat(self, sequence: SequenceState) -> None:
        sequence.running = True
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)

    def _grow(self, sequence: SequenceState, tokens: int, plan: Plan, *, preempting: bool) -> int:
        """Make sure of blocks for the next `tokens` tokens -> for how many of them there are."""
        size = self.pool.block_size
        first = sequence.computed // size
        if first < len(sequence.blocks) and self.pool.users(sequence.blocks[first]) > 1:
            copy = self._allocate(sequence, plan, preempting)  # others read that block
            if copy is None:
                return 0
            plan.copies.append((sequence.blocks[first], copy))
            self.pool.release([sequence.blocks[first]])
            sequence.blocks[first] = copy
        while len(sequence.blocks) * size < sequence.computed + tokens:
            block = self._allocate(sequence, plan, preempting)
            if block is None:
                break
            sequence.blocks.append(block)
        return max(min(tokens, len(sequence.blocks) * size - sequence.computed), 0)

    def _allocate(self, sequence: SequenceState, plan: Plan, preempting: bool) -> int | None:
        while (block := self.pool.allocate()) is None:
            if not preempting:
                return None
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is sequence:
                return None
        return block

    def _preempt(self, sequence: SequenceState, plan: Plan) -> None:
        self.preemptions += 1
        plan.chunks = [c for c in plan.chunks if c.sequence is not sequence]
        for chunk in plan.chunks:
            if sequence in chunk.forks:
                chunk.forks.remove(sequence)
        self.running.remove(sequence)
        self._take_back(sequence)
        self.waiting[sequence.arrival] = sequence
        self.waiting.move_to_end(sequence.arrival, last=False)
        self._queue_followers(sequence)

    def _take_back(self, sequence: SequenceState) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.digests = [], []
        sequence.computed = sequence.draft_computed = 0
        sequence.running = False

    def _draft_room(self, sequence: SequenceState, tokens: int, plan: Plan) -> int:
        """Room for guesses, as far as it costs nobody else a block."""
        tokens = min(tokens, sequence.tokens_left - 1)
        if tokens <= 0 or sequence.followers:  # they will share its last block
            return 0
        return max(self._grow(sequence, 1 + tokens, plan, preempting=False) - 1, 0)

    def _fork(self, chunk: Chunk) -> None:
        """Let the other candidates of a request begin where the prompt of the first has been computed."""
        leader = chunk.sequence
        if not leader.followers or not chunk.complete:
            return
        free = max(self._seats - len(self.running), 0)
        chunk.forks, leader.followers = leader.followers[:free], leader.followers[free:]
        for fork in chunk.forks:
            fork.blocks, fork.digests = list(leader.blocks), list(leader.digests)
            fork.computed = fork.reused = leader.computed + chunk.length
            self.pool.share(fork.blocks)
            self._seat(fork)
        self._queue_followers(leader)

    def _queue_followers(self, leader: SequenceState) -> None:
        """Those who cannot begin with it queue up on their own, before all who came later."""
        for follower in reversed(leader.followers):
            self.waiting[follower.arrival] = follower
            self.waiting.move_to_end(follower.arrival, last=False)
        leader.followers = []
