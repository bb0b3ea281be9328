"""Weights keep their own tokenizer, whatever other tokenizers are nearby, and through every conversion."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from smollm_jax import weights
from smollm_jax.config.hf_config import config_to_hf
from smollm_jax.data.mixture import open_mixture
from smollm_jax.errors import InputFileError, UsageError
from smollm_jax.generation.engine import Engine
from smollm_jax.generation.sampling import Sampling
from smollm_jax.tokenizer import Tokenizer
from smollm_jax.tokenizer.source import FILES, own_tokenizer
from smollm_jax.tokenizer.special_tokens import byte_symbols
from smollm_jax.weights.bundle import Bundle
from tests.small_files import SMALL, gguf_metadata, small_tensors, small_tokenizer, tokenizer_folder, write_gguf

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|endoftext|>' }}{% endfor %}"


def metadata(**changed) -> dict:
    """GGUF metadata with two tokens more than `small_tokenizer`, and a chat template."""
    tokens = ["<|endoftext|>", "<think>", "</think>", *byte_symbols(), "Ġt", "he", "Ġthe"]
    types = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3, 4, 4] + [1] * 259}
    return gguf_metadata(SMALL) | types | {"tokenizer.chat_template": TEMPLATE} | changed


def gguf(path: Path, **changed) -> Path:
    write_gguf(path, SMALL, small_tensors(), metadata(**changed))
    return path


def test_a_gguf_uses_its_own_tokenizer_not_one_next_to_it(tmp_path):
    (tmp_path / "models").mkdir()
    tokenizer_folder(tmp_path)
    tokenizer_folder(tmp_path / "models")
    engine = Engine.load(gguf(tmp_path / "models/x.gguf"))
    ids = engine.encode("the <think>")
    vocabulary = metadata()["tokenizer.ggml.tokens"]
    assert [vocabulary[i] for i in ids] == ["t", "he", "Ġ", "<think>"]
    assert Tokenizer.load(tmp_path).encode("the") != engine.encode("the")  # the other tokenizer's ids differ
    assert engine.tokenizer.decode(engine.chat([{"role": "user", "content": "hi"}])) == "user:hi<|endoftext|>"


def test_no_tokenizer_in_a_parent_folder_is_used(tmp_path):
    tokenizer_folder(tmp_path)
    weights.write(tmp_path / "sub/hf", Bundle(small_tensors(), SMALL), "hf")
    tokenizer_folder(tmp_path / "sub")  # other tokenizers in the parent folder and above it
    assert own_tokenizer(tmp_path / "sub/hf") is None
    with pytest.raises(InputFileError, match="nowhere: no such file or folder"):
        Engine.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputFileError, match="empty: not recognised as weights"):
        Engine.load(tmp_path / "empty")
    with pytest.raises(InputFileError, match="sub/hf: has no tokenizer: give its folder with --tokenizer"):
        Engine.load(tmp_path / "sub/hf")
    assert Engine.load(tmp_path / "sub/hf", tokenizer=tmp_path).encode("the") == Tokenizer.load(tmp_path).encode("the")


def test_each_format_of_weights_has_its_tokenizer_in_its_place(tmp_path):
    bundle = Bundle(small_tensors(), SMALL, small_tokenizer())
    for kind, name in {"hf": "hf", "orbax": "run", "gguf": "x.gguf"}.items():
        weights.write(tmp_path / name, bundle, kind)
    weights.write(tmp_path / "hf/x.safetensors", bundle, "safetensors")
    weights.write(tmp_path / "x.safetensors", bundle, "safetensors")
    expected = {"hf": "hf", "run": "run", "run/checkpoints/0": "run", "x.gguf": "x.gguf", "hf/x.safetensors": "hf"}
    assert {name: own_tokenizer(tmp_path / name) for name in expected} == {
        name: tmp_path / place for name, place in expected.items()
    }
    assert own_tokenizer(tmp_path / "x.safetensors") is None


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_every_file_of_a_tokenizer_goes_along_into_runs_and_exports(tmp_path, kind):
    """And so the chat template, wherever it stands."""
    extra = {name: b"{}" for name in FILES} | {
        "chat_template.jinja": b"{{ messages[0].content }}",
        "additional_chat_templates/rag.jinja": b"{{ documents[0].title }}",
    }
    source = tmp_path / "source"
    weights.write(source, Bundle(small_tensors(), SMALL, extra | small_tokenizer()), "hf")
    assert weights.read(source).tokenizer_files == extra | small_tokenizer()
    weights.write(tmp_path / "target", weights.read(source), kind)
    for name, content in (extra | small_tokenizer()).items():
        assert (tmp_path / "target" / name).read_bytes() == content
    for path in (tmp_path / "target", *(tmp_path / "target").glob("checkpoints/0")):
        assert weights.read(path).tokenizer_files == extra | small_tokenizer()
        chat = Tokenizer.of_weights(path)
        assert chat.chat_template == "{{ messages[0].content }}"
        assert chat.templates.source("rag") == "{{ documents[0].title }}"


def test_only_a_step_uses_files_above_a_folder_called_checkpoints(tmp_path):
    tokenizer_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(SMALL)))
    bundle = Bundle(small_tensors(), SMALL)
    for name, kind in {"500": "hf", "best": "hf", "my-run": "orbax", "7": "orbax"}.items():
        weights.write(tmp_path / "checkpoints" / name, bundle, kind)
    for name in ("500", "best", "my-run", "7"):
        path = tmp_path / "checkpoints" / name
        assert own_tokenizer(path) is None
        assert weights.read(path).config == SMALL
        assert weights.generation_of(path).eos_token_ids == (0,)


def test_an_hf_folder_may_hold_a_folder_called_checkpoints(tmp_path):
    weights.write(tmp_path / "hf", Bundle(small_tensors(), SMALL), "hf")
    (tmp_path / "hf/checkpoints/checkpoint-500").mkdir(parents=True)
    assert weights.kind_of(tmp_path / "hf") == "hf"
    assert weights.read(tmp_path / "hf").config == SMALL


def test_a_tokenizer_with_other_ids_than_that_of_the_weights_is_refused(tmp_path):
    path = gguf(tmp_path / "x.gguf")
    folder = tokenizer_folder(tmp_path / "other")
    with pytest.raises(UsageError, match=r"other: its ids differ from those of the tokenizer in .*x\.gguf"):
        Tokenizer.of_weights(path, folder)
    weights.write(tmp_path / "hf", weights.read(path), "hf")
    (tmp_path / "hf/chat_template.jinja").write_text("another template")
    assert Tokenizer.of_weights(path, tmp_path / "hf").path == tmp_path / "hf"  # same ids, another template


def test_weights_of_a_gguf_with_an_unsupported_tokenizer_are_read(tmp_path):
    path = gguf(tmp_path / "x.gguf", **{"tokenizer.ggml.model": "llama"})
    assert weights.read(path).tokenizer_files == {}
    with pytest.raises(
        InputFileError, match=r"tokenizer\.ggml\.model and \.pre are .llama.*give another tokenizer with --tokenizer"
    ):
        Tokenizer.of_weights(path)
    folder = tokenizer_folder(tmp_path / "other")
    assert Tokenizer.of_weights(path, folder).path == folder


@pytest.mark.parametrize("pre", ["smollm", "starcoder", "gpt-2"])
def test_the_pre_tokenizer_of_a_gguf_decides_whether_digits_are_split(tmp_path, pre):
    tokens, merges = metadata()["tokenizer.ggml.tokens"], ["Ġ t", "h e", "Ġt he", "1 2"]
    changed = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": [*tokens, "12"], "tokenizer.ggml.merges": merges}
    path = gguf(tmp_path / "x.gguf", **changed, **{"tokenizer.ggml.token_type": [3, 4, 4] + [1] * 260})
    assert len(Tokenizer.load(path).encode("12")) == (1 if pre == "gpt-2" else 2)
    weights.write(tmp_path / "again.gguf", weights.read(path), "gguf")
    assert Tokenizer.load(tmp_path / "again.gguf").encode("a12") == Tokenizer.load(path).encode("a12")


def test_a_user_defined_token_is_one_id_through_every_conversion(tmp_path):
    """special: false in a folder, token_type 4 in a GGUF; it stays one token where special tokens are plain text."""
    weights.write(tmp_path / "hf", weights.read(gguf(tmp_path / "x.gguf")), "hf")
    added = {token["content"]: token["special"] for token in read_added(tmp_path / "hf")}
    assert added == {"<|endoftext|>": True, "<think>": False, "</think>": False}
    weights.write(tmp_path / "again.gguf", weights.read(tmp_path / "hf"), "gguf")
    for name in ("x.gguf", "hf", "again.gguf"):
        tokenizer = Tokenizer.load(tmp_path / name)
        assert tokenizer.encode("<think>") == [1]
        assert len(tokenizer.encode("<|endoftext|>")) > 1
        assert tokenizer.decode([1]) == "<think>"


def read_added(folder: Path) -> list[dict]:
    return json.loads((folder / "tokenizer.json").read_text())["added_tokens"]


def test_bos_is_added_once_to_a_text_and_a_chat_if_a_gguf_asks_for_it(tmp_path):
    changed = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0}
    path = gguf(tmp_path / "x.gguf", **changed)
    engine = Engine.load(path)
    assert engine.encode("he") == [0, *engine.tokenizer.encode("he")]
    chat = [{"role": "user", "content": "he"}]
    assert engine.chat(chat)[0] == 0  # as llama.cpp does
    written = gguf(tmp_path / "y.gguf", **changed, **{"tokenizer.chat_template": "<|endoftext|>" + TEMPLATE})
    assert Engine.load(written).chat(chat) == engine.chat(chat)  # the template's own is not doubled
    weights.write(tmp_path / "hf", weights.read(path), "hf")
    folder = Engine.load(tmp_path / "hf")
    assert folder.encode("he") == engine.encode("he")
    assert folder.chat(chat) == engine.chat(chat)[1:]  # as transformers does: what the template writes
    weights.write(tmp_path / "again.gguf", weights.read(tmp_path / "hf"), "gguf")
    assert Engine.load(tmp_path / "again.gguf").encode("he") == engine.encode("he")


def test_every_document_of_a_data_set_begins_with_bos_if_the_tokenizer_adds_it(tmp_path):
    path = gguf(tmp_path / "x.gguf", **{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 1})
    (tmp_path / "x.jsonl").write_text('{"text": "the"}\n{"text": "he 12"}\n')
    (tmp_path / "y.txt").write_text("a b " * 40_000)  # long enough to be read in pieces
    tokenizer = Tokenizer.load(path)
    for name, texts in (("x.jsonl", ["the", "he 12"]), ("y.txt", ["a b " * 40_000])):
        tokens = np.concatenate(
            [f.tokens for f in open_mixture(tmp_path / name, path, tmp_path / "cache").sets[0].files]
        )
        documents = [[1, *tokenizer.encode(text), 0] for text in texts]
        assert sorted(np.split(tokens, np.flatnonzero(tokens == 0)[:-1] + 1), key=len)[0].tolist() in documents
        assert len(tokens) == sum(map(len, documents))
        assert (tokens == 1).sum() == len(texts)


def test_named_chat_templates_survive_every_conversion(tmp_path):
    named = {"tokenizer.chat_template.tool_use": "{{ tools | length }} tools", "tokenizer.chat_template": TEMPLATE}
    path = gguf(tmp_path / "x.gguf", **named)
    weights.write(tmp_path / "hf", weights.read(path), "hf")
    weights.write(tmp_path / "again.gguf", weights.read(tmp_path / "hf"), "gguf")
    weights.write(tmp_path / "run", weights.read(tmp_path / "again.gguf"), "orbax")
    chat = [{"role": "user", "content": "hi"}]
    for name in ("x.gguf", "hf", "again.gguf", "run"):
        tokenizer = Tokenizer.load(tmp_path / name)
        assert tokenizer.decode(tokenizer.apply_chat_template(chat)) == "user:hi<|endoftext|>"
        assert tokenizer.decode(tokenizer.apply_chat_template(chat, tools=[{"name": "x"}])) == "1 tools"


def test_the_converter_accepts_a_tokenizer_for_weights_without_one(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "scripts/convert_weights.py"))["main"]
    weights.write(tmp_path / "x.safetensors", Bundle(small_tensors(), SMALL), "safetensors")
    with pytest.raises(UsageError, match=r"the weights have no tokenizer\.json: give one with --tokenizer"):
        main([str(tmp_path / "x.safetensors"), str(tmp_path / "x.gguf")])
    folder = tokenizer_folder(tmp_path / "tokenizer")
    main([str(tmp_path / "x.safetensors"), str(tmp_path / "x.gguf"), "--tokenizer", str(folder)])
    assert Tokenizer.load(tmp_path / "x.gguf").encode("the the") == Tokenizer.load(folder).encode("the the")


GENERATION = {"eos_token_id": [0, 7], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 99}


@pytest.mark.parametrize("kind", ["hf", "orbax", "pt", "safetensors", "gguf"])
@pytest.mark.parametrize("generation", [GENERATION, {"eos_token_id": 5}, None])
def test_generation_config_survives_every_conversion(tmp_path, kind, generation):
    if kind == "pt":
        pytest.importorskip("torch")
    name = f"x.{kind}" if kind not in ("hf", "orbax") else kind
    bundle = Bundle(small_tensors(), SMALL, small_tokenizer(), generation_config=generation)
    weights.write(tmp_path / name, bundle, kind)
    reread = weights.read(tmp_path / name)
    ids = {"bos_token_id": 0, "eos_token_id": 0}  # what a Hugging Face folder says where nothing else is known
    assert reread.generation_config == (ids if generation is None and kind == "hf" else generation)
    assert reread.config.eos_token_id == SMALL.eos_token_id


def test_a_gguf_names_every_end_token_for_llama_cpp(tmp_path):
    from gguf import GGUFReader

    bundle = Bundle(small_tensors(), SMALL, small_tokenizer(), generation_config=GENERATION)
    weights.write(tmp_path / "x.gguf", bundle, "gguf")
    fields = GGUFReader(tmp_path / "x.gguf").fields
    named = {key: fields[key].contents() for key in fields if key.startswith(("tokenizer.ggml.e", "general.sampling"))}
    assert named == {
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 7,
        "general.sampling.temp": np.float32(0.6),
        "general.sampling.top_p": np.float32(0.9),
    }
    several = dataclasses.replace(SMALL, eos_token_id=(0, 3, 7))
    weights.write(tmp_path / "y.gguf", dataclasses.replace(bundle, config=several), "gguf")
    assert weights.read(tmp_path / "y.gguf").config.eos_token_id == (0, 3, 7)


def test_end_tokens_and_sampling_of_another_programs_gguf_are_used(tmp_path):
    metadata = {"tokenizer.ggml.eot_token_id": 9, "general.sampling.temp": 0.7, "general.sampling.top_k": 20}
    engine = Engine.load(gguf(tmp_path / "x.gguf", **metadata))
    assert engine.generation.eos_token_ids == (0, 9)
    assert (engine.defaults.temperature, engine.defaults.top_k, engine.defaults.top_p) == (0.7, 20, 1.0)


def chat_gguf(path: Path, **changed) -> Path:
    """A GGUF as llama.cpp's converter writes it for a chat model whose eos is the base model's."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_symbols(), "Ġt", "he", "Ġthe"]
    types = [3, 3, 3] + [1] * 259
    return gguf(path, **{"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types} | changed)


@pytest.mark.parametrize("types", [[3, 3, 3], [2, 3, 3], [3, 3, 1]])
def test_another_programs_gguf_ends_a_text_where_llama_cpp_does(tmp_path, types):
    """llama.cpp recognises end tokens by their text, and treats UNKNOWN (2) as special like CONTROL (3)."""
    path = chat_gguf(tmp_path / "x.gguf", **{"tokenizer.ggml.token_type": types + [1] * 259})
    engine = Engine.load(path)
    assert engine.generation.eos_token_ids == (0, 2) == weights.generation_of(path).eos_token_ids
    assert engine.config.eos_token_id == 0  # as the file says
    assert engine.tokenizer.encode("<|im_end|><|endoftext|>", parse_special=True) == [2, 0]
    for name, kind in {"hf": "hf", "again.gguf": "gguf", "run": "orbax", "last.gguf": "gguf"}.items():
        weights.write(tmp_path / name, weights.read(path), kind)
        path = tmp_path / name
        assert weights.generation_of(path).eos_token_ids == (0, 2)


def test_an_exported_gguf_ends_a_text_where_its_source_folder_does(tmp_path):
    files = weights.read(chat_gguf(tmp_path / "x.gguf")).tokenizer_files
    for generation in (None, {"eos_token_id": 2}):
        weights.write(tmp_path / f"{generation}.gguf", Bundle(small_tensors(), SMALL, files, "", generation), "gguf")
        reread = weights.read(tmp_path / f"{generation}.gguf")
        assert (reread.generation_config, reread.config.eos_token_id) == (generation, 0)


@pytest.mark.parametrize("role", ["bos", "eos", "eot", "padding", "unknown"])
def test_minus_one_as_a_token_id_of_a_gguf_means_no_token(tmp_path, role):
    path = gguf(tmp_path / "x.gguf", **{f"tokenizer.ggml.{role}_token_id": 2**32 - 1})
    expected = None if role == "eos" else 0
    config = weights.read(path).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, expected, None)
    assert len(Tokenizer.load(path).encode("the")) == 2


def test_neutral_keys_of_a_gguf_are_accepted_and_a_part_of_a_split_one_is_refused(tmp_path):
    neutral = {"llama.attention.layer_norm_epsilon": 1e-5, "llama.logit_scale": 1.0, "llama.residual_scale": 0.0}
    assert weights.read(gguf(tmp_path / "x.gguf", **neutral)).config.vocab_size == SMALL.vocab_size
    with pytest.raises(InputFileError, match=r"llama\.logit_scale=2.0 is not supported"):
        weights.read(gguf(tmp_path / "y.gguf", **{"llama.logit_scale": 2.0}))
    with pytest.raises(
        InputFileError, match=r"is one of 2 pieces of a GGUF; join them with llama\.cpp's `llama-gguf-split --merge"
    ):
        weights.read(gguf(tmp_path / "z.gguf", **{"split.count": 2, "split.no": 0}))


def test_sampling_defaults_come_from_the_weights_and_flags_override_them(tmp_path):
    from smollm_jax.generation.flags import SamplingFlags

    bundle = Bundle(small_tensors(), SMALL, small_tokenizer(), generation_config=GENERATION | {"num_beams": 4})
    weights.write(tmp_path / "hf", bundle, "hf")
    generation = Engine.load(tmp_path / "hf").generation
    flags = SamplingFlags(top_p=0.5)
    assert (flags.over(generation).temperature, flags.over(generation).top_p) == (0.6, 0.5)
    assert flags.said(generation).startswith("sampling: temperature 0.6, top k 50, top p 0.5 (")
    assert "num_beams=4" in (generation.note or "")
    plain = Engine.load(tmp_path / "hf").__class__(Engine.load(tmp_path / "hf").model, Tokenizer.load(tmp_path / "hf"))
    assert SamplingFlags().over(plain.generation).is_greedy
    assert SamplingFlags().said(plain.generation) == "sampling: greedy"


def test_an_invalid_generation_config_is_named(tmp_path):
    weights.write(tmp_path / "hf", Bundle(small_tensors(), SMALL, small_tokenizer()), "hf")
    wrong = {"eos_token_id": "x", "do_sample": 1.5, "top_k": -1, "top_p": 1.5, "min_p": 1, "repetition_penalty": 0}
    for fault, value in wrong.items():
        values = {"do_sample": True} | {fault: value}
        (tmp_path / "hf/generation_config.json").write_text(json.dumps(values))
        with pytest.raises(InputFileError, match=rf"hf: generation_config: {fault} must be"):
            Engine.load(tmp_path / "hf")
    (tmp_path / "hf/generation_config.json").write_text("[]")
    with pytest.raises(InputFileError, match=r"generation_config\.json: must be a JSON object"):
        Engine.load(tmp_path / "hf")


def test_a_generation_config_is_read_as_in_transformers(tmp_path):
    weights.write(tmp_path / "hf", Bundle(small_tensors(), SMALL, small_tokenizer()), "hf")
    values = {"do_sample": True, "top_k": 50.0, "top_p": 0.0, "eos_token_id": [5, -1], "bos_token_id": -1}
    (tmp_path / "hf/generation_config.json").write_text(json.dumps(values))
    engine = Engine.load(tmp_path / "hf")
    assert engine.generation.eos_token_ids == (5,)  # -1 is no token
    drawn = dataclasses.replace(engine.defaults, seed=3)  # top_p 0 keeps the likeliest token alone
    texts = [engine.complete([[1, 2]], max_new_tokens=8, sampling=how)[0].text for how in (drawn, Sampling())]
    assert texts[0] == texts[1]


def test_sampling_keys_of_a_gguf_outside_their_range_are_read_as_in_llama_cpp(tmp_path):
    beyond = {"temp": -1.0, "top_k": -1, "top_p": 1.5, "min_p": -0.5}
    path = gguf(tmp_path / "x.gguf", **{f"general.sampling.{name}": value for name, value in beyond.items()})
    assert Engine.load(path).defaults == Sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
