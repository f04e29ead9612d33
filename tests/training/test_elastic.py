import pytest

from llama_ray.data.mixtures.stages import Segment
from llama_ray.training.config import TrainConfig
from llama_ray.training.elastic import check_range, check_segments, for_layout, for_workers
from llama_ray.training.parallel.layout import Layout


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6, 8])
def test_the_global_batch_is_the_same_for_any_number_of_workers(workers: int) -> None:
    config = TrainConfig(batch_size=6, gradient_accumulation_steps=1)
    shared = for_workers(config, workers, planned=8)
    assert shared.batch_size * shared.gradient_accumulation_steps * workers == 48
    assert shared.batch_size <= 6


def test_the_planned_number_of_workers_leaves_the_configuration_as_it_is() -> None:
    config = TrainConfig(batch_size=6, gradient_accumulation_steps=5)
    assert for_workers(config, 4, planned=4) == config


def test_a_range_with_a_number_that_does_not_divide_the_batch_is_refused() -> None:
    config = TrainConfig(batch_size=4)
    check_range(TrainConfig(batch_size=3), 2, 4)
    with pytest.raises(
        ValueError, match=r"2..4 includes 3, .* global batch of 16 sequences; 2, 4 would work"
    ):
        check_range(config, 2, 4)


def test_a_range_must_share_the_steps_of_every_stage() -> None:
    """Short sequences can be shared by more workers than there are windows."""
    check_segments([Segment(1, 12, 32, {}), Segment(9, 3, 8, {})], 32, 2, 4)
    with pytest.raises(ValueError, match=r"includes 4, .* of 6 sequences from step 9 on; 2, 3 would work"):
        check_segments([Segment(1, 12, 32, {}), Segment(9, 3, 16, {})], 32, 2, 4)


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_a_validation_keeps_its_sequences_up_to_a_batch(workers: int) -> None:
    config = TrainConfig(batch_size=6, validation_batches=50)
    shared = for_workers(config, workers, planned=8)
    assert 0 <= shared.validation_batches * shared.batch_size - 300 < shared.batch_size
    assert for_workers(TrainConfig(validation_batches=0), workers, planned=8).validation_batches == 0


@pytest.mark.parametrize("asked", [1, 2])
@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_parallelism_that_auto_picks_keeps_the_global_batch(asked: int, tensor: int) -> None:
    config = TrainConfig(batch_size=3, gradient_accumulation_steps=2, tensor_parallel=asked)
    layout = Layout(1, 8 // tensor, tensor, "picked")
    taken = for_layout(config, layout)
    sequences = taken.batch_size * taken.gradient_accumulation_steps * layout.data_world
    assert sequences == 3 * 2 * 8 // asked
