"""Random schemas and texts: a constrained text is valid, and one that would have been valid anyway is unchanged.

SMOLLM_SOAK=1 makes a thousand of each; `make soak`.
"""

import dataclasses
import json
import os
import queue
import random
import re
import subprocess
import sys
from typing import Any

import pytest

from smollm_jax.generation.engine import Engine
from smollm_jax.generation.grammar import Grammars
from smollm_jax.generation.sampling import Sampling
from smollm_jax.generation.slots import Job, SlotEngine
from tests.trainer import ENVIRONMENT

SOAK = bool(os.environ.get("SMOLLM_SOAK"))
COUNT = 1000 if SOAK else 20
CONTEXT, SLOTS = 256, 8
WORDS = ("", "a", "no", "Ünï", "日本", '"', "\\", "\n", "a b", "null", "0", "</s>", "🙂")


@pytest.fixture(scope="module")
def engine(tiny_model, tokenizer):
    return Engine(tiny_model, tokenizer)


@pytest.fixture(scope="module")
def grammars(engine):
    return Grammars(engine.tokenizer, engine.config.vocab_size, engine.eos_token_ids)


@pytest.fixture(scope="module")
def no_space(engine):
    """A bias against tokens of white space, which random weights would write between the words of JSON for ever."""
    return {i: -100.0 for i in range(engine.config.vocab_size) if engine.tokenizer.token_bytes(i).isspace()}


@pytest.fixture(scope="module")
def whole_letters(engine):
    """A bias against special tokens and parts of letters, which no regular expression matches."""
    special = set(engine.tokenizer.core.get_added_tokens_decoder())
    return {i: -100.0 for i in range(engine.config.vocab_size) if i in special or not is_text(engine, i)}


def is_text(engine, i: int) -> bool:
    try:
        return bool(engine.tokenizer.token_bytes(i).decode())
    except UnicodeDecodeError:
        return False


@pytest.fixture(scope="module")
def slots(engine):
    slots = SlotEngine(engine, slots=SLOTS, context=CONTEXT, queue_size=4 * COUNT).start()
    yield slots
    slots.close()


def texts_of(slots, jobs) -> list[tuple[str, str]]:
    """The text of each job, and why it ended."""
    events: queue.Queue = queue.Queue()
    slots.submit(jobs, events.put)
    texts, finish = [""] * len(jobs), [""] * len(jobs)
    while not all(finish):
        event = events.get(timeout=120)
        assert not isinstance(event, Exception), event
        texts[event.row] += event.text
        finish[event.row] = event.finish or ""
    return list(zip(texts, finish, strict=True))


def a_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose texts end, whatever the model writes."""
    kinds = ["string", "integer", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice(kinds + (["object", "object", "array", "anyOf"] if depth else []))
    match kind:
        case "string":
            return {"type": "string", "minLength": rng.randrange(2), "maxLength": rng.randrange(2, 6)}
        case "integer":
            low = rng.randrange(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(100)}
        case "enum":
            return {"enum": rng.sample([*WORDS, 1, 2.5, True, None], 3)}
        case "const":
            return {"const": rng.choice([*WORDS, 7, [1, "x"], {"k": None}])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-c]{1,3}$", "^(x|yz)$", r"^\d{4}-\d\d$"])}
        case "array":
            low = rng.randrange(2)
            return {"type": "array", "items": a_schema(rng, depth - 1), "minItems": low, "maxItems": low + 1}
        case "anyOf":
            return {"anyOf": [a_schema(rng, depth - 1), a_schema(rng, depth - 1)]}
        case "object":
            properties = {name: a_schema(rng, depth - 1) for name in rng.sample(["a", "b c", "Ü", "d-e"], 2)}
            required = [name for name in properties if rng.random() < 0.7]
            schema = {"type": "object", "properties": properties, "required": required}
            return schema | {"additionalProperties": False}
    return {"type": kind}


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value follows a schema of `a_schema`."""
    if "anyOf" in schema:
        return any(is_valid(value, each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return repr(value) in map(repr, schema.get("enum", [schema.get("const")]))  # 1 is not True
    match schema["type"]:
        case "string":
            length, pattern = len(value) if isinstance(value, str) else -1, schema.get("pattern", "")
            return schema.get("minLength", 0) <= length <= schema.get("maxLength", length) and bool(
                re.search(pattern, value)
            )
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "array":
            return (
                isinstance(value, list)
                and schema["minItems"] <= len(value) <= schema["maxItems"]
                and all(is_valid(item, schema["items"]) for item in value)
            )
        case "object":
            return (
                isinstance(value, dict)
                and set(schema["required"]) <= set(value) <= set(schema["properties"])
                and all(is_valid(item, schema["properties"][name]) for name, item in value.items())
            )
    return value is None if schema["type"] == "null" else type(value) is bool


def test_the_check_refuses_what_breaks_a_schema():
    breaking = [
        ({"type": "string", "maxLength": 2}, ["abc", 5, None]),
        ({"type": "string", "pattern": "^a$"}, ["b", "aa"]),
        ({"type": "integer", "minimum": 0, "maximum": 5}, [6, -1, 2.0, "3", True]),
        ({"enum": [True, "x"]}, [1, "y", False]),
        ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, [[], [None] * 3, [5], {}]),
        (
            {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
            [{}, {"a": 2}, {"a": 1, "b": 1}, []],
        ),
    ]
    for schema, values in breaking:
        assert not any(is_valid(value, schema) for value in values)


def test_a_constrained_text_is_valid_json_of_its_schema(slots, grammars, engine, no_space):
    rng = random.Random(0)
    schemas = [a_schema(rng) for _ in range(COUNT)]
    jobs = [
        Job(
            engine.encode(f"number {i}"),
            200,
            Sampling(temperature=rng.choice([0.0, 1.0, 2.0]), seed=i),
            logit_bias=no_space,
            grammar=grammars.json_schema(schema),
            row=i,
        )
        for i, schema in enumerate(schemas)
    ]
    for schema, (text, finish) in zip(schemas, texts_of(slots, jobs), strict=True):
        assert finish == "eos", f"{schema}: {text!r}"
        assert is_valid(json.loads(text), schema), f"{schema}: {text!r}"


def test_a_text_that_would_have_been_valid_anyway_is_unchanged(slots, grammars, engine, whole_letters):
    """Patterns that the free text follows, from its letters one after another to any text at all."""
    rng = random.Random(1)
    free = [
        Job(
            engine.encode(f"text {i}"),
            rng.randrange(1, 16),
            Sampling(temperature=rng.choice([0.0, 1.0]), seed=i),
            logit_bias=whole_letters,
            row=i,
        )
        for i in range(COUNT)
    ]
    expected = texts_of(slots, free)
    jobs = []
    for job, (text, _) in zip(free, expected, strict=True):
        half = len(text) // 2
        pattern = rng.choice(
            [
                "(?s:.*)",
                f"{quoted(text)}(?s:.*)",
                f"{quoted(text[:half])}(?s:.*)",
                f"(?s:.{{{half}}}){quoted(text[half:])}(?s:.*)",
                f"({quoted(text)}|something else)(?s:.*)",
            ]
        )
        jobs.append(dataclasses.replace(job, grammar=grammars.regex(pattern)))
    assert texts_of(slots, jobs) == expected


DEEP = """
from smollm_jax.generation.grammar import Grammars
from smollm_jax.tokenizer import Tokenizer
import sys
grammars = Grammars(Tokenizer.load(sys.argv[1]), 49_152, [2])
rules = 4000
grammars.lark("start: r0\\n" + "\\n".join(f"r{i}: r{i + 1}" for i in range(rules)) + f"\\nr{rules}: /a/")
refs = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(20_000)}
grammars.json_schema({"$ref": "#/$defs/a0", "$defs": refs | {"a20000": {"type": "integer"}}})
"""


def test_rules_that_lead_to_each_other_in_a_long_row_end_no_process(tokenizer_path):
    command = [sys.executable, "-c", DEEP, str(tokenizer_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def quoted(text: str) -> str:
    """A regular expression of this text alone, each letter by its number."""
    return "".join(f"\\x{{{ord(letter):x}}}" for letter in text)
