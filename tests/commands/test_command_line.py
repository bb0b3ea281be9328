"""A wrong command line gives a one-line error that names the right flag; a missing package gives its pip command."""

import contextlib
import importlib
import io
import re
import shlex
import sys
from importlib import metadata

import pytest

from smollm_jax.commands import command_line
from smollm_jax.commands.flag_names import SYNONYMS, UNSUPPORTED
from smollm_jax.errors import UsageError
from smollm_jax.runtime import install
from smollm_jax.runtime.invocation import VERBS
from tests.commands.test_scripts import SCRIPTS


def flags_of(script: str) -> type:
    """The dataclass of a script's flags, from the module that defines its `main`."""
    module = sys.modules[importlib.import_module(f"scripts.{script}").main.__module__]
    return module.TrainingFlags if script == "train_jax" else module.Flags


KINDS = {path.stem: flags_of(path.stem) for path in SCRIPTS}
THEIRS = {name for row in (*SYNONYMS, *UNSUPPORTED) for name in row.theirs.split()}


def refused(script: str, *line: str) -> str:
    with pytest.raises(UsageError) as caught:
        command_line.parse(KINDS[script], list(line), None)
    message = str(caught.value)
    assert "\n" not in message
    assert not set("│╭─") & set(message)
    assert message.endswith(" --help)")
    return message.rpartition(" (all flags:")[0]


@pytest.mark.parametrize("script", KINDS)
def test_every_suggestion_names_flags_that_the_script_has(script):
    ours = command_line.flag_names(KINDS[script])
    elsewhere = {instead for _, _, instead in UNSUPPORTED}  # sentences, about other scripts too
    for name in THEIRS - set(ours):
        advice = command_line.suggestion(KINDS[script], name)
        if advice and advice not in elsewhere:
            flags = re.findall(r"--([\w-]+)", advice) + re.findall(r"\b([A-Z]+) without a flag", advice)
            assert flags, advice
            assert {flag.lower() for flag in flags} <= set(ours), (name, advice)


@pytest.mark.parametrize(
    ("script", "old", "field"),
    [
        ("train_jax", "--keep", "keep_checkpoints"),
        ("finetune", "--keep", "keep_checkpoints"),
        ("train_jax", "--reference", "compare_with"),
        ("app", "--queue", "max_queue"),
        ("app", "--loaded", "max_loaded"),
        ("compile_for_gpu", "--kernels", "top_kernels"),
    ],
)
def test_a_flag_s_old_spelling_still_sets_it(script, old, field):
    flags = command_line.parse(KINDS[script], [old, "7"], None)
    assert str(getattr(flags, field)) == "7"


def test_every_row_of_the_table_is_of_use():
    known = set().union(*map(command_line.flag_names, KINDS.values()))
    assert {flag for row in SYNONYMS for flag in row.ours.split()} <= known
    assert {row.required_flag for row in UNSUPPORTED} - {""} <= known
    used = {command_line.suggestion(kind, name) for kind in KINDS.values() for name in THEIRS}
    assert not {row.advice for row in UNSUPPORTED} - used


@pytest.mark.parametrize(
    ("script", "line", "message"),
    [
        ("train_jax", "--lr 1e-3", "--lr: no such flag; use --learning-rate"),
        ("train_jax", "--lora-r 8", "--lora-r: no such flag; finetune.py --lora-rank trains adapters"),
        ("finetune", "--lora-r 8", "--lora-r: no such flag; use --lora-rank (a number, such as 16)"),
        ("finetune", "--dropout 0.1", "--dropout: no such flag; use --lora-dropout"),
        ("app", "--lora x", "--lora: no such flag; use --adapter"),
        ("train_jax", "--lr=1e-3", "--lr: no such flag; use --learning-rate"),
        ("train_jax", "--num_train_epochs 3", "--num_train_epochs: no such flag; use --steps (steps are counted"),
        ("train_jax", "--per-device-train-batch-size 8", "use --batch-size"),
        ("train_jax", "--grad-accum 2", "use --gradient-accumulation-steps"),
        ("train_jax", "--model org/name", "use --init-from or --preset"),
        ("train_jax", "--output-dir x", "use --out"),
        ("train_jax", "--bf16", "use --dtype bfloat16"),
        ("train_jax", "--optim adamw", "the optimizer is AdamW"),
        ("train_jax", "--device cuda", "JAX takes the GPU where it finds one"),
        ("train_jax", "--learnin-rate 1", "perhaps --learning-rate"),
        ("train_jax", "-learning-rate 1", "use --learning-rate"),
        ("train_jax", "--lr 3 --bs 4", "--lr: no such flag; use --learning-rate; --bs: no such flag; use --batch-size"),
        ("generate", "--model x --prompt a", "--model: no such flag; use --weights"),
        ("generate", "--weights x -n 5", "-n: no such flag; use --max-new-tokens"),
        ("generate", "--weights x --max-length 5", "use --max-new-tokens"),
        ("generate", "--weights x --nucleus 1", "use --top-p"),
        ("chat", "--ckpt x", "use --weights"),
        ("evaluate", "--weights x --data y --block-size 9", "use --length"),
        ("prepare_data", "x --num-proc 4", "use --workers"),
        ("convert_weights", "--input a --output b", "use SRC without a flag; --output: no such flag; use DST"),
        ("convert_weights", "--src a b", "give SRC without a flag"),
        ("generate", "--weights x --qqqq 1", "--qqqq: no such flag"),
        ("generate", "", "missing --weights PATH"),
        ("generate", "--weights x --dtype int8", "invalid choice 'int8' for argument '--dtype'"),
        (
            "convert_weights",
            "a b --to x",
            "Expected one of ('gguf', 'gguf-adapter', 'hf', 'orbax', 'pt', 'safetensors').",
        ),
        ("generate", "--weights x --top-k one", "--top-k: invalid literal"),
        ("generate", "--weights x y", "not understood: y"),
    ],
)
def test_a_wrong_line_is_one_line_that_says_what_is_right(script, line, message):
    assert message in refused(script, *line.split())


def test_a_value_that_looks_like_another_tools_flag_is_a_value():
    flags = command_line.parse(KINDS["generate"], ["--weights", "x", "--prompt=--lr", "--stop", "a --lr"], None)
    assert flags.prompt == ("--lr",)
    assert flags.stop == ("a --lr",)


@pytest.mark.parametrize("extra", ["web", "plot", "cuda13"])
def test_a_missing_extra_is_named_by_a_command_that_works_here(extra, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shlex.split(install.command(extra)) == ["pip", "install", "-e", f"{install.CHECKOUT}[{extra}]"]
    monkeypatch.chdir(install.CHECKOUT)
    assert install.command(extra) == f"pip install -e '.[{extra}]'"
    # Installed from a wheel: the packages by name, since no registry has smollm-jax.
    required = ["numpy>=2", 'gradio<7,>=6.31; extra == "web"', "matplotlib>=3.9 ; extra == 'plot'"]
    required += ['jax[cuda13]>=0.10.2; extra == "cuda13"', 'pyarrow; extra == "cuda12"']
    monkeypatch.setattr(install, "CHECKOUT", tmp_path)
    monkeypatch.setattr(metadata, "requires", lambda name: required)
    packages = {"web": "gradio<7,>=6.31", "plot": "matplotlib>=3.9", "cuda13": "jax[cuda13]>=0.10.2"}
    assert shlex.split(install.command(extra)) == ["pip", "install", packages[extra]]


@pytest.mark.parametrize("script", ["train_torch", "parity_report"])
def test_without_pytorch_what_needs_it_says_how_to_get_it(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # what Python itself takes for a module that is not there
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    line = {"train_torch": ["--like", "x", "--out", "y"], "parity_report": ["--weights", "x"]}[script]
    with pytest.raises(UsageError, match=rf"{script}\.py needs the extra 'torch': pip install"):
        importlib.import_module(f"scripts.{script}").main(line)


def test_no_message_names_a_package_that_no_registry_has():
    paths = [path for folder in ("smollm_jax", "scripts") for path in (install.CHECKOUT / folder).rglob("*.py")]
    assert not [path for path in paths if "pip install smollm" in path.read_text(encoding="utf-8")]
    named = {
        name
        for path in paths
        for name in re.findall(r"install\.(?:needs|command)\(.*?['\"](\w+)['\"]\)", path.read_text())
    }
    assert named >= {"web", "plot", "export", "eval"}


def leaves(kind: type) -> list[str]:
    return [field.name for field, _ in command_line._fields(kind)]


@pytest.mark.parametrize("script", KINDS)
def test_the_help_shows_every_flag_once_under_its_title_and_no_default_of_none(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"scripts/{script}.py"])
    output = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # boxes are drawn with lines
    kind = KINDS[script]
    groups = command_line.groups_of(kind)
    if groups:
        assert sorted(name for names in groups.values() for name in names) == sorted(leaves(kind))
    else:
        assert len(leaves(kind)) <= 7 or script not in VERBS.values(), "a long list of flags is shown in groups"
    with pytest.raises(SystemExit), contextlib.redirect_stdout(output):
        command_line.parse(kind, ["--help"], "Text.")
    output.seek(0)
    help_text = output.read()
    assert "default: None" not in help_text
    assert "{None" not in help_text
    titles: dict[str, list[str]] = {}
    for line in help_text.splitlines():
        if title := re.match(r"[╭+][─-] (\w[\w ]*?) [─-]+", line):
            box = titles.setdefault(title[1], [])
        elif flags := re.match(r"[│|] (--?\w.*?)(?:  |$)", line):
            box += re.findall(r"--([a-z][\w-]*)", flags[1])
    positional = {name for name, without in command_line.flag_names(kind).items() if without}
    expected = {title: {name.replace("_", "-") for name in names} for title, names in groups.items()}
    for title, names in expected.items():
        assert names - positional <= set(titles.get(f"{title} options", ())), title
    flags = sorted(flag for box in titles.values() for flag in box)
    assert len(flags) == len(set(flags))
    assert set(flags) | positional >= {name.replace("_", "-") for name in leaves(kind)}
    if groups:
        assert titles["options"] == ["help"]


def test_help_as_a_value_is_a_value():
    flags = command_line.parse(KINDS["prepare_data"], ["--out", "x", "--", "--help"], None)
    assert flags.sources == ("--help",)


@pytest.mark.parametrize("script", KINDS)
def test_the_examples_keep_their_lines(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"scripts/{script}.py"])
    docstring = sys.modules[importlib.import_module(f"scripts.{script}").main.__module__].__doc__
    assert docstring
    with pytest.raises(SystemExit):
        command_line.parse(KINDS[script], ["--help"], docstring)
    examples = [line for line in docstring.splitlines() if re.match(r"    \S", line)]
    assert any("python scripts/" in line for line in examples)
    assert set(examples) <= set(capsys.readouterr().out.splitlines())
