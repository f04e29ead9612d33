from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_ray.data.tokenizing.encoder import DocumentEncoder
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from tests.data.helpers import ANY_TEXT, BYTE_FALLBACK, OURS


@pytest.mark.parametrize("tokenizer", [OURS, BYTE_FALLBACK], ids=["byte_level", "byte_fallback"])
@given(texts=st.lists(ANY_TEXT, max_size=5))
def test_documents_stand_one_after_the_other_between_bos_and_eos(
    tokenizer: Tokenizer, texts: list[str]
) -> None:
    ids, lengths = DocumentEncoder(tokenizer).encode(texts)
    assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)
    documents = [document.tolist() for document in np.split(ids, np.cumsum(lengths))[:-1]]
    assert documents == [tokenizer.encode(text, bos=True, eos=True) for text in texts]
