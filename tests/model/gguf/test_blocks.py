from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from llama_ray.model.gguf.blocks import FORMATS


@pytest.mark.parametrize("number", FORMATS, ids=lambda number: FORMATS[number].name)
def test_blocks_are_decoded_as_ggufs_own_reader_does_to_the_bit(number: int) -> None:
    kind, theirs = FORMATS[number], gguf.GGMLQuantizationType(number)
    assert (kind.name, (kind.values, kind.size)) == (theirs.name, gguf.GGML_QUANT_SIZES[theirs])
    blocks = np.random.default_rng(number).integers(0, 256, (500, kind.size), dtype=np.uint8)
    decoded = kind.decode(torch.from_numpy(blocks))
    # Some of the random scales are infinite or no numbers.
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(blocks.reshape(-1), theirs).reshape(-1, kind.values)
    assert decoded.dtype == kind.dtype
    np.testing.assert_array_equal(decoded.float().numpy(), expected)
