from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.sampling.sampler import Sample
from llama_ray.generation.scheduling.blocks import BlockPool
from llama_ray.generation.scheduling.scheduler import Plan, Scheduler
from llama_ray.generation.scheduling.sequence import SequenceState
from llama_ray.generation.scheduling.text import TextOutput

SIZE = 4


def sequence(
    request_id: int, length: int = 1, tokens: int = 8, index: int = 0, leader: SequenceState | None = None
) -> SequenceState:
    params = SamplingParams(max_tokens=tokens)
    return SequenceState(
        request_id, index, [request_id] * length, params, 0, TextOutput(None, ()), (), leader=leader
    )


def make(blocks: int = 100, max_num_seqs: int = 8, budget: int = 16) -> Scheduler:
    return Scheduler(BlockPool(blocks + 1, SIZE, caching=False), max_num_seqs, budget)


def carry_out(scheduler: Scheduler, plan: Plan) -> list[tuple[int, int]]:
    """As the engine would: (request, tokens computed) for each chunk."""
    done = []
    for chunk in plan.chunks:
        complete, computed = chunk.complete, chunk.sequence.computed + chunk.length
        done.append((chunk.sequence.request_id, chunk.length))
        for s in (chunk.sequence, *chunk.forks):
            s.computed = computed
            if complete and s.append([Sample(1, None)]).finish_reason:
                scheduler.finish(s)
    return done


def step(scheduler: Scheduler, drafts: int = 0) -> list[tuple[int, int]]:
    return carry_out(scheduler, scheduler.schedule(drafts))


def test_sequences_that_generate_go_first_and_prompts_fill_the_budget_in_chunks() -> None:
    scheduler = make(budget=16)
    scheduler.add(sequence(0, 3))
    assert step(scheduler) == [(0, 3)]
    scheduler.add(sequence(1, 40))
    assert step(scheduler) == [(0, 1), (1, 15)]
    assert step(scheduler) == [(0, 1), (1, 15)]
    assert step(scheduler) == [(0, 1), (1, 10)]
    assert step(scheduler) == [(0, 1), (1, 1)]


def test_short_prompts_pass_a_long_one() -> None:
    scheduler = make(budget=16)
    scheduler.add(sequence(0, 100))
    for i in range(1, 4):
        scheduler.add(sequence(i, 2))
    assert step(scheduler) == [(0, 8), (1, 2), (2, 2), (3, 2)]


def test_seats_are_given_first_come_first_served() -> None:
    scheduler = make(max_num_seqs=2)
    for i in range(4):
        scheduler.add(sequence(i, 1, tokens=2 + i))
    assert [i for i, _ in step(scheduler)] == [0, 1]
    assert [i for i, _ in step(scheduler)] == [0, 1]  # 0 has its two tokens
    assert [i for i, _ in step(scheduler)] == [1, 2]
    assert scheduler.num_waiting == 1


def test_a_prompt_waits_until_there_are_blocks_for_all_of_it_and_nobody_overtakes() -> None:
    scheduler = make(blocks=4, budget=64)
    scheduler.add(sequence(0, 8, tokens=3))
    scheduler.add(sequence(1, 12, tokens=2))
    scheduler.add(sequence(2, 1, tokens=2))
    assert step(scheduler) == [(0, 8)]
    assert step(scheduler) == [(0, 1)]
    assert step(scheduler) == [(0, 1)]
    assert [i for i, _ in step(scheduler)] == [1]


def test_whoever_came_last_gives_its_blocks_up_and_goes_on_later_with_what_it_had() -> None:
    scheduler = make(blocks=4, budget=64)
    first, last = sequence(0, 4, tokens=8), sequence(1, 4, tokens=8)
    scheduler.add(first)
    scheduler.add(last)
    while scheduler.preemptions == 0:
        step(scheduler)
    assert first.running
    assert not last.running
    assert (last.blocks, last.computed) == ([], 0)
    had = list(last.tokens)
    assert len(had) > 4
    while not last.running:
        step(scheduler)
    assert last.tokens[: len(had)] == had
    while scheduler.has_work:
        step(scheduler)
    assert len(last.output) == len(first.output) == 8
    assert scheduler.pool.in_use == 0


def test_candidates_share_the_prompts_blocks_and_copy_the_one_they_write_to() -> None:
    scheduler = make(max_num_seqs=3, budget=64)
    leader = sequence(0, 6)
    scheduler.add(leader)
    for i in range(1, 4):
        scheduler.add(sequence(0, 6, index=i, leader=leader))
    assert scheduler.num_waiting == 4
    plan = scheduler.schedule()
    assert [len(c.forks) for c in plan.chunks] == [2]
    assert scheduler.num_waiting == 1  # there are three max_num_seqs
    forks = plan.chunks[0].forks
    carry_out(scheduler, plan)
    assert forks[0].blocks == leader.blocks
    assert scheduler.pool.in_use == 2
    plan = scheduler.schedule()
    # Two of the three write to a copy; the last one left may keep the block.
    assert len(plan.copies) == 2
    assert {source for source, _ in plan.copies} == {forks[1].blocks[1]}
    tables = [c.sequence.blocks for c in plan.chunks]
    assert len({t[0] for t in tables}) == 1
    assert len({t[1] for t in tables}) == 3


def test_abort_takes_a_request_out_wherever_it_is() -> None:
    scheduler = make(max_num_seqs=1)
    leader = sequence(0, 3)
    for s in (leader, sequence(0, 3, index=1, leader=leader), sequence(1), sequence(2)):
        scheduler.add(s)
    step(scheduler)
    scheduler.abort(0)
    scheduler.abort(1)
    assert scheduler.pool.in_use == 0
    assert (len(scheduler.running), scheduler.num_waiting) == (0, 1)
    assert step(scheduler) == [(2, 1)]
    scheduler.abort(99)
    scheduler.abort(2)
    assert not scheduler.has_work


def test_drafts_get_room_within_budget_blocks_and_what_may_still_come() -> None:
    scheduler = make(blocks=3, budget=64)
    scheduler.add(sequence(0, 3, tokens=8))
    step(scheduler, drafts=5)
    [chunk] = scheduler.schedule(5).chunks
    assert chunk.draft_room == 5
    scheduler = make(budget=4)
    scheduler.add(sequence(0, 3, tokens=8))
    step(scheduler)
    [chunk] = scheduler.schedule(5).chunks
    assert chunk.draft_room == 3
    scheduler = make(budget=64)
    scheduler.add(sequence(0, 3, tokens=3))
    step(scheduler)
    [chunk] = scheduler.schedule(5).chunks
    assert chunk.draft_room == 1  # the second of three tokens is due, a third may be guessed


def test_after_a_shortage_steps_are_smaller_for_a_while() -> None:
    scheduler = make(budget=64)
    scheduler.add(sequence(0, 200))
    scheduler.add(sequence(1, 1))
    plan = scheduler.schedule()
    scheduler.undo(plan)
    for expected in (32, 16, 8, 4):
        assert scheduler.shrink()
        assert scheduler._budget == expected
    step(scheduler)
    assert len(scheduler.running) == 2
    assert scheduler.shrink()  # now by letting go of sequences
    assert [s.request_id for s in scheduler.running] == [0]
    assert not scheduler.shrink()
    for _ in range(64 * 4):
        scheduler.succeeded()
    assert scheduler._budget == 64


def test_thousands_that_wait_are_not_looked_at() -> None:
    scheduler = make(max_num_seqs=1)
    for i in range(5000):
        scheduler.add(sequence(i, 1, tokens=100))

    class Counting(dict):  # type: ignore[type-arg]
        looked = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            for key in super().__iter__():
                self.looked += 1
                yield key

    scheduler._requests = Counting(scheduler._requests)
    before = list(scheduler.waiting)[:3]
    for _ in range(3):
        step(scheduler)
    assert scheduler._requests.looked == 0
    assert list(scheduler.waiting)[:2] == before[1:]
    scheduler.abort(4000)
    assert scheduler.num_waiting == 4998


requests = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 3)), max_size=12)


@given(requests, st.integers(8, 14), st.integers(1, 5), st.integers(1, 20), st.integers(0, 3), st.data())
@settings(max_examples=150, deadline=None)
def test_everyone_finishes_and_no_block_is_lost(
    asked: list[tuple[int, int, int]],
    blocks: int,
    max_num_seqs: int,
    budget: int,
    drafts: int,
    data: st.DataObject,
) -> None:
    scheduler = make(blocks, max_num_seqs, budget)
    everyone: list[SequenceState] = []
    aborted = set()
    for i, (length, tokens, n) in enumerate(asked):
        leader: SequenceState | None = None
        for index in range(n):
            s = sequence(i, length, tokens, index, leader)
            leader = leader or s
            everyone.append(s)
            scheduler.add(s)
    steps = 0
    while scheduler.has_work:
        plan = scheduler.schedule(drafts)
        assert plan.chunks, "nobody runs although somebody waits"
        assert len(scheduler.running) <= max_num_seqs
        generating = sum(c.sequence.remaining == 1 for c in plan.chunks)
        others = sum(c.length for c in plan.chunks) - generating
        assert others <= max(budget - generating, SIZE)
        holders: dict[int, int] = {}
        for s in scheduler.running:
            assert len(set(s.blocks)) == len(s.blocks)
            for b in s.blocks:
                holders[b] = holders.get(b, 0) + 1
        assert all(scheduler.pool.users(b) == n for b, n in holders.items())
        assert scheduler.pool.in_use == len(holders)
        for c in plan.chunks:
            end = c.sequence.computed + c.length + c.draft_room
            assert len(c.sequence.blocks) * SIZE >= end
            for position in range(c.sequence.computed, end):
                writes_to = c.sequence.blocks[position // SIZE]
                # Those that begin here share it until they write themselves.
                assert holders[writes_to] == 1 + len(c.forks)
        carry_out(scheduler, plan)
        if asked and data.draw(st.integers(0, 9)) == 0:
            victim = data.draw(st.integers(0, len(asked) - 1))
            scheduler.abort(victim)
            aborted.add(victim)
        steps += 1
        assert steps < 3000
    assert scheduler.pool.in_use == 0
    for s in everyone:
        assert s.request_id in aborted or len(s.output) == s.params.max_tokens
