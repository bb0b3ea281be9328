"""Many texts at once: one thread owns the device, and texts join and leave its batch between two calls.

Each text has a slot of a `SlotCache`. Its prompt is read in chunks; between two chunks the other texts go on. Then all
slots decode together. The tokens of a text are those of `Engine.stream` for it alone, with the same seed.
Source of the design: google/JetStream (prefill, insert into a slot, decode all slots), and chunked prefill as in vLLM.
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from smollm_jax.errors import UsageError
from smollm_jax.generation import slot_programs as programs
from smollm_jax.generation.engine import Chunk, Engine, RowText, Token
from smollm_jax.generation.grammar import Matcher
from smollm_jax.generation.programs import DecodeOutput
from smollm_jax.generation.quantized import Quantized
from smollm_jax.generation.sampling import GREEDY, BatchedSampling, Sampling
from smollm_jax.generation.slot_programs import SlotSettings, SlotState
from smollm_jax.model.precision import without_tf32
from smollm_jax.model.slot_cache import SlotCache

# On a CPU a call costs little beside a token, and waiting texts join sooner.
CPU_TOKENS_PER_CALL, TOKENS_PER_CALL = 1, 8
PROMPT_TOKENS = 512  # read between two decode calls, so that running texts do not stall
MAX_SLOTS = 256
SMALLEST_COPY = 64  # tokens; to compute fewer takes no longer than to copy a slot


@dataclasses.dataclass(frozen=True)
class Job:
    """A text to generate; `prompt`, `max_new_tokens`, `sampling`, `stop` and `alternatives` as in `Engine.stream`."""

    prompt: Sequence[int]
    max_new_tokens: int  # 0: only the prompt's log-probabilities
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    alternatives: int | None = None
    prompt_alternatives: int | None = None  # None: no log-probabilities of the prompt's tokens
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    grammar: Matcher | None = None  # of the text; of this job only
    row: int = 0  # of its chunks


@dataclasses.dataclass(frozen=True)
class PromptTokens:
    """The tokens of a prompt with their log-probabilities, None for the first."""

    row: int
    tokens: tuple[Token, ...]


Event = PromptTokens | Chunk | Exception
Deliver = Callable[[Event], None]


class QueueFullError(Exception):
    """As many texts wait as may."""


class ClosedError(Exception):
    """The engine takes no more texts."""


class Ticket:
    """A submitted job, and where its events go. `deliver` is called in the engine's thread and must not block."""

    def __init__(self, job: Job, deliver: Deliver):
        self.job, self.deliver = job, deliver
        self.cancelled = False
        self.cached_tokens = 0  # of the prompt, that another text left in the cache

    def cancel(self) -> None:
        """Ends the text; its slot is free after the current device call. Nothing is delivered any more."""
        self.cancelled = True


class _Text:
    """A job in its slot."""

    def __init__(self, ticket: Ticket, engine: Engine, slot: int, number: int):
        job = ticket.job
        self.ticket, self.job, self.slot, self.number = ticket, job, slot, number
        self.began = False  # whether its prompt is read and its first token sampled
        self.text = RowText(engine, job.row, job.max_new_tokens, job.stop, job.alternatives)
        self.read = 0  # tokens of the prompt in the cache
        self.ids: list[int] = []  # of the text
        self.allowed: np.ndarray | None = None  # the tokens that its grammar allows next, a bit each
        self.prompt_tokens = [Token(job.prompt[0], engine.token_text(job.prompt[0]), None, ())]

    @property
    def wants_logprobs(self) -> bool:
        return self.job.alternatives is not None

    @property
    def cached(self) -> list[int]:
        """The tokens in the cache: of the prompt, and of the text all but the last."""
        return [*self.job.prompt[: self.read], *self.ids[:-1]]


class SlotEngine:
    """An engine for many texts at once. `submit` may be called from any thread; one thread runs the device."""

    def __init__(
        self, engine: Engine, *, slots: int, context: int, queue_size: int, tokens_per_call: int | None = None
    ) -> None:
        """At most `slots` texts run, of at most `context` tokens each, and `queue_size` more wait.

        Raises `UsageError` for a number that is not possible.
        """
        longest = engine.config.max_position_embeddings
        for name, value, most in (("slots", slots, MAX_SLOTS), ("context", context, longest)):
            if not 1 <= value <= most:
                raise UsageError(f"--{name} must be from 1 to {most:,}, got {value}")
        if queue_size < 1:
            raise UsageError(f"--queue-size must be at least 1, got {queue_size}")
        self.engine, self.context, self.queue_size = engine, context, queue_size
        self._row_counts = programs.row_counts(slots)
        per_call = CPU_TOKENS_PER_CALL if jax.default_backend() == "cpu" else TOKENS_PER_CALL
        self._tokens_per_call = tokens_per_call or per_call
        self._eos = tuple(map(int, engine.eos_token_ids))
        self._dtype = engine.model.embed_tokens.dtype
        self._words = -(-engine.config.vocab_size // 32)
        self._decode = programs.decode_quantized if isinstance(engine.decoder, Quantized) else programs.decode
        self._slots: list[_Text | None] = [None] * slots
        self._left: list[list[int]] = [[] for _ in range(slots)]  # tokens that an ended text left in each free slot
        self._last_used = [0] * slots  # number of the slot's last text
        self._queue: collections.deque[Ticket] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._admitted = 0  # texts so far
        self._thread = threading.Thread(target=self._run, name="slots", daemon=True)
        self._reset()

    @property
    def slot_count(self) -> int:
        """Texts that can run at once."""
        return len(self._slots)

    @property
    def running(self) -> int:
        """Texts that have a slot."""
        return sum(text is not None for text in self._slots)

    @property
    def waiting(self) -> int:
        """Texts that have none yet."""
        return len(self._queue)

    @property
    def cache_usage(self) -> float:
        """The share of the cache's tokens that running texts use."""
        used = sum(text.read + text.text.count for text in self._slots if text is not None)
        return used / (len(self._slots) * self.context)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> "SlotEngine":
        """Compiles all programs, or reads them from the cache, and starts the thread."""
        zero, one = np.int32(0), np.int32(1)
        with without_tf32(self._dtype):
            for size in programs.chunk_sizes(self._cache):
                tokens, no = np.zeros(size, np.int32), np.bool_(False)
                self._cache, logits, _ = programs.prefill(
                    self.engine.model, self._cache, zero, zero, tokens, one, tokens, no
                )
                self._begin(0, logits, Job([0], 1))
            self._cache = programs.copy_slot(self._cache, zero, zero)
            for rows in self._row_counts:
                jax.block_until_ready(self._call(rows, np.zeros(rows, bool), 1, False, self._all_allowed(rows)))
        self._thread.start()
        return self

    def check(self, job: Job) -> None:
        """Raises `UsageError` for a job that can never run."""
        size = len(job.prompt) + job.max_new_tokens
        if size > self.context:
            raise UsageError(
                f"a prompt of {len(job.prompt):,} tokens and {job.max_new_tokens:,} new ones exceed the context of "
                f"{self.context:,} tokens"
            )

    def submit(self, jobs: Sequence[Job], deliver: Deliver) -> list[Ticket]:
        """Queues all of these jobs or none of them; the `row` of an event names its job.

        Raises `QueueFullError` when they would be more than can wait, and `ClosedError` after `close`.
        """
        for job in jobs:
            self.check(job)
        tickets = [Ticket(job, deliver) for job in jobs]
        with self._changed:
            if self._closed:
                raise ClosedError
            free = len(self._slots) - self.running
            if len(self._queue) + len(jobs) > self.queue_size + free:
                raise QueueFullError
            self._queue.extend(tickets)
            self._changed.notify()
        return tickets

    def close(self, *, drain: bool = False, seconds: float | None = None) -> None:
        """Takes no more texts, and ends those that run and wait, or lets them finish with `drain`; waits `seconds`."""
        with self._changed:
            self._closed = True
            if not drain:
                for ticket in [*self._queue, *(text.ticket for text in self._slots if text is not None)]:
                    ticket.cancel()
            self._changed.notify()
        if self.alive:
            self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self.running:
                    if self._closed:
                        return
                    self._changed.wait()
            try:
                with without_tf32(self._dtype):
                    self._drop_cancelled()
                    self._admit()
                    self._read_prompts()
                    self._decode_texts()
            except Exception as error:  # a bug, or the device's memory: the texts of this batch are lost
                logging.getLogger(__name__).exception("the device failed")
                for text in filter(None, self._slots):
                    self._deliver(text.ticket, error)
                self._slots = [None] * len(self._slots)
                self._reset()

    def _reset(self) -> None:
        """Makes an empty cache and state."""
        config = self.engine.config
        self._left = [[] for _ in self._slots]
        self._cache = SlotCache.empty(config, len(self._slots), self.context, self._dtype)
        self._state = SlotState.empty(config, len(self._slots))

    def _drop_cancelled(self) -> None:
        for slot, text in enumerate(self._slots):
            if text is not None and text.ticket.cancelled:
                self._free(slot, text)
        with self._changed:
            if any(ticket.cancelled for ticket in self._queue):
                self._queue = collections.deque(ticket for ticket in self._queue if not ticket.cancelled)

    def _admit(self) -> None:
        """Gives the texts that have waited longest the free slots."""
        while None in self._slots:
            with self._changed:
                if not self._queue:
                    return
                ticket = self._queue.popleft()
            self._admitted += 1
            slot, cached = self._place(ticket.job)
            self._left[slot], self._last_used[slot] = [], self._admitted
            text = self._slots[slot] = _Text(ticket, self.engine, slot, self._admitted)
            text.read = ticket.cached_tokens = cached

    def _place(self, job: Job) -> tuple[int, int]:
        """The slot for a text, and how many tokens of its prompt are in it already.

        Another text may have left them in the slot, or they are copied from one that begins with the same tokens. A low
        slot is taken, because few slots decode faster; what it loses is kept in the slot that was used least recently.
        """
        free = [slot for slot, text in enumerate(self._slots) if text is None]
        rows = next(count for count in self._row_counts if count > free[0])
        low = [slot for slot in free if slot < rows]
        held = [self._left[slot] if text is None else text.cached for slot, text in enumerate(self._slots)]
        # At least the last token of the prompt is computed, for the logits after it.
        most = 0 if job.prompt_alternatives is not None else len(job.prompt) - 1
        common = [min(_common_prefix(tokens, job.prompt), most) for tokens in held]
        source = max(range(len(held)), key=lambda slot: (common[slot], slot in low))
        in_place = source in low and common[source] > 0
        last_used = self._last_used.__getitem__
        target = source if in_place else min((s for s in low if s != source), key=last_used, default=low[0])
        cached = common[source] if in_place or common[source] >= SMALLEST_COPY else 0
        lost = len(held[target]) - common[target]
        spare = min((s for s in free if s not in (source, target)), key=last_used, default=target)
        if lost >= SMALLEST_COPY and last_used(spare) < last_used(target):
            self._copy(target, spare)
            self._left[spare], self._last_used[spare] = held[target], last_used(target)
        if target != source and cached:
            self._copy(source, target)
            if source in free and cached == len(held[source]):
                self._last_used[source] = 0  # the target has all of it
        return target, cached

    def _copy(self, source: int, target: int) -> None:
        self._cache = programs.copy_slot(self._cache, np.int32(source), np.int32(target))

    def _free(self, slot: int, text: _Text) -> None:
        """Ends a text; what it has in the cache stays for texts that begin with the same tokens."""
        self._slots[slot], self._left[slot] = None, text.cached

    def _read_prompts(self) -> None:
        """Reads at least one chunk of prompts, as long as there are any, and begins the texts whose prompt is read."""
        budget = PROMPT_TOKENS
        while budget > 0 and (text := self._next_unread()) is not None:
            budget -= self._read_chunk(text)

    def _next_unread(self) -> _Text | None:
        unread = [text for text in self._slots if text is not None and not text.began]
        return min(unread, key=lambda text: text.number, default=None)

    def _read_chunk(self, text: _Text) -> int:
        """Reads the next part of a prompt; the number of tokens that were computed."""
        prompt, sizes = text.job.prompt, programs.chunk_sizes(self._cache)
        left = len(prompt) - text.read
        size = next((size for size in sizes if size >= left), sizes[-1])
        # At the end of the cache the chunk begins earlier, and some tokens are computed once more.
        start = min(text.read, self._cache.keys.shape[-1] - size)
        part = np.asarray(prompt[start : start + size], np.int32)
        targets = np.asarray(prompt[start + 1 : start + 1 + size], np.int32)
        wanted = text.job.prompt_alternatives is not None
        self._cache, logits, logprobs = programs.prefill(
            self.engine.model,
            self._cache,
            np.int32(text.slot),
            np.int32(start),
            _padded(part, size),
            np.int32(len(part)),
            _padded(targets, size),
            np.bool_(wanted),
        )
        if wanted:
            output = DecodeOutput(None, None, *(np.asarray(x)[None] for x in logprobs))
            for i in range(text.read - start, len(targets)):
                token = self.engine.token(int(targets[i]), output, (0, i), text.job.prompt_alternatives)
                text.prompt_tokens.append(token)
        text.read = start + len(part)
        if text.read == len(prompt):
            self._finish_prompt(text, logits)
        return size

    def _finish_prompt(self, text: _Text, logits: jax.Array) -> None:
        if text.job.prompt_alternatives is not None:
            self._deliver(text.ticket, PromptTokens(text.job.row, tuple(text.prompt_tokens)))
        text.began = True
        if text.job.max_new_tokens == 0:
            self._deliver(text.ticket, Chunk(text.job.row, "", (), "length"))
            self._free(text.slot, text)
            return
        output = self._begin(text.slot, logits, text.job)
        self._add(text, jax.tree.map(np.asarray, output), 0)

    def _begin(self, slot: int, logits: jax.Array, job: Job) -> DecodeOutput:
        """Puts a text into its slot and samples its first token."""
        vocabulary = self.engine.config.vocab_size
        seen, bias = np.zeros((1, vocabulary), bool), np.zeros((1, vocabulary), np.float32)
        seen[0, list(job.prompt)] = True
        for i, value in job.logit_bias.items():
            bias[0, i] = value
        penalties = (np.array([value], np.float32) for value in (job.frequency_penalty, job.presence_penalty))
        settings = SlotSettings(BatchedSampling.stack([job.sampling]), jnp.asarray(bias), *map(jnp.asarray, penalties))
        length, zero, remaining = (jnp.array([n], jnp.int32) for n in (len(job.prompt), 0, job.max_new_tokens))
        counts = jnp.zeros((1, vocabulary), jnp.int32)
        allowed = self._all_allowed(1)
        if job.grammar is not None:
            job.grammar.write_allowed(allowed[0])
        row = SlotState(length, zero, remaining, zero, jnp.asarray(seen), counts, settings)
        self._state, output = programs.begin(self._state, np.int32(slot), logits, row, allowed, eos=self._eos)
        return output

    def _decode_texts(self) -> None:
        """Decodes the texts whose prompt is read, in one call."""
        texts = [text for text in self._slots if text is not None and text.began and not text.ticket.cancelled]
        if not texts:
            return
        highest = max(text.slot for text in texts)
        rows = next(count for count in self._row_counts if count > highest)
        running = np.zeros(rows, bool)
        running[[text.slot for text in texts]] = True
        allowed = self._all_allowed(rows)
        constrained = [text for text in texts if text.job.grammar is not None]
        for text in constrained:
            allowed[text.slot] = text.allowed
        # What a grammar allows next is known only when a token is read.
        steps = 1 if constrained else self._tokens_per_call
        output = self._call(rows, running, steps, any(text.wants_logprobs for text in texts), allowed)
        output = jax.tree.map(np.asarray, output)
        for text in texts:
            self._add(text, output, text.slot)

    def _all_allowed(self, rows: int) -> np.ndarray:
        """Bits that allow every token in each row."""
        return np.full((rows, self._words), -1, np.int32)

    def _call(
        self, rows: int, running: np.ndarray, steps: int, want_logprobs: bool, allowed: np.ndarray
    ) -> DecodeOutput:
        self._cache, self._state, output = self._decode(
            self.engine.decoder,
            self._cache,
            self._state,
            running,
            allowed,
            np.int32(steps),
            np.bool_(want_logprobs),
            max_steps=self._tokens_per_call,
            eos=self._eos,
        )
        return output

    def _add(self, text: _Text, output: DecodeOutput, row: int) -> None:
        """Delivers the new tokens of a text, and frees its slot if they end it."""
        chunk = text.text.add(output, row)
        text.ids += [token.id for token in chunk.tokens]
        if chunk.finish:
            self._free(text.slot, text)
        self._deliver(text.ticket, chunk)
        if text.job.grammar is None or chunk.finish:
            return
        for token in chunk.tokens:
            text.job.grammar.add(token.id)
        (text.allowed,) = allowed = self._all_allowed(1)
        text.job.grammar.write_allowed(allowed[0])
        if problem := text.job.grammar.problem:
            self._free(text.slot, text)
            self._deliver(text.ticket, UsageError(f"the grammar cannot be followed any further: {problem}"))

    def _deliver(self, ticket: Ticket, event: Event) -> None:
        if ticket.cancelled:
            return
        try:
            ticket.deliver(event)
        except Exception:  # such as an event loop that was closed: nobody waits for this text any more
            logging.getLogger(__name__).exception("a text could not be delivered")
            ticket.cancel()


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with together."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _padded(ids: np.ndarray, size: int) -> np.ndarray:
    return np.pad(ids, (0, size - len(ids)))
