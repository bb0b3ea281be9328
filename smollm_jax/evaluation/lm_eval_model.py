"""SmolLM2 as a model of EleutherAI's lm-evaluation-harness: our engine and `loglikelihood` answer its requests.

Encoding, truncation and greedy decoding match the harness's own `hf` model, so that scores are comparable with
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

GENERATE_BATCH = 16  # prompts of one batch
NEW_TOKENS = 256  # for tasks without max_gen_toks, as in `hf`


class SmolLMHarness(TemplateLM):
    """An engine as a harness model. `seed` is for tasks that sample.

    `on_bad_text` is for characters that the vocabulary cannot encode: "stop" raises, "skip" drops their bytes, as
    `tokenizers` and so `hf` do silently, "replace" replaces them by U+FFFD. `bad_texts` counts the changed texts.
    """

    def __init__(
        self, engine: Engine, *, name: str = "", seed: int = 0, quiet: bool = False, on_bad_text: Policy = "stop"
    ):
        super().__init__()
        self.engine, self.name, self.seed, self.quiet = engine, name, seed, quiet
        self.on_bad_text: Policy = on_bad_text
        self.bad_texts = 0
        bos, eos = engine.config.bos_token_id, engine.config.eos_token_ids
        if not eos:
            raise UsageError("the config has no eos_token_id, which lm-evaluation-harness needs")
        self._prefix = eos[0] if bos is None else bos

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
        """Token ids; special tokens in the text are parsed, and the post-processor adds its own, as in `hf`.

        It adds none if the text starts with the bos token, which a chat template may have written.
        """
        tokenizer = self.engine.tokenizer
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(tokenizer.decode([self.prefix_token_id]))
        if self._is_bad(string) and self.on_bad_text == "skip":
            tokenizer.core.encode_special_tokens = False
            ids = tokenizer.encodings([_without_surrogates(string)])[0].ids
            return [*tokenizer.prefix_ids, *ids, *tokenizer.suffix_ids] if add_special_tokens else ids
        return tokenizer.encode(self._replaced(string), parse_special=True, add_special_tokens=add_special_tokens)

    def _is_bad(self, text: str) -> bool:
        """Whether the vocabulary cannot encode a task's text; counts such texts, or raises `UsageError` for "stop"."""
        if not (reason := self.engine.tokenizer.unencodable(text)):
            return False
        if self.on_bad_text == "stop":
            hint = "--on-bad-text skip drops such characters, as the harness's hf model does"
            raise UsageError(f"a text of the task cannot be encoded: {reason}; {hint}")
        self.bad_texts += 1
        return True

    def _replaced(self, text: str) -> str:
        """A task's text with U+FFFD for each character that the vocabulary cannot encode."""
        unencodable = self.engine.tokenizer.unencodable
        return BadTextHandler("replace", unencodable).replace(text, "a text of the task") if unencodable(text) else text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's only chat template."""
        return self.engine.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation rendered as the text that the model reads."""
        tokenizer, messages = self.engine.tokenizer, []
        for message in chat_history:
            content = message["content"]
            if self._is_bad(content):
                if self.on_bad_text == "skip":
                    content = "".join(c for c in content if not tokenizer.unencodable(c))
                else:
                    content = self._replaced(content)
            messages.append(message | {"content": content})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
        return tokenizer.decode(ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability and greediness of continuations; a context that is too long is truncated on the left."""
        truncated = []
        for _strings, context, continuation in requests:
            longest = self.max_length + 1 - len(continuation)
            if longest < 1:
                raise UsageError(
                    f"a task's continuation of {len(continuation)} tokens exceeds the context of {self.max_length}"
                )
            truncated.append(Request(tuple(context[-longest:]), tuple(continuation)))
        with Progress(console=self._console(disable_tqdm), transient=True) as bar:
            task = bar.add_task("scoring", total=sum(len(request.continuation) for request in truncated))
            scores = score(self.engine.model, truncated, progress=lambda tokens: bar.advance(task, tokens))
        answers = [(result.logprob, result.is_greedy) for result in scores]
        for (strings, _context, _continuation), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in disjoint windows of the context's length."""
        request_ids, windows = [], []
        for request_id, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                request_ids.append(request_id)
                windows.append((None, *make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for request_id, (logprob, _) in zip(
            request_ids, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[request_id] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop string of their task, greedy unless the task samples."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        ids = [self.tok_encode(request.args[0]) for request in requests]
        batches = [
            ordered[i : i + GENERATE_BATCH]
            for numbers in groups.values()
            for ordered in [sorted(numbers, key=lambda number: -len(ids[number]))]
            for i in range(0, len(ordered), GENERATE_BATCH)
        ]
        texts = [""] * len(requests)
        for batch in track(batches, "generating", console=self._console(disable_tqdm), transient=True):
            gen_kwargs = requests[batch[0]].args[1]
            sampling, until, new_tokens = self._parse_gen_kwargs(gen_kwargs)
            prompts = [ids[number][-(self.max_length - new_tokens) :] or [self.prefix_token_id] for number in batch]
            stop = tuple(dict.fromkeys(filter(None, until)))
            completions = self.engine.complete(prompts, max_new_tokens=new_tokens, sampling=sampling, stop=stop)
            for number, completion in zip(batch, completions, strict=True):
                # As `hf` does: decode without special tokens, then cut at the stop strings.
                new_ids = [token.id for token in completion.tokens]
                text = self.engine.tokenizer.core.decode(new_ids, skip_special_tokens=True)
                texts[number] = postprocess_generated_text(text, stop=[*stop, self._end], think_end_token=None)
                self.cache_hook.add_partial("generate_until", (requests[number].args[0], gen_kwargs), texts[number])
        return texts

    def _console(self, disable: bool) -> Console:
        """Where the progress bar is shown."""
        return Console(stderr=True, quiet=self.quiet or disable)

    @property
    def _end(self) -> str:
        return self.engine.tokenizer.decode([self.eot_token_id])

    def _parse_gen_kwargs(self, gen_kwargs: dict[str, Any]) -> tuple[Sampling, list[str], int]:
        """A task's sampling, stop strings and number of new tokens; raises `UsageError` for unknown options."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, NEW_TOKENS))
        until, new_tokens = handle_stop_sequences(options.pop("until", None), eos=None), options.pop("max_gen_toks")
        if new_tokens >= self.max_length:
            raise UsageError(f"a task asks for {new_tokens} new tokens; the context is {self.max_length}")
        do_sample = options.pop("do_sample", False)
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        # As in transformers, a repetition penalty in generation_config.json also applies to greedy decoding.
        default = self.engine.generation.sampling["repetition_penalty"]
        numbers = {"repetition_penalty": default} | {name: options.pop(name) for name in names if name in options}
        if options:
            raise UsageError(f"a task has unknown generation_kwargs: {short_repr(options)}")
        if not do_sample:
            numbers |= {"temperature": 0.0}
        return Sampling(**numbers, seed=self.seed), until, new_tokens


def _without_surrogates(text: str) -> str:
    """A text without lone surrogates, which `tokenizers` rejects."""
    return text.encode(errors="ignore").decode()
