"""A `Scorer` as a model of lm-evaluation-harness 0.4.13 (https://github.com/EleutherAI/lm-evaluation-harness)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama_ray.data.chat.template import ChatPrompt
from llama_ray.evaluation.results import EvaluationError
from llama_ray.evaluation.scoring import Generation, Report, Scored, Scorer, Scoring, no_report
from llama_ray.generation.sampling.params import SamplingParams
from llama_ray.utils.fields import shown

_MAX_GEN_TOKS = 256
"""What lm_eval's own models generate at most, for tasks that do not say."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_KNOWN = ("do_sample", "until", "max_gen_toks", *_SAMPLING)


class HarnessModel(TemplateLM):
    """A model of lm_eval, with the numbers of its own `hf` model.

    Texts are encoded as transformers does it: the tokenizer adds bos where it says so, unless the text has it already,
    and special tokens in a text are tokens, as chat templates need it.
    """

    def __init__(self, scorer: Scorer, report: Report = no_report, seed: int = 0) -> None:
        """Answer with `scorer`; `seed` is that of tasks that sample."""
        super().__init__()
        self._scorer, self._report, self._seed = scorer, report, seed
        self._tokenizer = scorer.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self._tokenizer.eos_id is None:
            raise EvaluationError("the tokenizer has no eos; name it in its tokenizer_config.json")
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: bos, or eos where there is none."""
        bos = self._tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The model's limit, in tokens."""
        return self._scorer.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """What distinguishes chat templates and tokenizers."""
        return self._tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template's source, for lm_eval's records."""
        template = self._tokenizer.chat_template
        if not chat_template or template is None:
            return ""
        name = chat_template if isinstance(chat_template, str) else "default"
        return template.templates.get(name, "")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the checkpoint's template writes it."""
        prompt = ChatPrompt(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return self._tokenizer.render_chat(prompt).text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text."""
        if add_special_tokens is None:
            prefix = self._tokenizer.decode([self.prefix_token_id], skip_special=False)
            add_special_tokens = not (prefix and string.startswith(prefix))
        return self._tokenizer.encode_prompt(
            string, add_special_tokens=add_special_tokens, parse_special=True
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See `lm_eval.api.model.LM`."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scorings = [self._scoring(context, continuation) for _, context, continuation in requests]
        return [_joined(scored) for scored in self._scorer.score(scorings, self._report)]

    def _scoring(self, context: list[int], continuation: list[int]) -> Scoring:
        # What is too long loses its beginning, as in lm_eval. The last token is no input.
        tokens = (context + continuation)[-(self.max_length + 1) :]
        if not 0 < len(continuation) < len(tokens):
            raise EvaluationError(
                f"a continuation has {len(continuation)} tokens; it must have 1 to {self.max_length}, the model's limit"
            )
        return Scoring(tuple(tokens), len(tokens) - len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """See `lm_eval.api.model.LM`."""
        scorings: list[Scoring] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                scorings.append(self._scoring(*make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, scored in zip(owners, self._scorer.score(scorings, self._report), strict=True):
            sums[number] += math.fsum(scored.logprobs)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """See `lm_eval.api.model.LM`."""
        generations = [self._generation(number, *request.args) for number, request in enumerate(requests)]
        return self._scorer.generate(generations, self._report)

    def _generation(self, number: int, context: str, gen_kwargs: dict[str, Any]) -> Generation:
        values = normalize_gen_kwargs(gen_kwargs, _MAX_GEN_TOKS)
        if unknown := sorted(set(values) - set(_KNOWN)):
            raise EvaluationError(
                f"generation_kwargs of a task has {unknown[0]}, {shown(values[unknown[0]])}; it must be one of "
                f"{', '.join(_KNOWN)}; change it in a copy of the task (--include_path)"
            )
        max_tokens = int(values["max_gen_toks"])
        room = self.max_length - max_tokens
        if room < 1:
            raise EvaluationError(
                f"a task generates {max_tokens} tokens; with a prompt they must fit in {self.max_length}, the model's "
                "limit; set max_gen_toks of its generation_kwargs in a copy (--include_path)"
            )
        eos = self._tokenizer.decode([self.eot_token_id], skip_special=False)
        until = [text for text in handle_stop_sequences(values.get("until"), eos=eos) if text and text != eos]
        sampled = {name: values[name] for name in _SAMPLING if name in values} if values["do_sample"] else {}
        params = SamplingParams(
            max_tokens=max_tokens,
            stop=tuple(dict.fromkeys(until)),
            # Other numbers for each request and each seed.
            seed=((self._seed << 32) + number) % 2**63,
            **{"temperature": 0.0, **sampled},
        )
        return Generation(tuple(self.tok_encode(context)[-room:]), params)


def _joined(scored: Scored) -> tuple[float, bool]:
    return math.fsum(scored.logprobs), all(scored.greedy)
