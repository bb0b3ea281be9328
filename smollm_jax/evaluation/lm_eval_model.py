"""SmolLM2 as a model of EleutherAI's lm-evaluation-harness: its requests, answered by our engine and `loglikelihood`.

Encoding, truncation and what counts as greedy are those of the harness's own `hf` model, so that scores compare with
published ones. Needs the extra "eval". Source: lm_eval, models/huggingface.py (HFLM) and api/model.py (TemplateLM).
"""

import json
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import Progress, track

from smollm_jax.data.bad_text import BadTextHandler, Policy
from smollm_jax.errors import UsageError, short_repr
from smollm_jax.evaluation.loglikelihood import Request, score
from smollm_jax.generation.engine import Engine
from smollm_jax.generation.sampling import Sampling

GENERATE_ROWS = 16  # texts written at once
NEW_TOKENS = 256  # where a task says nothing, as in `hf`


class SmolLMHarness(TemplateLM):
    """The harness's view of an engine. `seed`: of tasks that sample.

    `on_bad_text`: what becomes of a character that the vocabulary has no bytes for. "stop" is an error; "skip" leaves
    out those bytes, which is what `tokenizers` and so `hf` does without a word; "replace" puts U+FFFD. `bad_texts`
    counts the texts that were changed so.
    """

    def __init__(
        self, engine: Engine, *, name: str = "", seed: int = 0, quiet: bool = False, on_bad_text: Policy = "stop"
    ):
        super().__init__()
        self.engine, self.name, self.seed, self.quiet = engine, name, seed, quiet
        self.on_bad_text: Policy = on_bad_text
        self.bad_texts = 0
        begin, end = engine.config.bos_token_id, engine.config.eos_token_ids
        if not end:
            raise UsageError("the config names no eos token, which ends the texts of the harness")
        self._prefix = end[0] if begin is None else begin

    @property
    def eot_token_id(self) -> int:
        return self.engine.config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def max_length(self) -> int:
        return self.engine.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Token ids; a special token in a task's text is one, and the post-processor adds its own, as in `hf`.

        It adds none to a text that begins with the token that begins texts: a chat template may have written it.
        """
        tokenizer = self.engine.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(tokenizer.decode([self.prefix_token_id]))
        if self._is_bad(string) and self.on_bad_text == "skip":
            tokenizer.core.encode_special_tokens = False
            return tokenizer.core.encode(_without_surrogates(string), add_special_tokens=add_special_tokens).ids
        return tokenizer.encode(self._replaced(string), parse_special=True, add_special_tokens=add_special_tokens)

    def _is_bad(self, text: str) -> bool:
        """Whether a text of a task has characters without tokens, which is counted; `UsageError` if it is to stop."""
        if not (reason := self.engine.tokenizer.unencodable(text)):
            return False
        if self.on_bad_text == "stop":
            skip = "--on-bad-text skip leaves such characters out, as the harness's hf does"
            raise UsageError(f"a text of the task cannot be encoded: {reason}; {skip}")
        self.bad_texts += 1
        return True

    def _replaced(self, text: str) -> str:
        """A text of a task whose characters without tokens, if any, are U+FFFD."""
        unencodable = self.engine.tokenizer.unencodable
        return BadTextHandler("replace", unencodable).replace(text, "a text of the task") if unencodable(text) else text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's own, which has only one."""
        return self.engine.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model reads."""
        tokenizer, messages = self.engine.tokenizer, []
        for message in chat_history:
            content = message["content"]
            if self._is_bad(content):
                lacks = tokenizer.unencodable
                skip = self.on_bad_text == "skip"
                content = "".join(c for c in content if not lacks(c)) if skip else self._replaced(content)
            messages.append(message | {"content": content})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return tokenizer.decode(ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability and greediness of continuations; a context too long loses its beginning."""
        cut = []
        for _strings, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise UsageError(f"a continuation of {len(continuation)} tokens exceeds the context")
            cut.append(Request(tuple(context[-room:]), tuple(continuation)))
        with Progress(console=self._console(disable_tqdm), transient=True) as bar:
            task = bar.add_task("scoring", total=sum(len(request.continuation) for request in cut))
            scores = score(self.engine.model, cut, progress=lambda tokens: bar.advance(task, tokens))
        answers = [(one.logprob, one.is_greedy) for one in scores]
        for (strings, _context, _continuation), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of the context that do not overlap."""
        owners, windows = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                owners.append(number)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first of a task's stop strings, greedy unless the task says otherwise."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        ids = [self.tok_encode(request.args[0]) for request in requests]
        batches = [
            ordered[i : i + GENERATE_ROWS]
            for numbers in groups.values()
            for ordered in [sorted(numbers, key=lambda number: -len(ids[number]))]
            for i in range(0, len(ordered), GENERATE_ROWS)
        ]
        texts = [""] * len(requests)
        for batch in track(batches, "generating", console=self._console(disable_tqdm), transient=True):
            asked = requests[batch[0]].args[1]
            sampling, until, most = self._asked(asked)
            prompts = [ids[number][-(self.max_length - most) :] or [self.prefix_token_id] for number in batch]
            stop = tuple(dict.fromkeys(filter(None, until)))
            whole = self.engine.complete(prompts, max_new_tokens=most, sampling=sampling, stop=stop)
            for number, one in zip(batch, whole, strict=True):
                # As `hf` reads its tokens: without special ones, and cut at the stop strings after that.
                text = self.engine.tokenizer.core.decode([token.id for token in one.tokens], skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, stop=[*stop, self._end], think_end_token=None)
                self.cache_hook.add_partial("generate_until", (requests[number].args[0], asked), texts[number])
        return texts

    def _console(self, disable: bool) -> Console:
        """Where the progress is shown."""
        return Console(stderr=True, quiet=self.quiet or disable)

    @property
    def _end(self) -> str:
        return self.engine.tokenizer.decode([self.eot_token_id])

    def _asked(self, gen_kwargs: dict[str, Any]) -> tuple[Sampling, list[str], int]:
        """A task's way of sampling, its stop strings and how many tokens; raises `UsageError` for what is not known."""
        rest: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, NEW_TOKENS))
        until, most = handle_stop_sequences(rest.pop("until", None), eos=None), rest.pop("max_gen_toks")
        if most >= self.max_length:
            raise UsageError(f"a task asks for {most} new tokens, the context is {self.max_length}")
        sampled = rest.pop("do_sample", False)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        # As in transformers, a penalty of the weights' generation_config.json counts in a greedy answer too.
        own = self.engine.generation.sampling["repetition_penalty"]
        numbers = {"repetition_penalty": own} | {name: rest.pop(name) for name in names if name in rest}
        if rest:
            raise UsageError(f"a task's generation_kwargs are not known: {short_repr(rest)}")
        if not sampled:
            numbers |= {"temperature": 0.0}
        return Sampling(**numbers, seed=self.seed), until, most


def _without_surrogates(text: str) -> str:
    """A text without halves of surrogate pairs, which `tokenizers` refuses."""
    return text.encode(errors="ignore").decode()
