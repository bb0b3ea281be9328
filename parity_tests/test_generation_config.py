"""`generation_config.json` decides where a text starts and ends, token for token as in transformers."""

import json

import pytest
import torch
import transformers

from smollm_jax import weights
from smollm_jax.generation.engine import Engine
from smollm_jax.weights.bundle import Bundle
from tests.small_files import SMALL, small_tensors, small_tokenizer

pytestmark = pytest.mark.torch


@pytest.fixture
def folder(tmp_path):
    weights.write(tmp_path / "hf", Bundle(small_tensors(), SMALL, small_tokenizer()), "hf")
    return tmp_path / "hf"


def theirs(folder, ids=None, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = None if ids is None else torch.tensor([ids])
    return model.generate(prompt, max_new_tokens=24, do_sample=False, **options)[0].tolist()


def ours(engine, ids):
    return [token.id for token in engine.complete([ids], max_new_tokens=24)[0].tokens]


def test_a_text_ends_where_transformers_ends_it(folder):
    """At any of the file's eos ids, only at those, and at none if the file names none."""
    ids = [5, 6, 7]
    unended = theirs(folder, ids, eos_token_id=None)[3:]
    for values in ({"eos_token_id": [unended[9], 299]}, {"eos_token_id": unended[4]}, {"bos_token_id": 0}):
        (folder / "generation_config.json").write_text(json.dumps(values))
        expected = theirs(folder, ids)[3:]
        assert ours(Engine.load(folder), ids) == expected
    (folder / "generation_config.json").unlink()
    assert ours(Engine.load(folder), ids) == theirs(folder, ids)[3:]


def test_defaults_in_an_old_config_count_where_there_is_no_generation_config(folder):
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"repetition_penalty": 1.7, "top_k": 50}))
    engine, ids = Engine.load(folder), [5, 6, 7]
    answer = engine.complete([ids], max_new_tokens=24, sampling=engine.defaults)[0]
    assert [token.id for token in answer.tokens] == theirs(folder, ids)[3:]
    assert engine.defaults.repetition_penalty == 1.7


def test_an_empty_prompt_writes_what_transformers_writes_from_nothing(folder):
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 3, "eos_token_id": 299}))
    engine = Engine.load(folder)
    assert engine.encode("") == [3]
    assert [3, *ours(engine, engine.encode(""))] == theirs(folder)


def test_bos_of_a_post_processor_stands_where_transformers_puts_it(folder):
    core = json.loads((folder / "tokenizer.json").read_text())
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    pieces = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": pieces, "special_tokens": special}
    core["post_processor"] = template | {"pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}]}
    (folder / "tokenizer.json").write_text(json.dumps(core))
    engine, tokenizer = Engine.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("the the", "", "a\n b"):
        assert engine.encode(text) == tokenizer(text)["input_ids"]
