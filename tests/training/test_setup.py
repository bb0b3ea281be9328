"""What a run chooses for a GPU, which is only described here."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from benchmarks import subjects
from scripts import benchmark
from smollm_jax.commands import plan_memory
from smollm_jax.config import Recipe, preset
from smollm_jax.errors import SmolLMError, UsageError
from smollm_jax.model.attention import cudnn_device_problem, cudnn_shape_problem
from smollm_jax.training import memory
from smollm_jax.training import setup as training_setup
from smollm_jax.training.announce import announce
from smollm_jax.training.execution import ExecutionConfig, Intervals
from smollm_jax.training.flags import TrainingFlags

ASSETS = Path(__file__).parents[2] / "assets"
CONFIG = preset("smollm2-135m")
RECIPE = Recipe(10, 4, 2048, learning_rate=1e-3, warmup_steps=0, dtype="bfloat16")


def gpu(capability: str | None = "9.0", **more: Any) -> Any:
    if capability is not None:
        more["compute_capability"] = capability
    return SimpleNamespace(platform="gpu", device_kind="No GPU of this world", **more)


@pytest.fixture(params=[(0, 10, 2), (0, 11, 2)], ids=["jax 0.10", "jax 0.11"])
def jax_version(request, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", request.param)
    monkeypatch.setattr(jax, "__version__", ".".join(map(str, request.param)))
    return request.param


@pytest.mark.parametrize(
    ("device", "dtype", "message"),
    [
        (gpu("8.0"), "bfloat16", ""),
        (gpu("10.3"), "bfloat16", ""),
        (gpu("7.5"), "bfloat16", "needs compute capability 8.0 or later, not 7.5"),
        (gpu("gfx90a"), "bfloat16", "needs a CUDA GPU whose compute capability is a number, not gfx90a"),
        (gpu("9.0a"), "bfloat16", "needs a CUDA GPU whose compute capability is a number, not 9.0a"),
        (gpu(None), "bfloat16", "needs a CUDA GPU whose compute capability is a number, not None"),
        (gpu(), "float32", "needs a CUDA GPU and bfloat16, not gpu, float32"),
        (SimpleNamespace(platform="cpu"), "bfloat16", "needs a CUDA GPU and bfloat16, not cpu, bfloat16"),
    ],
)
def test_cudnn_runs_on_cuda_gpus_from_ampere_on(device, dtype, message):
    assert cudnn_device_problem(device, dtype) == message


@pytest.mark.parametrize("length", [1, 2, 64, 65, 127, 1000, 2047, 2048])
def test_cudnn_takes_every_even_causal_length(length, jax_version):
    message = f"needs an even --sequence-length, not {length}"
    assert cudnn_shape_problem(length, 64, documents=False) == (message if length % 2 else "")


@pytest.mark.parametrize("length", [64, 65, 127, 192, 1000, 2047, 2112])
def test_cudnn_takes_documents_in_multiples_of_128_tokens_alone(length, jax_version):
    message = f"with --mask-documents needs a --sequence-length that is a multiple of 128, not {length}"
    assert cudnn_shape_problem(length, 64, documents=True) == message


def test_cudnn_takes_documents_where_jax_leaves_the_masks_gradient_out(jax_version):
    old = "with --mask-documents needs jax 0.11, not 0.10.2, which adds the mask's gradient"
    assert cudnn_shape_problem(2048, 64, documents=True) == (old if jax_version < (0, 11) else "")


@pytest.mark.parametrize(
    ("head_dim", "fits"), [(16, True), (64, True), (128, True), (80, True), (60, False), (256, False)]
)
def test_cudnn_takes_heads_of_a_multiple_of_8_up_to_128(head_dim, fits):
    message = f"needs a head_dim that is a multiple of 8, up to 128, not {head_dim}"
    assert cudnn_shape_problem(2048, head_dim, documents=False) == ("" if fits else message)


def chosen(device: Any, attention: Any = None, **changes: Any) -> tuple[str, str]:
    flags, recipe = TrainingFlags(attention=attention), dataclasses.replace(RECIPE, **changes)
    return training_setup._attention(flags, recipe, CONFIG, device)


def test_a_gpu_attends_by_cudnn_where_it_runs_and_else_in_blocks_and_says_why(jax_version):
    assert chosen(gpu()) == ("cudnn", "")
    assert chosen(gpu(), sequence_length=1000) == ("cudnn", "")
    assert chosen(gpu(), sequence_length=1001) == ("xla", "needs an even --sequence-length, not 1001")
    assert chosen(gpu("gfx90a")) == ("xla", cudnn_device_problem(gpu("gfx90a"), "bfloat16"))
    assert chosen(gpu(), mask_documents=True, sequence_length=1000) == (
        "xla",
        cudnn_shape_problem(1000, 64, documents=True),
    )
    assert chosen(gpu(), mask_documents=True)[0] == ("xla" if jax_version < (0, 11) else "cudnn")
    assert chosen(SimpleNamespace(platform="cpu"), dtype="float32") == ("xla", ""), "nobody expected it there"


@pytest.mark.parametrize("attention", ["xla", "cudnn"])
def test_the_attention_that_was_asked_for_is_taken_or_refused(attention, jax_version):
    assert chosen(gpu(), attention) == (attention, "")
    for device, changes, message in (
        (
            gpu(),
            {"mask_documents": True, "sequence_length": 1000},
            "--mask-documents .*--sequence-length .* 128, not 1000",
        ),
        (gpu("gfx90a"), {}, "not gfx90a"),
        (gpu("7.5"), {}, "not 7.5"),
    ):
        if attention == "xla":
            assert chosen(device, attention, **changes) == ("xla", "")
        else:
            with pytest.raises(
                UsageError, match=rf"^--attention cudnn .*{message}.*; leave it out to use XLA's blocked attention$"
            ):
                chosen(device, attention, **changes)


def announced(capsys, tmp_path, **settings: Any) -> list[str]:
    start = SimpleNamespace(config=CONFIG, recipe=RECIPE, bundle=None, restored=None, defaults="")
    execution = ExecutionConfig("bfloat16", "xla")
    setup = training_setup.Setup(
        **{"start": start, "recipe_name": "gpu-demo", "execution": execution, "intervals": Intervals(500, 250)}
        | {"limit": 80 << 30, "planned": 20 << 30, "tokenizer": None, "compare_with": None}
        | settings  # pyright: ignore
    )
    announce(tmp_path, TrainingFlags(), setup, gpu(), retained=False)
    return capsys.readouterr().out.splitlines()


def test_what_is_announced_says_why_a_gpu_attends_in_blocks(capsys, tmp_path):
    (line,) = [
        line for line in announced(capsys, tmp_path, why_not_cudnn="needs rest") if line.startswith("precision ")
    ]
    assert "attention xla (cudnn needs rest);" in line
    (line,) = [line for line in announced(capsys, tmp_path) if line.startswith("precision ")]
    assert "attention xla; " in line


STATISTICS = {"none": None, "empty": {}, "no limit": {"bytes_in_use": 1 << 20}}


@pytest.mark.parametrize("statistics", STATISTICS.values(), ids=STATISTICS)
def test_memory_that_jax_does_not_tell_is_unknown_and_no_step_is_refused_for_it(monkeypatch, statistics):
    assert memory.device_limit(gpu(memory_stats=lambda: {"bytes_limit": 7})) == 7
    assert memory.device_limit(gpu(memory_stats=lambda: statistics), 4) == 0
    step = object()
    monkeypatch.setattr(memory.train_step, "compile_step", lambda *_: step)
    monkeypatch.setattr(memory, "compiled_bytes", lambda _: 10**9)
    assert memory.compile_within(0, CONFIG, RECIPE, ExecutionConfig("bfloat16"), "gpu") is step
    with pytest.raises(UsageError, match=r"needs 1\.00 GB on each device, which has 0\.50 GB"):
        memory.compile_within(5 * 10**8, CONFIG, RECIPE, ExecutionConfig("bfloat16"), "gpu")


def test_auto_asks_for_a_number_where_jax_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu(memory_stats=lambda: None)])
    flags = {"preset": "tiny", "sequence_length": 128, "tokenizer": ASSETS / "tokenizer", "steps": 10}
    with pytest.raises(
        UsageError, match=r"^--batch-size auto: JAX does not report .* No GPU of this world has; give a number$"
    ):
        training_setup.set_up(TrainingFlags(batch_size="auto", **flags), tmp_path, None)
    setup = training_setup.set_up(TrainingFlags(batch_size=4, **flags), tmp_path, None)
    assert (setup.limit, setup.start.recipe.batch_size, setup.execution.attention) == (0, 4, "cudnn")


def test_what_is_announced_says_that_memory_is_unchecked(capsys, tmp_path):
    (line,) = [line for line in announced(capsys, tmp_path, limit=0) if line.startswith("memory ")]
    assert "21.5 GB on each device (estimated; not checked, as JAX reports no limit), remat" in line
    (line,) = [line for line in announced(capsys, tmp_path) if line.startswith("memory ")]
    assert "21.5 GB of 85.9 GB on each device (estimated), remat" in line


def test_a_plan_asks_for_memory_where_jax_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "device_limit", lambda *_: 0)
    monkeypatch.setattr(type(jax.config), "update", lambda *_: None)  # too late in this process
    with pytest.raises(UsageError, match=r"^JAX does not say how much memory cpu has: give --memory$"):
        plan_memory.main(["--preset", "tiny", "--sequence-length", "64"])


@pytest.mark.parametrize("unknown", ["before_bytes", "peak_bytes"])
def test_a_benchmark_of_memory_that_nobody_counts_is_refused(monkeypatch, tmp_path, unknown):
    ready = {"before_bytes": 1, "peak_bytes": 2} | {unknown: None}
    monkeypatch.setattr(subjects, "write_weights", lambda *_: tmp_path)
    monkeypatch.setattr(subjects, "Backend", lambda *_: SimpleNamespace(ready=ready, close=lambda: None))
    with pytest.raises(SmolLMError, match=r"^memory of ours is unknown: its allocator keeps no statistics$"):
        subjects.memory(benchmark.Flags("memory"), tmp_path)
