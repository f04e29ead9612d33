"""Windows to batches, in the order of a mixture and divided among ranks; the position is a small state."""

from __future__ import annotations

from collections.abc import Sequence

from llama_ray.data.dataset.batch import Batch
from llama_ray.data.mixtures.mixture import Mixture, cut
from llama_ray.data.mixtures.order import Order
from llama_ray.data.mixtures.position import Position, difference
from llama_ray.data.mixtures.prefetch import Prefetch
from llama_ray.data.mixtures.stages import Segment, Stage, segments, share_of_worker
from llama_ray.data.mixtures.timetable import Timetable
from llama_ray.utils.integers import ceil_div


class Loader:
    """The batches of one rank, step after step.

    A step takes the windows `[p, p + n)` of the mixture's order, which depends on nothing but the seed, the sources and
    the stages up to p. Its global batch is their sequences: the windows, or equal parts of them in a stage of shorter
    sequences. Micro-step `m` of rank `r` takes block `m * world_size + r` of the sequences. So global batches hold the
    same sequences however they are divided among ranks and micro-steps, and no sample is left out: a global batch
    reaches over the end of an epoch.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        seq_len: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        gradient_accumulation_steps: int = 1,
        stages: Sequence[Stage] = (),
        prefetch: int = 0,
    ) -> None:
        """Start at the first global batch; `batch_size` is the number of windows per rank and micro-step.

        `seq_len` is that of a window, `stages` are what changes later. `prefetch` global batches are built ahead in a
        thread. Raises ValueError for an impossible argument and for stages that do not fit.
        """
        for name, value in (
            ("batch_size", batch_size),
            ("world_size", world_size),
            ("gradient_accumulation_steps", gradient_accumulation_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be between 0 and {world_size - 1}")
        self.mixture = mixture
        self.seq_len = seq_len
        """Tokens of a window."""
        self._batch_size = batch_size
        self._rank, self._world_size = rank, world_size
        self._seed = seed
        self._sources = mixture.sources(seq_len)
        windows = batch_size * world_size * gradient_accumulation_steps
        base = Segment(1, windows, seq_len, mixture.shares(seq_len))
        self._segments = segments(base, stages, mixture.names)
        self._prefetch = Prefetch(prefetch)
        self._step = 0
        self._timetable = Timetable(self._segments)
        self._order = self._order_of(self._timetable)

    @property
    def timetable(self) -> Timetable:
        """Which windows each step takes."""
        return self._timetable

    @property
    def windows_per_epoch(self) -> int:
        """Number of windows of the sources that the run uses, together."""
        used = {name for segment in self._segments for name in segment.shares}
        return sum(source.num_windows for source in self._sources if source.name in used)

    @property
    def windows_by_source(self) -> dict[str, int]:
        """Number of windows of each source."""
        return {source.name: source.num_windows for source in self._sources}

    @property
    def position(self) -> int:
        """Number of windows taken."""
        return self._timetable.position_after(self._step)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next window belongs to, from 0; of a mixture see `windows_per_epoch`."""
        return self.position // self.windows_per_epoch

    def epochs_by_source(self, position: int) -> dict[str, float]:
        """Return how often the windows of each source have been taken at `position`, on average."""
        counts = self._order.counts(position)
        return {
            source.name: count / source.num_windows if count else 0.0
            for source, count in zip(self._order.sources, counts, strict=True)
        }

    def next_global_batch(self) -> list[Batch]:
        """Return this rank's part of the next global batch, one entry a micro-step."""
        timetable, order, step = self._timetable, self._order, self._step + 1
        batches = self._prefetch.get(step, lambda step: self._build(timetable, order, step))
        self._step = step
        return batches

    def close(self) -> None:
        """End the thread that builds batches ahead."""
        self._prefetch.close()

    def state_dict(self) -> Position:
        """Return the position, equal on all ranks, to save in a checkpoint."""
        return {
            "step": self._step,
            "position": self.position,
            "windows_per_step": self._timetable.segment(max(self._step, 1)).windows,
            "seq_len": self.seq_len,
            "seed": self._seed,
            "sources": {
                source.name: {"data": dataset.fingerprint, "windows": source.num_windows}
                for source, dataset in zip(self._sources, self.mixture.datasets.values(), strict=True)
            },
            "stages": [
                {
                    "from_step": segment.from_step,
                    "position": start,
                    "seq_len": segment.seq_len,
                    "shares": dict(segment.shares),
                }
                for segment, start in zip(self._segments, self._timetable.starts, strict=True)
                if segment.from_step <= self._step
            ],
        }

    def load_state_dict(self, state: Position, *, allow_other_data: bool = False) -> bool:
        """Continue at the position `state`, exactly; return whether it is one in this data.

        The size of the global batch, the number of workers and the stages ahead may have changed. Another seed or
        seq_len, other data and other stages behind the position raise ValueError, but with `allow_other_data` the run
        begins at the first window, and goes on counting its steps.
        """
        reason = difference(state, self.state_dict(), self._segments)
        if reason is None:
            begun = [stage["position"] for stage in state["stages"]]
            self._go_to(Timetable(self._segments, state["step"], state["position"], begun))
            return True
        if not allow_other_data:
            raise ValueError(reason)
        return False

    def start_after(self, step: int) -> None:
        """Take the first window in the step after `step`."""
        begun = [0 for segment in self._segments if segment.from_step <= step]
        self._go_to(Timetable(self._segments, step, 0, begun))

    def sequences(self, segment: Segment) -> tuple[int, int]:
        """Return (sequences of a micro-batch, micro-steps) of a segment. Raises ValueError, see `share_of_worker`."""
        return share_of_worker(segment, self.seq_len, self._batch_size, self._world_size)

    def _go_to(self, timetable: Timetable) -> None:
        self._timetable, self._step = timetable, timetable.step
        self._order = self._order_of(timetable)
        self._prefetch.clear()

    def _order_of(self, timetable: Timetable) -> Order:
        return Order(self._sources, timetable.phases(), self._seed)

    def _build(self, timetable: Timetable, order: Order, step: int) -> list[Batch]:
        """Build this rank's part of a global batch; another thread may do it."""
        segment, first_window = timetable.segment(step), timetable.position_after(step - 1)
        micro_batch, micro_steps = self.sequences(segment)
        parts = self.seq_len // segment.seq_len
        batches = []
        for micro_step in range(micro_steps):
            first = (micro_step * self._world_size + self._rank) * micro_batch
            window, skipped = divmod(first, parts)
            count = ceil_div(skipped + micro_batch, parts)
            sources, windows = order.windows(first_window + window, count)
            whole = self.mixture.windows(sources, windows, self.seq_len)
            batches.append(cut(whole, segment.seq_len, skipped, micro_batch))
        return batches
