"""Many texts at once: each gets the tokens that it gets alone, whoever else runs, joins, ends or is cancelled."""

import dataclasses
import queue
import random

import jax
import numpy as np
import pytest

from smollm_jax.errors import UsageError
from smollm_jax.generation import slot_programs
from smollm_jax.generation import slots as slots_module
from smollm_jax.generation.engine import Chunk, Engine
from smollm_jax.generation.sampling import Sampling
from smollm_jax.generation.slots import ClosedError, Job, PromptTokens, QueueFullError, SlotEngine
from smollm_jax.model import slot_cache

CONTEXT = 256  # and the cache has no more, so that the last part of a prompt may have to begin earlier


@pytest.fixture(scope="module")
def engine(tiny_model, tokenizer):
    return Engine(tiny_model, tokenizer)


@pytest.fixture(scope="module", autouse=True)
def _short_chunks():
    """A prompt is read in several parts, and running texts go on between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_programs, "CHUNK_SIZES", (64,))
        patch.setattr(slots_module, "PROMPT_TOKENS", 64)
        patch.setattr(slot_cache, "CPU_BLOCK", 64)
        yield


@pytest.fixture(scope="module")
def slots(engine):
    slots = SlotEngine(engine, slots=4, context=CONTEXT, queue_size=40, tokens_per_call=2).start()
    yield slots
    slots.close()


class Reader:
    """The events of submitted jobs."""

    def __init__(self, slots, jobs):
        self.events: queue.Queue = queue.Queue()
        self.tickets = slots.submit(jobs, self.events.put)
        self.chunks: list[list[Chunk]] = [[] for _ in jobs]
        self.prompts: dict[int, PromptTokens] = {}

    def next(self):
        event = self.events.get(timeout=60)
        assert not isinstance(event, Exception), event
        if isinstance(event, PromptTokens):
            self.prompts[event.row] = event
        else:
            self.chunks[event.row].append(event)
        return event

    def read(self, rows):
        """Reads until these rows have ended."""
        while any(not self.chunks[row] or not self.chunks[row][-1].finish for row in rows):
            self.next()
        return self

    def tokens(self, row):
        return [token for chunk in self.chunks[row] for token in chunk.tokens]


def run(slots, *jobs):
    jobs = [dataclasses.replace(job, row=row) for row, job in enumerate(jobs)]
    return Reader(slots, jobs).read(range(len(jobs)))


def a_job(rng: random.Random) -> Job:
    prompt = [rng.randrange(1, 40_000) for _ in range(rng.choice([1, 3, 20, 70, 150, 225]))]
    settings = {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.2} if rng.random() < 0.5 else {}
    stop = ("a", "e") if rng.random() < 0.3 else ()
    return Job(prompt, rng.randrange(1, 25), Sampling(**settings, seed=rng.randrange(2**32)), stop, alternatives=3)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_every_text_is_the_one_it_gets_alone(slots, engine, seed):
    rng = random.Random(seed)
    jobs = [dataclasses.replace(a_job(rng), row=row) for row in range(24)]
    reader = Reader(slots, jobs)
    cancelled = set(rng.sample(range(len(jobs)), 6))
    for row in cancelled:  # some before they begin, some amid
        for _ in range(rng.randrange(4)):
            reader.next()
        reader.tickets[row].cancel()
    reader.read(set(range(len(jobs))) - cancelled)
    for row in sorted(set(range(len(jobs))) - cancelled)[:12]:
        job = jobs[row]
        (alone,) = engine.complete(
            [job.prompt],
            max_new_tokens=job.max_new_tokens,
            sampling=job.sampling,
            stop=job.stop,
            alternatives=3,
        )
        tokens = reader.tokens(row)
        assert [token.id for token in tokens] == [token.id for token in alone.tokens]
        assert "".join(chunk.text for chunk in reader.chunks[row]) == alone.text
        assert reader.chunks[row][-1].finish == alone.finish
        for token, other in zip(tokens, alone.tokens, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [i for i, _, _ in token.alternatives] == [i for i, _, _ in other.alternatives]


def test_a_cancelled_text_frees_its_slot_and_says_no_more(slots):
    reader = Reader(slots, [Job([5], 240, row=row) for row in range(5)])
    while not reader.chunks[0]:
        reader.next()
    for ticket in reader.tickets:
        ticket.cancel()
    after = run(slots, Job([7], 2))
    assert slots.running == slots.waiting == 0
    assert len(after.tokens(0)) == 2
    assert max(len(reader.tokens(row)) for row in range(5)) < 240


def test_log_probabilities_of_a_prompt_are_the_models_own(slots, tiny_model, engine):
    rng = random.Random(3)
    prompt = [rng.randrange(1, 40_000) for _ in range(150)]
    for count in (2, 150):
        reader = run(slots, Job(prompt[:count], 0, prompt_alternatives=2))
        (chunk,) = reader.chunks[0]
        assert (chunk.text, chunk.tokens, chunk.finish) == ("", (), "length")
        tokens = reader.prompts[0].tokens
        assert [token.id for token in tokens] == prompt[:count]
        assert tokens[0].logprob is None
        truth = np.asarray(jax.nn.log_softmax(tiny_model(np.array([prompt[:count]]))[0]))
        for i, token in enumerate(tokens[1:]):
            assert token.logprob == pytest.approx(truth[i, token.id], abs=1e-5)
            assert [j for j, _, _ in token.alternatives] == np.argsort(-truth[i])[:2].tolist()


def test_a_bias_forbids_or_forces_a_token_and_log_probabilities_stay_the_models(slots):
    plain, forced = Job([5, 6], 4, alternatives=1), Job([5, 6], 4, alternatives=1, logit_bias={77: 100.0})
    first = run(slots, plain).tokens(0)
    banned = dataclasses.replace(plain, logit_bias={first[0].id: -100.0})
    reader = run(slots, forced, banned)
    assert [token.id for token in reader.tokens(0)] == [77] * 4
    assert reader.tokens(1)[0].id != first[0].id
    assert reader.tokens(1)[0].alternatives[0][0] == first[0].id


def test_penalties_count_the_tokens_of_the_text_and_not_of_the_prompt(slots):
    forced = {"logit_bias": {77: 1000.0, 78: 900.0}}
    once = run(slots, Job([77, 78], 4, presence_penalty=150.0, **forced)).tokens(0)
    assert [token.id for token in once] == [77, 78, 77, 77]
    often = run(slots, Job([77, 77], 6, frequency_penalty=60.0, **forced)).tokens(0)
    assert [token.id for token in often] == [77, 77, 78, 77, 78, 77]
    divided = run(slots, Job([5], 4, Sampling(repetition_penalty=10.0), **forced)).tokens(0)
    assert [token.id for token in divided] == [77, 78, 77, 77]


def test_more_than_can_wait_is_refused_whole(engine):
    slots = SlotEngine(engine, slots=1, context=64, queue_size=2)  # not started: nothing leaves the queue
    events = queue.Queue()
    slots.submit([Job([1], 1), Job([1], 1)], events.put)
    with pytest.raises(QueueFullError):
        slots.submit([Job([1], 1), Job([1], 1)], events.put)
    assert slots.waiting == 2
    slots.submit([Job([1], 1)], events.put)
    with pytest.raises(UsageError, match="a prompt of 60 tokens and 5 new ones exceed the context of 64 tokens"):
        slots.submit([Job([1] * 60, 5)], events.put)
    slots.close()
    with pytest.raises(ClosedError):
        slots.submit([Job([1], 1)], events.put)


@pytest.mark.parametrize(("name", "value"), [("slots", 0), ("context", 513), ("queue_size", 0)])
def test_a_number_that_cannot_be_is_refused_by_its_flag(engine, name, value):
    numbers = {"slots": 1, "context": 64, "queue_size": 1} | {name: value}
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be"):
        SlotEngine(engine, **numbers)


def test_what_a_text_left_in_the_cache_is_not_computed_again(engine):
    """Turns of two chats by turns, with one slot that decodes alone: what one slot held moves to another."""
    rng = random.Random(5)
    slots = SlotEngine(engine, slots=4, context=CONTEXT, queue_size=8, tokens_per_call=2).start()
    try:
        system = [rng.randrange(1, 40_000) for _ in range(20)]  # both begin with it
        chats = [[*system, *(rng.randrange(1, 40_000) for _ in range(80))] for _ in range(2)]
        for turn in range(3):
            for chat in chats:
                job = Job(list(chat), 12, alternatives=1)
                reader = run(slots, job)
                ids = [token.id for token in reader.tokens(0)]
                (alone,) = engine.complete([job.prompt], max_new_tokens=12, alternatives=1)
                assert ids == [token.id for token in alone.tokens]
                for token, other in zip(reader.tokens(0), alone.tokens, strict=True):
                    assert token.logprob == pytest.approx(other.logprob, abs=1e-5)
                # All of the last turn but its last token, which was never read.
                assert reader.tickets[0].cached_tokens == (len(chat) - 6 if turn else 20 if chat is chats[1] else 0)
                chat += [*ids, *(rng.randrange(1, 40_000) for _ in range(5))]
        reader = run(slots, Job([*chats[0], *range(100, 245 - len(chats[0]) + 100)], 4))
        (alone,) = engine.complete([reader.tickets[0].job.prompt], max_new_tokens=4)
        assert [token.id for token in reader.tokens(0)] == [token.id for token in alone.tokens]
        jobs = [Job(chats[0][:90], 20, Sampling(temperature=1.0, seed=seed)) for seed in range(3)]
        reader = run(slots, *jobs, Job(chats[0][:90], 0, prompt_alternatives=0))
        assert [ticket.cached_tokens for ticket in reader.tickets] == [89, 89, 89, 0]
        for row, job in enumerate(jobs):
            (alone,) = engine.complete([job.prompt], max_new_tokens=20, sampling=job.sampling)
            assert [token.id for token in reader.tokens(row)] == [token.id for token in alone.tokens]
    finally:
        slots.close()
