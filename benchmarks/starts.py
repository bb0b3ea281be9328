"""Seconds from starting a process to what its user waits for: the first training step, or the first token."""

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.compare import ROOT, Backend, Rows, process_environment, with_ratios, write_weights
from smollm_jax import errors

if TYPE_CHECKING:
    from benchmarks.options import Flags

TEXT = "The capital of France is"
# By default JAX keeps only programs that took a second to compile.
KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
DEVICE = "import jax; device = jax.devices()[0]; print(device.platform, device.device_kind)"


def startup(flags: "Flags", folder: Path) -> tuple[str, Rows]:
    """Seconds from starting a process to the end of its first training step, with empty compilation caches and again.

    Ours is the trainer itself, on text that was tokenised before; the other backends are this script's.
    """

    weights = write_weights(flags.preset, folder)
    text, tokenizer = ROOT / "assets/sotu", ROOT / "assets/tokenizer"
    from smollm_jax.data.mixture import open_mixture

    open_mixture(text, tokenizer, Path("data"))
    train = [sys.executable, ROOT / "scripts/train_jax.py", "--init-from", weights, "--data", text]
    train += ["--tokenizer", tokenizer, "--steps", "1", "--batch-size", str(flags.batch_size), "--dtype", flags.dtype]
    train += ["--eval-every", "0"]  # the other backends do not validate before their first step either
    train += ["--sequence-length", str(flags.sequence_length)]
    train += [] if flags.remat is None else ["--remat", flags.remat]
    train += [] if flags.unroll is None else ["--unroll", str(flags.unroll)]
    device, times = "", {"cold": {name: [] for name in ("ours", *flags.others)}}
    times["warm"] = {name: [] for name in times["cold"]}

    def start_ours(run: str, cache: str) -> tuple[str, float]:
        """The device, and the seconds until the first step is done, without those that ending the process takes."""
        variables, found = process_environment(JAX_COMPILATION_CACHE_DIR=cache, **KEEP_ALL), ""
        began = time.perf_counter()
        with subprocess.Popen([*train, "--out", run], stdout=subprocess.PIPE, text=True, env=variables) as process:
            for line in process.stdout or ():
                found = line.split(None, 1)[1].split(",")[0] if line.startswith("device ") else found
                if line.startswith("step 1/1 "):
                    seconds = time.perf_counter() - began
                    process.kill()  # what it would save is not wanted
                    return found, seconds
        raise errors.SmolLMError("train_jax.py ended before its first step; what it said is above")

    for turn in range(flags.rounds):
        for name in times["cold"]:
            cache = str(folder / f"{name}-{turn}")
            for kind in ("cold", "warm"):
                if name == "ours":
                    device, seconds = start_ours(f"{folder}/run-{turn}-{kind}", cache)
                    times[kind][name].append(seconds)
                else:
                    began = time.perf_counter()
                    backend = Backend(
                        name,
                        flags.workload(name),
                        weights,
                        TORCHINDUCTOR_CACHE_DIR=cache,
                        TRITON_CACHE_DIR=f"{cache}-triton",
                    )
                    times[kind][name].append(time.perf_counter() - began)
                    backend.close()
    return device, with_ratios("cold seconds", times["cold"], min) | with_ratios("warm seconds", times["warm"], min)


def first_token(flags: "Flags", folder: Path) -> tuple[str, Rows]:
    """Seconds from starting a process to the first token it prints, with empty compilation caches and again.

    Ours is generate.py itself, the others the shortest scripts that do the same; they keep no compiled programs. Before
    anything is timed each runs once, so that no file is read from the disk later, and in float32 the tokens must agree.
    """
    weights = write_weights(flags.preset, folder, gguf="llamacpp" in flags.others, tokenizer=True)
    found = subprocess.run([sys.executable, "-c", DEVICE], check=True, capture_output=True, text=True)
    platform, device = found.stdout.strip().split(None, 1)
    if platform != "cpu" and "llamacpp" in flags.others:
        raise errors.UsageError(f"ours is on a {platform}, llamacpp on a cpu: not comparable")
    ours = ["--weights", weights, "--prompt", TEXT, "--max-new-tokens", "1", "--dtype", flags.dtype]
    scripts = {
        "ours": ["scripts/generate.py", *ours],
        "hf": ["benchmarks/hf_generate.py", weights, TEXT, flags.dtype, "cpu" if platform == "cpu" else "cuda"],
        "llamacpp": ["benchmarks/llamacpp_generate.py", weights / "model.gguf", TEXT],
    }
    commands = {name: [sys.executable, ROOT / script, *arguments] for name, (script, *arguments) in scripts.items()}
    names = ("ours", *flags.others)

    def start(name: str, cache: str) -> tuple[float, str]:
        variables = {"JAX_COMPILATION_CACHE_DIR": str(folder / cache), "HF_HOME": str(folder / "hf")}
        return until_token(name, commands[name], process_environment(**variables, **KEEP_ALL, HF_HUB_OFFLINE="1"))

    tokens = {name: start(name, "untimed")[1] for name in names}
    if flags.dtype == "float32":
        check_same_token(tokens)
    times = {kind: {name: [] for name in names} for kind in ("cold", "warm")}
    for turn in range(flags.rounds):
        for of_kind in times.values():
            for name in names:
                of_kind[name].append(start(name, f"cache-{turn}")[0])
    return device, with_ratios("cold seconds", times["cold"], min) | with_ratios("warm seconds", times["warm"], min)


def until_token(name: str, command: list[str | Path], variables: dict[str, str]) -> tuple[float, str]:
    """The seconds until a process prints something after the prompt, and that text; the process is killed then."""
    said, began = b"", time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, bufsize=0, env=variables
    ) as process:
        assert process.stdout
        while len(said) <= len(TEXT):
            if not (piece := process.stdout.read(4096)):
                raise errors.SmolLMError(f"{name} ended before its first token; what it said is above")
            said += piece
        seconds = time.perf_counter() - began
        process.kill()
    return seconds, said[len(TEXT) :].decode(errors="replace").removesuffix("\n")


def check_same_token(tokens: dict[str, str]) -> None:
    """Raises unless every backend printed ours' first token, and ours printed some."""
    for name, token in tokens.items():
        if token != tokens["ours"] or not token:
            raise errors.SmolLMError(
                f"the first token is {tokens['ours']!r} for ours and {token!r} for {name}: not the same work, so not "
                "compared"
            )
