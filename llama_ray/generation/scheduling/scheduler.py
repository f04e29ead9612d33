"""Decides which sequences run in a step and in which blocks. It handles block numbers and never touches tensors."""

from __future__ import annotations

import bisect
from collections import OrderedDict

from llama_ray.generation.scheduling.blocks import BlockPool
from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.generation.scheduling.step_plan import Chunk, StepPlan
from llama_ray.utils.integers import ceil_div

_RECOVERY_STEPS = 64
"""Successful steps after which limits that `shrink` lowered are doubled again."""


class Scheduler:
    """First come, first served: up to `max_num_batched_tokens` tokens a step and `max_num_seqs` sequences at once.

    Sequences that generate go first, one token each (Yu et al. 2022, Orca). Prompts fill the rest of the token budget
    in chunks, so that a long prompt delays no stream by more than a step (Agrawal et al. 2024, arXiv:2403.02310).
    While other sequences wait, a prompt gets at most half of what is left, so that short prompts pass a long one.
    A prompt starts when blocks for all of its tokens are free. When no block is left for a sequence that generates,
    the sequence that arrived last is preempted: it gives up its blocks, waits again, and is recomputed later. Sequences
    that run have at most `max_loras` different adapters; one that would add another waits until one is no longer in
    use, and of those that arrived later only sequences without an adapter pass it.
    """

    def __init__(
        self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_loras: int = 1
    ) -> None:
        self.pool, self.max_num_seqs, self.max_num_batched_tokens = pool, max_num_seqs, max_num_batched_tokens
        self.max_loras = max_loras
        # The limits in force: `shrink` lowers them below the configured ones.
        self.current_max_num_seqs, self.current_max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self._steps_since_shrink = 0
        # Both in order of arrival.
        self.waiting: OrderedDict[int, SequenceState] = OrderedDict()
        self.running: list[SequenceState] = []
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
        """Release a sequence's blocks and forget it; do nothing for an unknown sequence."""
        live = self._requests.get(sequence.request_id, [])
        if sequence not in live:
            return
        live.remove(sequence)
        self._live -= 1
        if not live:
            del self._requests[sequence.request_id]
        if sequence.running:
            self.running.remove(sequence)
            self._release(sequence)
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
        """Return whether a sequence waits or runs: it was neither finished nor aborted."""
        return sequence in self._requests.get(sequence.request_id, ())

    def schedule(self, num_draft_tokens: int = 0) -> StepPlan:
        """Plan one step; sequences that generate get room for up to `num_draft_tokens` draft tokens each."""
        plan = StepPlan()
        budget = self.current_max_num_batched_tokens
        for sequence in [s for s in self.running if s.remaining == 1]:
            # An earlier sequence of this loop may have preempted it.
            if sequence.running and self._grow(sequence, 1, plan, preempting=True):
                chunk = Chunk(sequence, 1)
                plan.chunks.append(chunk)
                budget -= 1
                chunk.draft_room = self._draft_room(sequence, min(num_draft_tokens, budget), plan)
                budget -= chunk.draft_room
                self._fork(chunk)
        # Prompts never starve: even when generating sequences use the whole budget, one block of prompts runs.
        self._schedule_prompts(plan, max(budget, self.pool.block_size))
        while not plan.chunks and self.running:
            # Unfinished prompts hold all blocks between them.
            self._preempt_last(plan)
            self._schedule_prompts(plan, self.current_max_num_batched_tokens)
        return plan

    def undo(self, plan: StepPlan) -> None:
        """Take back a plan that failed: candidates that would have started with it wait again."""
        for chunk in plan.chunks:
            for fork in [f for f in chunk.forks if f.running]:
                self._evict(fork)

    def shrink(self) -> bool:
        """Lower the limits after memory ran out: tokens a step first, then sequences.

        Return False if one sequence and one block of tokens is all that is left.
        """
        self._steps_since_shrink = 0
        if self.current_max_num_batched_tokens > self.pool.block_size:
            self.current_max_num_batched_tokens //= 2
            return True
        if len(self.running) <= 1:
            return False
        self.current_max_num_seqs = (len(self.running) + 1) // 2
        for sequence in self.running[: self.current_max_num_seqs - 1 : -1]:
            self._evict(sequence)
        return True

    def succeeded(self) -> None:
        """Note that a step went well; `_RECOVERY_STEPS` of them raise the limits that `shrink` lowered."""
        tokens, seqs = self.current_max_num_batched_tokens, self.current_max_num_seqs
        if tokens < self.max_num_batched_tokens or seqs < self.max_num_seqs:
            self._steps_since_shrink += 1
            if self._steps_since_shrink >= _RECOVERY_STEPS:
                self.current_max_num_batched_tokens = min(tokens * 2, self.max_num_batched_tokens)
                self.current_max_num_seqs = min(seqs * 2, self.max_num_seqs)
                self._steps_since_shrink = 0

    def _schedule_prompts(self, plan: StepPlan, budget: int) -> None:
        partial = [s for s in self.running if s.remaining > 1]
        while budget > 0:
            sequence = partial.pop(0) if partial else self._try_admit()
            if sequence is None:
                return
            others_wait = bool(partial or self.waiting)
            share = ceil_div(budget, 2) if others_wait and sequence.remaining > budget // 2 else budget
            length = self._grow(sequence, min(sequence.remaining, share), plan, preempting=False)
            if length:
                chunk = Chunk(sequence, length)
                plan.chunks.append(chunk)
                budget -= length
                self._fork(chunk)

    def _try_admit(self) -> SequenceState | None:
        """Start a waiting sequence, if `max_num_seqs` allows it and blocks for all of its tokens are free."""
        sequence = self._next_waiting()
        if sequence is None or len(self.running) >= self.current_max_num_seqs:
            return None
        blocks, digests = self.pool.match(sequence.reusable, sequence.cache_seed)
        self.pool.share(blocks)
        # One block more than it needs now, or its first new token might already preempt a sequence.
        needed = ceil_div(len(sequence.tokens), self.pool.block_size) - len(blocks) + bool(self.running)
        if needed > self.pool.available:
            self.pool.release(blocks)
            return None
        del self.waiting[sequence.arrival]
        sequence.blocks, sequence.digests = blocks, digests
        sequence.computed = sequence.reused = len(blocks) * self.pool.block_size
        self._start(sequence)
        return sequence

    def _next_waiting(self) -> SequenceState | None:
        """Return the first waiting sequence that `max_loras` allows to start."""
        first = next(iter(self.waiting.values()), None)
        if first is None or first.adapter is None:
            return first
        used = {sequence.adapter for sequence in self.running if sequence.adapter is not None}
        if first.adapter in used or len(used) < self.max_loras:
            return first
        return next((sequence for sequence in self.waiting.values() if sequence.adapter is None), None)

    def _start(self, sequence: SequenceState) -> None:
        sequence.running = True
        bisect.insort(self.running, sequence, key=lambda s: s.arrival)

    def _grow(self, sequence: SequenceState, tokens: int, plan: StepPlan, *, preempting: bool) -> int:
        """Give a sequence blocks for its next `tokens` tokens; return how many of them fit."""
        size = self.pool.block_size
        first = sequence.computed // size
        if first < len(sequence.blocks) and self.pool.users(sequence.blocks[first]) > 1:
            # Other sequences read that block, so this one writes to a copy.
            copy = self._allocate(sequence, plan, preempting)
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

    def _allocate(self, sequence: SequenceState, plan: StepPlan, preempting: bool) -> int | None:
        """Return a block, for which `preempting` sequences take those of later arrivals; None if there is none."""
        while (block := self.pool.allocate()) is None:
            if not preempting or self._preempt_last(plan) is sequence:
                return None
        return block

    def _preempt_last(self, plan: StepPlan) -> SequenceState:
        """Evict the running sequence that arrived last, drop it from the plan and return it."""
        victim = self.running[-1]
        plan.drop(victim)
        self._evict(victim)
        return victim

    def _evict(self, sequence: SequenceState) -> None:
        """Release the blocks of a running sequence and put it at the head of the queue."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting[sequence.arrival] = sequence
        self.waiting.move_to_end(sequence.arrival, last=False)
        self._queue_followers(sequence)

    def _release(self, sequence: SequenceState) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks, sequence.digests = [], []
        sequence.computed = sequence.draft_computed = 0
        sequence.running = False

    def _draft_room(self, sequence: SequenceState, tokens: int, plan: StepPlan) -> int:
        """Return how many of `tokens` draft tokens fit without preempting another sequence, with blocks for them."""
        tokens = min(tokens, sequence.tokens_left - 1)
        # Followers will share its last block.
        if tokens <= 0 or sequence.followers:
            return 0
        return max(self._grow(sequence, 1 + tokens, plan, preempting=False) - 1, 0)

    def _fork(self, chunk: Chunk) -> None:
        """Start the other candidates of a request where the prompt of the first one ends."""
        leader = chunk.sequence
        if not leader.followers or not chunk.complete:
            return
        free = max(self.current_max_num_seqs - len(self.running), 0)
        chunk.forks, leader.followers = leader.followers[:free], leader.followers[free:]
        for fork in chunk.forks:
            fork.blocks, fork.digests = list(leader.blocks), list(leader.digests)
            fork.computed = fork.reused = leader.computed + chunk.length
            self.pool.share(fork.blocks)
            self._start(fork)
        self._queue_followers(leader)

    def _queue_followers(self, leader: SequenceState) -> None:
        """Queue followers that cannot start from the leader's prompt on their own, before all later arrivals."""
        for follower in reversed(leader.followers):
            self.waiting[follower.arrival] = follower
            self.waiting.move_to_end(follower.arrival, last=False)
        leader.followers = []
