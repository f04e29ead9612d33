"""JSON of completion chunks, written by hand: a stream has one for each token, and pydantic takes ten times as long."""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring, encode_basestring_ascii

from serve_app.protocol.completions import CompletionResponse
from serve_app.streams.messages import ChoiceDelta, Logprobs, PromptToken


class ChunkWriter:
    """Writes the server-sent events of one response whose common fields are those of `empty`.

    With `usage` every chunk has `"usage": null`, as in OpenAI's streams that end with the counts. With `token_ids` it
    has the ids of its tokens.
    """

    def __init__(self, empty: CompletionResponse, *, usage: bool, token_ids: bool = False) -> None:
        common = empty.model_dump_json(exclude={"choices", "usage"}).removesuffix("}")
        self._head = f'data: {common},"choices":['.encode()
        self._tail = b',"usage":null}\n\n' if usage else b"}\n\n"
        self._token_ids = token_ids

    def chunk(
        self, delta: ChoiceDelta, prompt_ids: Sequence[int] | None = None, usage: str | None = None
    ) -> bytes:
        """Return the event for what was added to one choice; `usage` is JSON."""
        choice = _choice(delta)
        if self._token_ids:
            choice += f',"token_ids":{_json(delta.token_ids)}'.encode()
        if prompt_ids is not None:
            choice += f',"prompt_token_ids":{_json(prompt_ids)}'.encode()
        if delta.prompt_logprobs is not None:
            choice += f',"prompt_logprobs":{_prompt_logprobs(delta.prompt_logprobs)}'.encode()
        tail = self._tail if usage is None else f',"usage":{usage}}}\n\n'.encode()
        return self._head + choice + b"}]" + tail


def _choice(delta: ChoiceDelta) -> bytes:
    """Return the fields that every choice has; the object is still open."""
    finish = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
    head = f'{{"index":{delta.index},"text":'.encode()
    reason = b',"stop_reason":null' if delta.stop_reason is None else _stop_reason(delta.stop_reason)
    return (
        head
        + json_text(delta.text)
        + f',"logprobs":{_logprobs(delta.logprobs)},"finish_reason":{finish}'.encode()
        + reason
    )


def _stop_reason(reason: str | int) -> bytes:
    return b',"stop_reason":' + (json_text(reason) if isinstance(reason, str) else str(reason).encode())


def json_text(text: str) -> bytes:
    """Return a text as JSON."""
    try:
        return encode_basestring(text).encode()
    except UnicodeEncodeError:
        # An echoed prompt may hold lone surrogates.
        return encode_basestring_ascii(text).encode()


def _logprobs(logprobs: Logprobs | None) -> str:
    return "null" if logprobs is None else _json(vars(logprobs))


def _prompt_logprobs(tokens: Sequence[PromptToken]) -> str:
    return _json(
        [
            None,
            *(
                {
                    id: {"logprob": logprob, "rank": rank, "decoded_token": text}
                    for id, logprob, rank, text in entries
                }
                for entries in tokens
            ),
        ]
    )


def json_bytes(value: object) -> bytes:
    """Return a value as JSON."""
    return _json(value).encode()


def _json(value: object) -> str:
    # NaN and infinity are no JSON.
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
