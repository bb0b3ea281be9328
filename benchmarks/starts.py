"""The subjects "startup" and "first-token": seconds from process start to the first training step or first token."""

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
# By default JAX caches only programs that took a second or more to compile.
KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
DEVICE = "import jax; device = jax.devices()[0]; print(device.platform, device.device_kind)"


def startup(flags: "Flags", folder: Path) -> tuple[str, Rows]:
    """Seconds from process start to the end of the first training step: cold (empty compilation caches), then warm.

    Ours is the trainer itself, on text that is tokenised already; the others are the benchmark's own backends.
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
    device, times = "", {"cold": {name: [] for name in ("ours", *flags.baselines)}}
    times["warm"] = {name: [] for name in times["cold"]}

    def start_ours(run: str, cache: str) -> tuple[str, float]:
        """The device, and the seconds until the first step is done; ending the process is not timed."""
        variables, device = process_environment(JAX_COMPILATION_CACHE_DIR=cache, **KEEP_ALL), ""
        began = time.perf_counter()
        with subprocess.Popen([*train, "--out", run], stdout=subprocess.PIPE, text=True, env=variables) as process:
            for line in process.stdout or ():
                device = line.split(None, 1)[1].split(",")[0] if line.startswith("device ") else device
                if line.startswith("step 1/1 "):
                    seconds = time.perf_counter() - began
                    process.kill()  # its checkpoint is not needed
                    return device, seconds
        raise errors.SmolLMError("train_jax.py ended before its first step; its output is above")

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
    """Seconds from process start to the first printed token: cold (empty compilation caches), then warm.

    Ours is generate.py itself, the others are minimal scripts that cache no compiled programs. Each runs once untimed,
    so that all files are in the page cache; in float32 these runs must print the same token.
    """
    weights = write_weights(flags.preset, folder, gguf="llamacpp" in flags.baselines, tokenizer=True)
    printed = subprocess.run([sys.executable, "-c", DEVICE], check=True, capture_output=True, text=True)
    platform, device = printed.stdout.strip().split(None, 1)
    if platform != "cpu" and "llamacpp" in flags.baselines:
        raise errors.UsageError(f"ours is on a {platform}, llamacpp on a cpu: not comparable")
    ours = ["--weights", weights, "--prompt", TEXT, "--max-new-tokens", "1", "--dtype", flags.dtype]
    scripts = {
        "ours": ["scripts/generate.py", *ours],
        "hf": ["benchmarks/hf_generate.py", weights, TEXT, flags.dtype, "cpu" if platform == "cpu" else "cuda"],
        "llamacpp": ["benchmarks/llamacpp_generate.py", weights / "model.gguf", TEXT],
    }
    commands = {name: [sys.executable, ROOT / script, *arguments] for name, (script, *arguments) in scripts.items()}
    names = ("ours", *flags.baselines)

    def start(name: str, cache: str) -> tuple[float, str]:
        variables = {"JAX_COMPILATION_CACHE_DIR": str(folder / cache), "HF_HOME": str(folder / "hf")}
        return until_token(name, commands[name], process_environment(**variables, **KEEP_ALL, HF_HUB_OFFLINE="1"))

    tokens = {name: start(name, "untimed")[1] for name in names}
    if flags.dtype == "float32":
        check_same_token(tokens)
    times = {kind: {name: [] for name in names} for kind in ("cold", "warm")}
    for turn in range(flags.rounds):
        for seconds in times.values():
            for name in names:
                seconds[name].append(start(name, f"cache-{turn}")[0])
    return device, with_ratios("cold seconds", times["cold"], min) | with_ratios("warm seconds", times["warm"], min)


def until_token(name: str, command: list[str | Path], variables: dict[str, str]) -> tuple[float, str]:
    """The seconds until a process prints something after the prompt, and that text. Kills the process then."""
    output, began = b"", time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, bufsize=0, env=variables
    ) as process:
        assert process.stdout
        while len(output) <= len(TEXT):
            if not (piece := process.stdout.read(4096)):
                raise errors.SmolLMError(f"{name} ended before its first token; its output is above")
            output += piece
        seconds = time.perf_counter() - began
        process.kill()
    return seconds, output[len(TEXT) :].decode(errors="replace").removesuffix("\n")


def check_same_token(tokens: dict[str, str]) -> None:
    """Raises unless every backend printed the same first token, and not an empty one."""
    for name, token in tokens.items():
        if token != tokens["ours"] or not token:
            raise errors.SmolLMError(
                f"the first token is {tokens['ours']!r} for ours and {token!r} for {name}: not the same work, so not "
                "compared"
            )
