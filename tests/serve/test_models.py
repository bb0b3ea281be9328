"""Several adapters of the same weights, each served by its name: a text is the one that its model gives alone."""

import concurrent.futures
import gc
from pathlib import Path

import httpx
import jax
import numpy as np
import pytest

from smollm_jax.commands import serve
from smollm_jax.errors import UsageError
from smollm_jax.generation.engine import Engine
from smollm_jax.weights.adapter import write_adapter
from tests.api_server import serving
from tests.finetuning.test_adapter_files import some_adapter
from tests.serving import tiny_weights

PROMPT = "The state of"


@pytest.fixture(scope="module")
def models(tmp_path_factory, weights_path) -> dict[str, tuple[Path, Path | None]]:
    """The weights and the adapter of each model."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_weights(folder, weights_path)
    adapters = {"one": ("q_proj", "down_proj"), "two.b": ("v_proj", "o_proj")}
    for name, targets in adapters.items():
        write_adapter(folder / name, some_adapter(targets))
    return {"tiny": (base, None)} | {name: (base, folder / name) for name in adapters}


@pytest.fixture(scope="module")
def http(models):
    named = tuple(f"{name}={adapter}" for name, (_, adapter) in models.items() if adapter)
    flags = serve.Flags(weights=models["tiny"][0], adapter=named, slots=2, context=64, queue_size=16)
    with serving(flags) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


def test_each_model_gives_its_own_text_whoever_else_is_asked(http, models):
    expected = {}
    for name, (base, adapter) in models.items():
        engine = Engine.load(base, adapter=adapter)
        (completion,) = engine.complete([engine.encode(PROMPT)], max_new_tokens=12)
        expected[name] = completion.text
    assert len(set(expected.values())) == 3

    def ask(model: str | None) -> tuple[str, str]:
        body = {"prompt": PROMPT, "max_tokens": 12} | ({} if model is None else {"model": model})
        answer = http.post("/v1/completions", json=body).json()
        return answer["model"], answer["choices"][0]["text"]

    asked = [*models, None] * 4
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as clients:
        answers = list(clients.map(ask, asked))
    assert answers == [(name or "tiny", expected[name or "tiny"]) for name in asked]
    chat = {"model": "one", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    assert http.post("/v1/chat/completions", json=chat).json()["model"] == "one"


def test_the_models_are_listed_counted_and_no_other_is_there(http):
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["tiny", "one", "two.b"]
    assert http.get("/v1/models/two.b").json()["id"] == "two.b"
    assert http.get("/health").status_code == 200
    for response in (
        http.get("/v1/models/three"),
        http.post("/v1/completions", json={"model": "three", "prompt": PROMPT}),
        http.post("/v1/chat/completions", json={"model": "three", "messages": [{"role": "user", "content": "Hi"}]}),
        http.post("/tokenize", json={"model": "three", "prompt": PROMPT}),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "model_not_found")
        assert error["message"] == "no such model: 'three', only tiny, one, two.b"

    def generated(model: str) -> float:
        (line,) = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f'{COUNTER}{model}"')]
        return float(line.split()[-1])

    before = {model: generated(model) for model in ("tiny", "one", "two.b")}
    http.post("/v1/completions", json={"model": "one", "prompt": PROMPT, "max_tokens": 3})
    assert {model: generated(model) - before[model] for model in before} == {"tiny": 0, "one": 3, "two.b": 0}


COUNTER = 'vllm:generation_tokens_total{model_name="'


def test_what_an_adapter_does_not_change_is_in_memory_once(models):
    base, adapted = (Engine.load(*models["tiny"][:1], adapter=models[name][1]) for name in ("tiny", "one"))
    own = [np.asarray(leaf) for leaf in jax.tree.leaves(adapted.decoder)]
    adapted.share_equal_weights(base)
    gc.collect()
    shared = {id(leaf) for leaf in jax.tree.leaves(base.decoder)}
    leaves = jax.tree.leaves(adapted.decoder)
    assert all(np.array_equal(leaf, before) for leaf, before in zip(leaves, own, strict=True))
    assert id(adapted.decoder.head) in shared
    assert id(adapted.model.embed_tokens[...]) in shared
    assert id(adapted.decoder.layers[0].mlp.down_proj) not in shared


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        ((), {"w": None}),
        (("runs/lora",), {"w+lora": Path("runs/lora")}),
        (("a=runs/lora",), {"w": None, "a": Path("runs/lora")}),
        (("a=x=1", "b-2:c=y"), {"w": None, "a": Path("x=1"), "b-2:c": Path("y")}),
    ],
)
def test_models_have_the_names_that_the_flags_say(adapters, expected):
    assert serve.adapters(serve.Flags(weights=Path("runs/w"), adapter=adapters)) == expected


def test_a_folder_whose_name_has_a_sign_of_equality_is_an_adapter(tmp_path):
    (tmp_path / "r=4").mkdir()
    path = tmp_path / "r=4"
    assert serve.adapters(serve.Flags(weights=Path("w"), adapter=(str(path),))) == {"w+r=4": path}


@pytest.mark.parametrize(
    ("adapters", "named"),
    [
        (("a=x", "runs/lora"), "--adapter runs/lora: must be NAME=PATH"),
        (("a/b=x", "c=y"), "--adapter a/b=x: must be NAME=PATH"),
        (("a=",), "--adapter a=: must be NAME=PATH"),
        (("a=x", "a=y"), "--adapter a=y: two models have the name a"),
        (("w=x",), "--adapter w=x: two models have the name w"),
    ],
)
def test_names_that_are_missing_or_used_twice_are_refused(adapters, named):
    with pytest.raises(UsageError, match=named):
        serve.adapters(serve.Flags(weights=Path("w"), adapter=adapters))
