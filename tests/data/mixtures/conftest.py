from __future__ import annotations

import pytest

from llama_ray.data.dataset.token_dataset import TokenDataset
from llama_ray.data.mixtures.mixture import Mixture
from tests.data.mixtures.runs import SIZES, WEIGHTS, WINDOW
from tests.token_data import write_documents


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Sources whose tokens say where they come from."""
    datasets = {}
    for number, (name, size) in enumerate(SIZES.items()):
        first = 1000 * number
        document = list(range(first, first + size * WINDOW + 1))
        directory = write_documents(tmp_path_factory.mktemp("data") / name, {"train": [[document]]})
        datasets[name] = TokenDataset(directory, "train")
    return Mixture(datasets, WEIGHTS)
