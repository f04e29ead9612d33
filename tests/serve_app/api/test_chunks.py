"""Chunks that are written by hand: they are what pydantic would write."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from serve_app.api.chunks import ChunkWriter
from serve_app.protocol.completions import Choice, CompletionResponse, prompt_logprobs
from serve_app.protocol.sampling import Usage
from serve_app.streams.messages import ChoiceDelta, Logprobs

EMPTY = CompletionResponse(
    id="cmpl-1", created=5, model='a "quoted"\nname', system_fingerprint="models:/ü/7", choices=[]
)
TEXTS = st.text(st.characters(codec="utf-8"))
FLOATS = st.floats(-1e30, 0)
LOGPROBS = st.builds(
    Logprobs,
    st.lists(TEXTS, max_size=2),
    st.lists(st.none() | FLOATS, max_size=2),
    st.lists(st.none() | st.dictionaries(TEXTS, FLOATS, max_size=2), max_size=2),
    st.lists(st.integers(0, 9), max_size=2),
)
ENTRIES = st.lists(
    st.tuples(st.integers(0, 9), FLOATS, st.none() | st.integers(1, 9), st.none() | TEXTS), max_size=2
)
DELTAS = st.builds(
    ChoiceDelta,
    st.integers(0, 127),
    TEXTS,
    st.lists(st.integers(0, 9), max_size=2),
    st.none() | LOGPROBS,
    st.sampled_from([None, "stop", "length", "constraint"]),
    st.none() | TEXTS | st.integers(0, 9),
    st.none() | st.lists(ENTRIES, max_size=2),
)
COUNTS = st.none() | st.builds(Usage.of, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))


@given(DELTAS, st.booleans(), st.booleans(), st.none() | st.lists(st.integers(0, 9), max_size=2), COUNTS)
def test_a_chunk_holds_what_pydantic_would_write(
    delta: ChoiceDelta, usage: bool, token_ids: bool, prompt_ids: list[int] | None, counts: Usage | None
) -> None:
    writer = ChunkWriter(EMPTY, usage=usage, token_ids=token_ids)
    chunk = writer.chunk(delta, prompt_ids, counts and counts.model_dump_json()).decode()
    assert chunk.startswith("data: ")
    assert chunk.endswith("\n\n")
    assert "\n" not in chunk[:-2]
    choice = Choice(
        index=delta.index,
        text=delta.text,
        logprobs=delta.logprobs,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
        token_ids=delta.token_ids if token_ids else None,
        prompt_token_ids=prompt_ids,
        prompt_logprobs=None if delta.prompt_logprobs is None else prompt_logprobs(delta.prompt_logprobs),
    )
    want = EMPTY.model_copy(update={"choices": [choice], "usage": counts})
    exclude = None if usage or counts else {"usage"}
    assert json.loads(chunk.removeprefix("data: ")) == json.loads(want.model_dump_json(exclude=exclude))


def test_half_of_a_surrogate_pair_is_written_as_an_escape() -> None:
    delta = ChoiceDelta(0, "a\ud800", [], None, "stop", "\ud800")
    chunk = ChunkWriter(EMPTY, usage=False).chunk(delta).decode()
    [choice] = json.loads(chunk.removeprefix("data: "))["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("a\ud800", "\ud800")
