"""What a run is trained on, as MLflow and people are told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llama_ray.data.dataset.info import SPLITS, DatasetInfo
from llama_ray.data.mixtures.loader import Loader
from llama_ray.data.mixtures.opening import read_infos
from llama_ray.data.mixtures.sources import DataSource
from llama_ray.data.mixtures.stages import Segment
from llama_ray.data.mixtures.weights import WHOLE
from llama_ray.storage.paths import is_uri
from llama_ray.tracking.runs import Run


@dataclass(frozen=True)
class RunData:
    """The sources of a run, what their datasets hold by the name of the source, and the run's segments."""

    sources: tuple[DataSource, ...]
    infos: Mapping[str, DatasetInfo]
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, sources: tuple[DataSource, ...], loader: Loader) -> RunData:
        """Return what the run of `loader` is trained on."""
        return cls(sources, read_infos(sources), tuple(loader.timetable.segments))

    @property
    def name(self) -> str:
        """Where the text comes from: in the words of the preparation, or the names of several sources."""
        if len(self.sources) == 1:
            return self.infos[self.sources[0].name].source
        return ", ".join(source.name for source in self.sources)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, the same for all sources."""
        return self.infos[self.sources[0].name].vocab_size

    @property
    def fingerprint(self) -> str:
        """Identifies the data; losses of validation can be compared where it is the same, whatever the weights."""
        fingerprints = [
            [source.name, self.infos[source.name].fingerprint, source.label] for source in self.sources
        ]
        if len(fingerprints) == 1 and self.sources[0].label is None:
            return self.infos[self.sources[0].name].fingerprint
        return hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest()

    def tokens(self, split: str, *names: str) -> int:
        """Return the number of tokens in the split of the named sources, by default all."""
        return sum(
            shard.tokens
            for source in self.sources
            if source.name in names or not names
            for shard in self.infos[source.name].splits[split]
            if source.label in (None, shard.source)
        )

    def share(self, name: str) -> float:
        """Return the share of a source in the samples of the first stage."""
        return self.segments[0].shares.get(name, 0) / WHOLE

    def params(self) -> dict[str, object]:
        """Return the parameters of the MLflow run that say what it is trained on."""
        if len(self.sources) == 1:
            return {"source": self.name}
        of_sources = {
            source.name: {"location": str(source), "share": round(self.share(source.name), 6)}
            for source in self.sources
        }
        # Below a name of their own: a source may be called "source".
        return {"source": self.name, "sources": of_sources}

    def log_to(self, run: Run) -> None:
        """Link each source to the run as a dataset of its own."""
        for source in self.sources:
            info = self.infos[source.name]
            run.log_dataset(
                info.source if len(self.sources) == 1 else source.name,
                fingerprint=info.fingerprint,
                source=str(source),
                sizes={f"{split}_tokens": self.tokens(split, source.name) for split in SPLITS},
            )


def same_for_workers(source: DataSource) -> str:
    """Return the location of `source` as workers in other directories find it."""
    return source.location if is_uri(source.location) else str(Path(source.location).resolve())
