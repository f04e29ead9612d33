"""What a version must do before it answers requests: encode and decode text, predict a text, and give a token."""

from __future__ import annotations

import math
import statistics
import time

from llama_ray.data.tokenizing.token_bytes import keeps_all_text
from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.generation.completion import Completion, GenerationError
from llama_ray.generation.engine import Engine
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.generation.scheduling.sequence import Delta
from llama_ray.utils.panics import panics_as_errors

MIXED_TEXT = (
    'def greet(name: str) -> str:\n\treturn f"Hello, {name}!"  # 2 spaces, a tab\r\n\r\n'
    "Zwölf Boxkämpfer jagen Viktor — naïve café, ¿qué? Съешь ещё 漢字かな交じり文 한국어 العربية हिन्दी ไทย\n"
    '∑ x² ≤ 10⁻³ € “quotes” … 🙂 👩‍👩‍👧 🏳️‍🌈\n    {"key": [1, 2.5e-3, null]}\n'
)
"""Unicode, code and whitespace, for the tokenizer."""
PLAIN_TEXT = (
    "the sun was low and the road was long when the two of them came down from the hill to the old house by the river "
    "and there was no one at the door so they went in and sat at the table and waited for the rain to end and for the "
    "others to come home as they had said they would before the night"
)
"""Words that any tokenizer of text knows, for the model, too."""
LOSS_TOKENS = 256
"""Tokens of the text that the model predicts, at most."""
NEW_TOKENS = 4


class GateError(ValueError):
    """A version that must not answer requests; the message is one line with the reason."""


@panics_as_errors()
def check(engine: Engine, timeout_s: float) -> float:
    """Return the engine's loss on a bundled text, in nats per token, or raise GateError.

    Nothing else may use the engine meanwhile. Fails a step that ends later than `timeout_s` after the start; a step
    that never ends is the caller's to notice.
    """
    if engine.tokenizer is None:
        raise GateError("there is no tokenizer, which answering with text needs; add tokenizer.json")
    check_tokenizer(engine.tokenizer)
    completion = _complete(engine, timeout_s)
    # A context of two tokens has no room for a prompt's second token.
    measured = completion.prompt_logprobs or completion.logprobs or []
    loss = -statistics.fmean(entry.logprob for entry in measured)
    if not math.isfinite(loss):
        raise GateError(
            f"the loss of a plain text is {loss}; it must be finite; train or convert the model again"
        )
    return loss


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise GateError unless text that is encoded and decoded stays the same, as far as the tokenizer keeps it.

    Some tokenizers normalise text, such as write it in lower case, or drop characters that they do not know. But words
    remain, and what comes back once comes back again.
    """
    for text in (PLAIN_TEXT, MIXED_TEXT):
        once = tokenizer.decode(tokenizer.encode(text))
        if once == text:
            continue
        lost_words = text == PLAIN_TEXT and once.casefold().split() != text.split()
        if lost_words or keeps_all_text(tokenizer.to_json()):
            raise _changed(text, once)
        again = tokenizer.decode(tokenizer.encode(once))
        if again.split() != once.split():
            raise _changed(once, again)


def _changed(before: str, after: str) -> GateError:
    """Return the error of a text that came back as another one, with the place where they begin to differ."""
    pairs = zip(before, after, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(after)))
    start = max(0, same - 5)
    return GateError(
        f"the tokenizer makes {after[start : start + 20]!r} of {before[start : start + 20]!r}: its vocabulary or its "
        "decoder is incomplete; give the tokenizer.json that the model was trained with"
    )


def _complete(engine: Engine, timeout_s: float) -> Completion:
    """Predict the plain text and a few tokens more, greedily."""
    assert engine.tokenizer is not None
    deadline = time.monotonic() + timeout_s
    new = min(NEW_TOKENS, engine.max_seq_len - 1)
    prompt = engine.tokenizer.encode_prompt(PLAIN_TEXT)[: max(1, min(LOSS_TOKENS, engine.max_seq_len - new))]
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    deltas: list[Delta] = []
    request_id = engine.submit(prompt, params)
    try:
        while engine.has_work:
            deltas += engine.step()
            if time.monotonic() > deadline:
                raise too_slow(timeout_s)
        return Completion.of(deltas, prompt)
    except GenerationError as error:
        raise GateError(str(error)) from error
    finally:
        engine.abort(request_id)


def too_slow(timeout_s: float) -> GateError:
    """Return the error of a version that has not answered in time."""
    return GateError(
        f"no answer to a prompt of {LOSS_TOKENS} tokens came within gate_timeout_s, {timeout_s:g} s; "
        "raise gate_timeout_s if the machine is slow"
    )
