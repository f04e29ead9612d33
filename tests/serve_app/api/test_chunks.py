"""Chunks that are written by hand: they are what pydantic would write."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.chunks import ChunkWriter
from serve_app.protocol.completions import Choice, CompletionResponse
from serve_app.streams.messages import ChoiceDelta, Logprobs

EMPTY = CompletionResponse(
    id="cmpl-1", created=5, model='a "quoted"\nname', system_fingerprint="models:/ü/7", choices=[]
)
TEXTS = st.text(st.characters(codec="utf-8"))
LOGPROBS = st.builds(
    Logprobs,
    st.lists(TEXTS, max_size=2),
    st.lists(st.floats(-1e30, 0), max_size=2),
    st.lists(st.dictionaries(TEXTS, st.floats(-1e30, 0), max_size=2), max_size=2),
    st.lists(st.integers(0, 9), max_size=2),
)
DELTAS = st.builds(
    ChoiceDelta,
    st.integers(0, 127),
    TEXTS,
    st.just([1]),
    st.none() | LOGPROBS,
    st.sampled_from([None, "stop", "length", "constraint"]),
)


@given(DELTAS, st.booleans())
def test_a_chunk_holds_what_pydantic_would_write(delta: ChoiceDelta, usage: bool) -> None:
    chunk = ChunkWriter(EMPTY, usage=usage).chunk(delta).decode()
    assert chunk.startswith("data: ")
    assert chunk.endswith("\n\n")
    assert "\n" not in chunk[:-2]
    choice = Choice(
        index=delta.index, text=delta.text, logprobs=delta.logprobs, finish_reason=delta.finish_reason
    )
    want = EMPTY.model_copy(update={"choices": [choice]})
    exclude = None if usage else {"usage"}
    assert json.loads(chunk.removeprefix("data: ")) == json.loads(want.model_dump_json(exclude=exclude))


def test_half_of_a_surrogate_pair_is_written_as_an_escape() -> None:
    chunk = ChunkWriter(EMPTY, usage=False).chunk(ChoiceDelta(0, "a\ud800", [])).decode()
    assert json.loads(chunk.removeprefix("data: "))["choices"][0]["text"] == "a\ud800"
