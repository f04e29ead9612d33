"""A model behind any OpenAI-compatible endpoint that answers an evaluation's requests."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from llama_ray.data.tokenizing.tokenizer import Tokenizer
from llama_ray.evaluation.results import EvaluationError
from llama_ray.evaluation.scoring import Generation, Report, Scored, Scoring, no_report
from llama_ray.utils.errors import first_line, printable
from llama_ray.utils.fields import shown
from llama_ray.utils.redact import redact

T = TypeVar("T")
R = TypeVar("R")

_TIMEOUT_S = 600.0
_ATTEMPTS, _FIRST_WAIT_S, _LONGEST_WAIT_S = 8, 0.5, 30.0
_BUSY = (429, 502, 503, 504)
_LEAST_SEQ_LEN = 8


class EndpointScorer:
    """See `Scorer`: `/completions` with token ids, `echo` and `logprobs`, as OpenAI's first API has them."""

    def __init__(
        self,
        model: str,
        url: str,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int | None = None,
        api_key: str | None = None,
        concurrency: int = 32,
    ) -> None:
        """Ask for the model that the endpoint at `url` (`http://HOST:PORT/v1`) calls `model`.

        `tokenizer` must be the model's own; `max_seq_len` None takes what the endpoint says. Raises EvaluationError for
        an endpoint that does not answer, does not know the model, or does not report the log-probabilities of a prompt:
        scores would be those of chance.
        """
        self.model, self.tokenizer = f"{model} at {redact(url)}", tokenizer
        self._name, self._url = model, url.rstrip("/")
        self._api_key, self._concurrency = api_key, concurrency
        self.version = ""
        """What the endpoint says of the weights behind the name: `models:/NAME/3` here, a path in vLLM."""
        self._max_seq_len = self._look(max_seq_len)
        self._check()

    @property
    def max_seq_len(self) -> int:
        """See `Scorer`."""
        # The endpoint computes all tokens that it is given, and one more.
        return self._max_seq_len - 2

    def score(self, requests: Sequence[Scoring], report: Report = no_report) -> list[Scored]:
        """See `Scorer`."""
        return self._all(self._score, requests, report)

    def generate(self, requests: Sequence[Generation], report: Report = no_report) -> list[str]:
        """See `Scorer`."""
        return self._all(self._generate, requests, report)

    def _look(self, max_seq_len: int | None) -> int:
        """Return the longest input that the endpoint takes, in tokens."""
        models = self._send(self._request("models"), attempts=1)
        known = {m["id"]: m for m in models.get("data", ()) if isinstance(m, dict) and "id" in m}
        if self._name not in known:
            raise EvaluationError(
                f"{self._url} has no model {shown(self._name)}; give one of {printable(', '.join(map(str, known)))}"
            )
        self.version = str(known[self._name].get("root") or "")
        found = max_seq_len or known[self._name].get("max_model_len")
        if not isinstance(found, int) or found < _LEAST_SEQ_LEN:
            raise EvaluationError(
                f"the endpoint says that its model reads {shown(found)} tokens; give what it does as --max_seq_len"
            )
        return found

    def _check(self) -> None:
        probe = self.tokenizer.encode("The quick brown fox")[:4]
        first = self._score(Scoring(tuple(probe), 1))
        if not all(math.isfinite(value) and value <= 0 for value in first.logprobs):
            raise EvaluationError(f"{self.model} reports {first.logprobs}, which are no log-probabilities")

    def _score(self, request: Scoring) -> Scored:
        choice = self._choice(request.tokens, echo=True, logprobs=1, max_tokens=1, temperature=0)
        logprobs = choice.get("logprobs") or {}
        own, top = logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or []
        count = len(request.tokens)
        if not count <= len(own) <= count + 1 or len(top) < count or own[0] is not None:
            raise EvaluationError(
                f"{self.model} does not report the log-probabilities of a prompt of token ids (echo with logprobs gave "
                f"{len(own)} of {count} tokens); use an endpoint that does, such as this project's or vLLM's, or give "
                "the checkpoint"
            )
        places = range(request.start, count)
        try:
            values = tuple(float(own[place]) for place in places)
            greedy = tuple(own[place] >= max(top[place].values()) for place in places)
        except (TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(
                f"{self.model} reports log-probabilities of another form than OpenAI's ({first_line(error)})"
            ) from error
        return Scored(values, greedy)

    def _generate(self, request: Generation) -> str:
        params = request.params
        values: dict[str, Any] = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "stop": list(params.stop_strings) or None,
        }
        # What OpenAI's API lacks is sent only where it changes something.
        further = {"top_k": params.top_k, "min_p": params.min_p}
        values |= {name: value for name, value in further.items() if value}
        if params.repetition_penalty != 1:
            values["repetition_penalty"] = params.repetition_penalty
        return str(self._choice(request.tokens, **values)["text"])

    def _choice(self, tokens: Sequence[int], **fields: Any) -> dict[str, Any]:
        answer = self._send(
            self._request("completions", {"model": self._name, "prompt": list(tokens), **fields})
        )
        try:
            choice = answer["choices"][0]
        except (LookupError, TypeError) as error:
            raise EvaluationError(
                f"{self.model} answered {printable(json.dumps(answer))!r}; it must be a completion of OpenAI's API"
            ) from error
        return dict(choice)

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Request:
        headers = {"Content-Type": "application/json"}
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        return Request(f"{self._url}/{path}", None if body is None else json.dumps(body).encode(), headers)

    def _send(self, request: Request, attempts: int = _ATTEMPTS) -> Any:
        """Return the answer; one that is too busy or lost is asked for again, later each time."""
        wait = _FIRST_WAIT_S
        for attempt in range(1, attempts + 1):
            try:
                with urlopen(request, timeout=_TIMEOUT_S) as response:
                    return json.load(response)
            except HTTPError as error:
                if error.code not in _BUSY or attempt == attempts:
                    text = printable(error.read(4096).decode(errors="replace"))
                    raise EvaluationError(f"{self.model} answered {error.code}: {text}") from error
            except (HTTPException, OSError, ValueError) as error:
                if attempt == attempts or isinstance(error, ValueError):
                    raise EvaluationError(
                        f"no answer from {self.model} ({first_line(error)}); give the address as http://HOST:PORT/v1"
                    ) from error
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT_S)
        raise AssertionError

    def _all(self, ask: Callable[[T], R], requests: Sequence[T], report: Report) -> list[R]:
        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = [pool.submit(ask, request) for request in requests]
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    report(done, len(requests))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            return [future.result() for future in futures]
