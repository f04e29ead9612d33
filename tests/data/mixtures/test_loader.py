from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.mixture import Mixture
from llama_ray.data.mixtures.permutation import Permutation
from llama_ray.data.mixtures.validation import validation_batches

MakeDataset = Callable[..., Path]
SEQ_LEN = 7


def loader(
    dataset: TokenDataset, batch: int, rank: int, world: int, accumulation: int = 1, seed: int = 0
) -> Loader:
    return Loader(
        Mixture.of(dataset),
        seq_len=SEQ_LEN,
        batch_size=batch,
        rank=rank,
        world_size=world,
        seed=seed,
        gradient_accumulation_steps=accumulation,
    )


def firsts(batches: list[Batch]) -> list[int]:
    """The first token of each sample, which identifies the sample."""
    return [int(token) for batch in batches for token in batch.inputs[:, 0]]


@pytest.fixture
def dataset(make_dataset: MakeDataset) -> TokenDataset:
    # 99 samples; shards do not end where samples end.
    return TokenDataset(make_dataset([100, 5, 195, 400]), "train")


@settings(deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_a_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)(np.arange(size, dtype=np.uint64))
    assert np.array_equal(np.sort(order), np.arange(size))


def test_a_permutation_mixes_and_depends_on_seed_and_epoch() -> None:
    size = 10_001
    positions = np.arange(size, dtype=np.uint64)
    orders = [Permutation(size, seed, epoch)(positions) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert np.array_equal(orders[0], Permutation(size, 0, 0)(positions))
    for order in orders:
        # Two unrelated orders agree at about one position; neighbours are on average a third of the size apart.
        assert np.mean(np.abs(np.diff(order))) == pytest.approx(size / 3, rel=0.05)
        assert abs(np.corrcoef(positions.astype(float), order)[0, 1]) < 0.05
    assert np.sum(orders[0] == orders[1]) < 10
    assert np.sum(orders[0] == orders[2]) < 10


def test_all_orders_of_a_small_set_are_about_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(6000):
        order = tuple(Permutation(3, seed, 0)(np.arange(3, dtype=np.uint64)).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    # Chi-squared with 5 degrees of freedom exceeds 25.7 by chance once in ten thousand.
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 25.7


def test_a_permutation_of_terabytes_starts_at_once() -> None:
    started = time.perf_counter()
    order = Permutation(10**12 + 39, 0, 0)(np.arange(10**12, 10**12 + 39, dtype=np.uint64))
    assert time.perf_counter() - started < 1
    assert len(set(order.tolist())) == 39
    assert order.max() < 10**12 + 39


def test_samples_are_consecutive_tokens_with_targets_one_ahead(dataset: TokenDataset) -> None:
    [batch] = loader(dataset, batch=5, rank=0, world=1).next_global_batch()
    inputs, targets = batch.inputs, batch.targets
    assert inputs.shape == targets.shape == (5, SEQ_LEN)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(SEQ_LEN))


@pytest.mark.parametrize(("batch", "world", "accumulation"), [(1, 1, 1), (3, 1, 1), (2, 3, 2), (4, 2, 1)])
def test_each_epoch_visits_each_sample_once_and_reaches_into_the_next_batch(
    dataset: TokenDataset, batch: int, world: int, accumulation: int
) -> None:
    loaders = [loader(dataset, batch, rank, world, accumulation) for rank in range(world)]
    size = batch * world * accumulation
    assert loaders[0].windows_per_epoch == 99
    batches = [[each.next_global_batch() for each in loaders] for _ in range(-(-3 * 99 // size))]
    seen = [
        sample
        for of_ranks in batches
        for micro_step in range(accumulation)
        for of_rank in of_ranks
        for sample in firsts([of_rank[micro_step]])
    ]
    possible = {SEQ_LEN * sample for sample in range(99)}
    epochs = [seen[99 * n : 99 * (n + 1)] for n in range(3)]
    assert all(set(epoch) == possible for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert loaders[0].epoch == size * len(batches) // 99


def test_global_batches_do_not_depend_on_how_they_are_divided(dataset: TokenDataset) -> None:
    def global_batches(batch: int, world: int, accumulation: int) -> list[list[int]]:
        loaders = [loader(dataset, batch, rank, world, accumulation) for rank in range(world)]
        return [
            sorted(sample for each in loaders for sample in firsts(each.next_global_batch()))
            for _ in range(20)
        ]

    expected = global_batches(12, 1, 1)
    for split in ((3, 4, 1), (3, 2, 2), (3, 1, 4), (1, 4, 3), (2, 3, 2)):
        assert global_batches(*split) == expected


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.integers(0, 60), seed=st.integers(0, 100))
def test_resuming_continues_with_the_same_batches(dataset: TokenDataset, steps: int, seed: int) -> None:
    first = loader(dataset, batch=2, rank=1, world=2, seed=seed)
    for _ in range(steps):
        first.next_global_batch()
    second = loader(dataset, batch=2, rank=1, world=2, seed=seed)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    for _ in range(30):
        assert firsts(second.next_global_batch()) == firsts(first.next_global_batch())


def test_resuming_on_fewer_workers_goes_on_at_the_next_sample(dataset: TokenDataset) -> None:
    before = [loader(dataset, batch=2, rank=rank, world=4) for rank in range(4)]
    seen = [sample for _ in range(5) for each in before for sample in firsts(each.next_global_batch())]
    after = [loader(dataset, batch=2, rank=rank, world=3) for rank in range(3)]
    for each in after:
        each.load_state_dict(before[0].state_dict())
    for _ in range(99):
        seen += [sample for each in after for sample in firsts(each.next_global_batch())]
    alone = loader(dataset, batch=1, rank=0, world=1)
    assert seen == [firsts(alone.next_global_batch())[0] for _ in seen]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "was trained with seed 1; this run has 0"),
        ({"seq_len": 6}, "was trained with seq_len 6; this run has 7"),
        (
            {"sources": {"data": {"data": "0123456789abcdef", "windows": 99}}},
            "data 0123456789ab; this run has",
        ),
        ({"stages": [{"from_step": 1, "position": 0, "seq_len": 7, "shares": {"web": 1}}]}, "on source web"),
    ],
    ids=str,
)
def test_a_position_in_other_data_or_another_order_is_refused_or_left(
    dataset: TokenDataset, change: dict[str, object], message: str
) -> None:
    each = loader(dataset, batch=2, rank=0, world=1)
    for _ in range(3):
        each.next_global_batch()
    other: Any = {**each.state_dict(), **change}
    fresh = loader(dataset, batch=2, rank=0, world=1)
    with pytest.raises(ValueError, match=f"{message}.*--allow_other_data"):
        fresh.load_state_dict(other)
    assert not fresh.load_state_dict(other, allow_other_data=True)
    assert fresh.position == 0
    assert fresh.load_state_dict(each.state_dict(), allow_other_data=True)
    assert fresh.position == 6


def test_a_position_of_an_earlier_version_is_refused(dataset: TokenDataset) -> None:
    old: Any = {"epoch": 0, "global_batch": 3, "global_batch_size": 8, "seed": 0, "seq_len": SEQ_LEN}
    with pytest.raises(ValueError, match="position in the data from an earlier version; give --allow_other"):
        loader(dataset, batch=2, rank=0, world=1).load_state_dict(old)


@pytest.mark.parametrize("size", [1, 3, 4, 6, 12, 50])
def test_another_global_batch_goes_on_exactly_at_the_position(dataset: TokenDataset, size: int) -> None:
    before = loader(dataset, batch=4, rank=0, world=1)
    for _ in range(30):
        before.next_global_batch()
    after = loader(dataset, batch=size, rank=0, world=1)
    after.load_state_dict(before.state_dict())
    assert after.position == 120
    following = [sample for _ in range(13) for sample in firsts(before.next_global_batch())]
    assert firsts(after.next_global_batch()) == following[:size]
    assert after.position == 120 + size
    assert after.timetable.position_after(33) == 120 + 3 * size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0, "rank": 0, "world": 1}, "batch_size is 0"),
        ({"batch": 1, "rank": 2, "world": 2}, "rank is 2; it must be between 0 and 1"),
        ({"batch": 1, "rank": 0, "world": 1, "seed": -1}, "seed is -1"),
    ],
)
def test_impossible_arguments_are_refused(
    dataset: TokenDataset, arguments: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loader(dataset, **arguments)


@pytest.mark.parametrize("max_batches", [None, 4])
def test_validation_covers_the_same_samples_on_any_number_of_ranks(
    dataset: TokenDataset, max_batches: int | None
) -> None:
    def seen(world: int) -> list[list[int]]:
        return [
            firsts(list(validation_batches(Mixture.of(dataset), SEQ_LEN, 10, rank, world, max_batches)))
            for rank in range(world)
        ]

    [alone] = seen(1)
    assert alone == sorted(alone)
    assert len(set(alone)) == len(alone) == (99 if max_batches is None else 40)
    for world in (2, 3, 7):
        parts = seen(world)
        assert sorted(sample for part in parts for sample in part) == alone


def test_a_validation_split_without_a_sample_is_refused(make_dataset: MakeDataset) -> None:
    dataset = TokenDataset(make_dataset([100], [SEQ_LEN]), "validation")
    with pytest.raises(
        ValueError, match=r"the validation split of .* holds 7 tokens; one sample of 7 needs 8"
    ):
        validation_batches(Mixture.of(dataset), SEQ_LEN, 1)
