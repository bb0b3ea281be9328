"""Measure one thing on our side and on PyTorch's, in turn in one run, medians with their spread.

    python scripts/benchmark.py train --against hf hf-compile            # seconds, tokens/s and MFU of optimizer steps
    python scripts/benchmark.py memory --sequence-length 2048            # the most memory such steps take
    python scripts/benchmark.py decode --new-tokens 64                   # tokens after a prompt of 16, greedy, cached
    python scripts/benchmark.py prefill --sequence-length 2048           # one forward pass that fills a cache
    python scripts/benchmark.py startup --against hf-compile --rounds 1  # process start to the end of the first step
    python scripts/benchmark.py checkpoint                               # what the manifest and the step's guard cost

Each side is a process of its own with the same seeded weights, tokens and optimizer (AdamW, clip 1.0, float32 state,
fused in PyTorch); losses that differ are refused before anything is timed. Prints a table and writes it, with versions
and the command, to benchmarks/. Only ratios of one run mean anything: machines are shared, their speed changes.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import tyro

from smollm_jax import cost, errors
from smollm_jax.config import preset
from smollm_jax.provenance import environment

ROOT = Path(__file__).resolve().parent.parent
PROMPT = 16  # tokens before the decoded ones
GEMM = 2048  # rows and columns of the matrix product timed beside each round: float32 on a CPU, bfloat16 on a GPU
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # between two sides' losses, relative
SETTINGS = ("JAX_PLATFORMS", "XLA_FLAGS", "GLIBC_TUNABLES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
Rows = dict[str, dict[str, float]]
Unit = Callable[[], dict[str, Any]]  # does one unit of work; what it says replaces what `work` measured


@dataclasses.dataclass(frozen=True)
class Flags:
    what: tyro.conf.Positional[Literal["train", "decode", "prefill", "startup", "memory", "checkpoint"]]
    """See above."""
    against: tuple[Literal["hf", "hf-compile", "twin", "twin-compile"], ...] = ("hf",)
    """transformers' LlamaForCausalLM with SDPA, or smollm_torch; "-compile": under torch.compile. None: ours alone."""
    preset: str = "smollm2-135m"
    """Model, with seeded random weights."""
    rounds: int = 5
    """Times each side is measured, after warming up."""
    batch_size: int = 1
    """Sequences at once."""
    sequence_length: int = 256
    """Tokens a sequence."""
    new_tokens: int = 64
    """Tokens to decode."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the products. In training weights and moments stay float32 (transformers: autocast); else weights too."""
    remat: bool = False
    """Ours only: recompute each layer in the backward pass."""
    unroll: int = 1
    """Ours only: layers laid out per step of the layer scan."""
    out: Path | None = None
    """JSON file to write."""
    debug: bool = False
    """Show a traceback instead of one line when something goes wrong."""


def main(argv: list[str] | None = None) -> None:
    flags = tyro.cli(Flags, args=argv, description=__doc__)
    check_flags(flags)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a time limit's: leave nothing behind
    measure = {"startup": startup, "memory": memory, "checkpoint": checkpoint}.get(flags.what, speed)
    with tempfile.TemporaryDirectory(dir=".", prefix=".benchmark-") as folder:  # on a disk: /tmp may be memory
        device, rows = measure(flags, Path(folder))
    for name, row in rows.items():
        print(f"{name:44} {'  '.join(f'{what} {value:.4g}' for what, value in row.items())}")
    size = f"{flags.batch_size}x{flags.new_tokens if flags.what == 'decode' else flags.sequence_length}"
    name = f"{flags.what}-{size}-{device.lower().replace(' ', '-')}-{time.strftime('%Y-%m-%d')}.json"
    out = flags.out or Path("benchmarks") / (name.replace(f"{size}-", "") if flags.what == "checkpoint" else name)
    versions = environment(device, 1)
    for package in ("torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    content = {
        "command": f"python scripts/benchmark.py {' '.join(argv if argv is not None else sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "environment": versions,
        "settings": {name: value for name, value in process_environment().items() if name in SETTINGS},
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {out}")


def check_flags(flags: Flags) -> None:
    for name in ("rounds", "batch_size", "sequence_length", "new_tokens", "unroll"):
        if getattr(flags, name) < 1:
            raise errors.UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(flags, name)}")
    if flags.what in ("decode", "prefill") and any(side.startswith("twin") for side in flags.against):
        raise errors.UsageError(f"{flags.what}: the twin has no cache; --against hf or hf-compile")
    longest = PROMPT + flags.new_tokens if flags.what == "decode" else flags.sequence_length
    if longest > (most := preset(flags.preset).max_position_embeddings):
        raise errors.UsageError(f"{longest} tokens exceed the {most} positions of {flags.preset}")


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# ------------------------------------------------------------------------------------------------------ the parent


class Side:
    """One side in a process of its own, ready: torch and JAX in one fight over cuDNN on a GPU (jax#19004)."""

    def __init__(self, name: str, flags: Flags, weights: Path, **environment: str):
        self.name = name
        job = json.dumps(dataclasses.asdict(flags) | {"out": None})
        command = [sys.executable, __file__, "--side", name, job, str(weights)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen(command, env=process_environment(**environment), **pipes)
        self.ready = self._answer()

    def go(self) -> dict[str, Any]:
        """What one unit of work took."""
        print("go", file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise errors.SmolLMError(f"side {self.name} ended with status {self.process.wait()}; what it said is above")


def process_environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # PyTorch's threads spin while they wait by default, for the core another process has: 20 times slower steps.
    ours = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    return {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | ours | more


def write_weights(flags: Flags, folder: Path) -> Path:
    """A Hugging Face folder of seeded weights, made in a process that leaves the GPU alone."""
    out = folder / "weights"
    command = [sys.executable, ROOT / "scripts/random_weights.py", "--preset", flags.preset, "--out", out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=process_environment(JAX_PLATFORMS="cpu"))
    return out


def check_equal(dtype: str, ready: dict[str, dict[str, Any]]) -> None:
    """Raises unless every side does what ours does: losses within `TOLERANCE`, on one kind of device.

    In float32 decoded token ids must be equal too; in bfloat16 rounding decides near-ties.
    """
    ours = ready["ours"]
    for name, other in ready.items():
        if ours["platform"] != other["platform"]:
            raise errors.UsageError(f"ours is on a {ours['platform']}, {name} on a {other['platform']}: not comparable")
        for step, (a, b) in enumerate(zip(ours["losses"], other["losses"], strict=True), 1):
            if not abs(a - b) <= TOLERANCE[dtype] * abs(b):  # a NaN too is refused
                raise errors.SmolLMError(
                    f"loss {step} is {a:.6f} for ours and {b:.6f} for {name}, apart by more than "
                    f"{TOLERANCE[dtype]:g} relative ({dtype}): not the same work, so not compared"
                )
        if dtype == "float32" and ours.get("ids") != other.get("ids"):
            raise errors.SmolLMError(f"ours and {name} decode different tokens: not the same work, so not compared")


def with_ratios(what: str, values: dict[str, list[float]]) -> Rows:
    """A row a side, and one of ours over each other side's, divided round by round."""
    rows = {f"{what}, {name}": spread(of_side) for name, of_side in values.items()}
    for name in [name for name in values if name != "ours"]:
        rows[f"{what}, ours / {name}"] = spread([a / b for a, b in zip(values["ours"], values[name], strict=True)])
    return rows


def speed(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """tokens/s first, then seconds, MFU, and beside each round what else moved: a lone GEMM, other processes."""
    weights = write_weights(flags, folder)
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in ("ours", *flags.against):
            print(f"{name}: preparing", flush=True)
            sides[name] = Side(name, flags, weights)
            stack.callback(sides[name].close)
        ready = {name: side.ready for name, side in sides.items()}
        check_equal(flags.dtype, ready)
        rounds = [{name: side.go() for name, side in sides.items()} for _ in range(flags.rounds)]
    device = ready["ours"]["device"]

    def each(value: Callable[[dict[str, Any]], float]) -> dict[str, list[float]]:
        return {name: [value(answers[name]) for answers in rounds] for name in sides}

    rows = with_ratios("tokens/s", each(lambda x: x["tokens"] / x["seconds"]))
    rest = {"seconds": each(lambda x: x["seconds"])}
    if flags.what == "train":
        # The convention: 3 x forward, every matrix product, the head's and attention's causal half too, no remat.
        flops = cost.flops_per_token(preset(flags.preset), flags.sequence_length)
        peak = cost.peak_flops(device) if flags.dtype == "bfloat16" else None
        title = "MFU of the bf16 peak" if peak else "MFU of the GEMM's speed"
        rest[title] = each(lambda x: flops * x["tokens"] / x["seconds"] / (peak or x["gemm"]))
    rest |= {"GEMM GFLOP/s": each(lambda x: x["gemm"] / 1e9), "cores others took": each(lambda x: x["others"])}
    for step in range(len(ready["ours"]["losses"])):
        rest[f"loss {step + 1}"] = {name: [ready[name]["losses"][step]] for name in sides}
    return device, rows | {f"{what}, {name}": spread(v) for what, of in rest.items() for name, v in of.items()}


def memory(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """The most memory of two training steps, compiling included: resident on a CPU, the allocator's peak on a GPU."""
    weights, names = write_weights(flags, folder), ("ours", *flags.against)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(flags.rounds):
        for name in names:
            side = Side(name, flags, weights)
            side.close()  # one at a time: two could be more than the machine has
            found[name].append(side.ready)
        check_equal(flags.dtype, {name: found[name][-1] for name in names})
    peaks = {name: [x["peak_bytes"] / 1e9 for x in of] for name, of in found.items()}
    rows = with_ratios("peak GB", peaks)
    for name, of in found.items():  # no ratio: PyTorch allocates AdamW's moments in the first step, we before it
        rows[f"GB above before the step, {name}"] = spread([(x["peak_bytes"] - x["before_bytes"]) / 1e9 for x in of])
    rows["GB of the compiled step, ours"] = spread([x["program_bytes"] / 1e9 for x in found["ours"]])
    return found["ours"][0]["device"], rows


def startup(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """Seconds from starting a process to the end of its first training step, with empty compilation caches and again.

    Ours is the trainer itself, on text that was tokenised before; the other sides are this script's.
    """
    from smollm_jax import data

    weights, text, tokenizer = write_weights(flags, folder), ROOT / "assets/sotu", ROOT / "assets/tokenizer"
    data.prepare(text, tokenizer, Path("data"))
    train = [sys.executable, ROOT / "scripts/train_jax.py", "--init-from", weights, "--data", text]
    train += ["--tokenizer", tokenizer, "--steps", "1", "--batch-size", str(flags.batch_size), "--dtype", flags.dtype]
    train += ["--sequence-length", str(flags.sequence_length), "--unroll", str(flags.unroll)]
    train += ["--remat"] * flags.remat
    device, times = "", {"cold": {name: [] for name in ("ours", *flags.against)}}
    times["warm"] = {name: [] for name in times["cold"]}

    def start_ours(run: str, cache: str) -> str:
        """The device; returns when the first step is done."""
        # By default JAX keeps only programs that took a second to compile.
        small = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
        variables, found = process_environment(JAX_COMPILATION_CACHE_DIR=cache, **small), ""
        with subprocess.Popen([*train, "--out", run], stdout=subprocess.PIPE, text=True, env=variables) as process:
            for line in process.stdout or ():
                found = line.split(None, 1)[1].split(",")[0] if line.startswith("device ") else found
                if line.startswith("step 1/1 "):
                    process.kill()  # what it would save is not wanted
                    return found
        raise errors.SmolLMError("train_jax.py ended before its first step; what it said is above")

    for turn in range(flags.rounds):
        for name in times["cold"]:
            cache = str(folder.resolve() / f"{name}-{turn}")
            for kind in ("cold", "warm"):
                began = time.perf_counter()
                if name == "ours":
                    device = start_ours(f"{folder}/run-{turn}-{kind}", cache)
                    times[kind][name].append(time.perf_counter() - began)
                else:
                    side = Side(name, flags, weights, TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}-triton")
                    times[kind][name].append(time.perf_counter() - began)
                    side.close()
    return device, with_ratios("cold seconds", times["cold"]) | with_ratios("warm seconds", times["warm"])


# --------------------------------------------------------------------------------------------- a side's own process


def work(name: str, job: str, weights: str) -> None:
    """Prepares one side, says so, then answers each line of stdin with what one unit of work took."""
    flags = Flags(**json.loads(job))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    unit, gemm, ready = (ours if name == "ours" else theirs)(name, flags, Path(weights))
    print(json.dumps(ready), file=answers, flush=True)
    for _ in sys.stdin:
        answer = {"gemm": max(timed_gemm(gemm) for _ in range(3)), "tokens": flags.batch_size * flags.sequence_length}
        began, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        said = unit()
        answer["seconds"] = seconds = time.perf_counter() - began
        answer["others"] = max(0.0, (busy_seconds() - busy - (time.process_time() - own)) / seconds)
        print(json.dumps(answer | said), file=answers, flush=True)


def timed_gemm(gemm: Callable[[], int]) -> float:
    """FLOP/s of a matrix product; `gemm` says how many it did."""
    began = time.perf_counter()
    return gemm() * 2 * GEMM**3 / (time.perf_counter() - began)


def busy_seconds() -> float:
    """How long this machine's cores have worked, for whatever process."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def resident(what: Literal["VmHWM", "VmRSS"]) -> int:
    """Bytes of this process in memory, at most and now. (`ru_maxrss` would start at its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def recipe_and_tokens(flags: Flags) -> tuple[Any, Any]:
    """The same for every side: AdamW's numbers, and seeded windows of T + 1 tokens."""
    import numpy as np

    from smollm_jax.recipe import Recipe

    length = PROMPT if flags.what == "decode" else flags.sequence_length
    recipe = Recipe(100_000, flags.batch_size, length, learning_rate=1e-3, warmup_steps=0, dtype=flags.dtype)
    vocabulary = preset(flags.preset).vocab_size
    return recipe, np.random.default_rng(0).integers(0, vocabulary, (flags.batch_size, length + 1), np.int32)


def decoded(pieces: list[Any], times: list[float]) -> dict[str, Any]:
    """What pieces of text, arrays `[B, n]`, say; the first, whose time holds the prefill, is not timed."""
    import numpy as np

    if len(pieces) < 2:
        raise errors.UsageError("--new-tokens: all of them come with the prompt; ask for more")
    tokens = sum(piece.size for piece in pieces[1:])
    return {"seconds": times[-1] - times[0], "tokens": tokens, "ids": np.concatenate(pieces, axis=1).tolist()}


def ours(name: str, flags: Flags, folder: Path) -> tuple[Unit, Callable[[], int], dict[str, Any]]:
    """The JAX side: a unit of work, a matrix product, and what it has to say before."""
    import jax
    import jax.numpy as jnp

    from smollm_jax import generate, optimizer, train, weights

    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    if flags.dtype == "float32":  # as the trainer does: on a GPU JAX's default is TF32
        jax.config.update("jax_default_matmul_precision", "float32")
    training = flags.what in ("train", "memory")
    recipe, tokens = recipe_and_tokens(flags)
    tokens = jnp.asarray(tokens)
    model, _ = weights.load(folder, jnp.dtype("float32" if training else flags.dtype))
    attention = "cudnn" if gpu and training and flags.dtype == "bfloat16" else "xla"  # the trainer's choice
    compute = train.Compute(flags.dtype, attention, remat=flags.remat, unroll=flags.unroll)
    square = jnp.ones((GEMM, GEMM), jnp.bfloat16 if gpu else jnp.float32)
    product, repeats = jax.jit(jnp.matmul), 200 if gpu else 1
    ready: dict[str, Any] = {"device": device.device_kind, "platform": device.platform}

    def gemm() -> int:
        out = square
        for _ in range(repeats):
            out = product(square, square)
        out.block_until_ready()
        return repeats

    if training:
        tx = optimizer.adamw(recipe)
        state = train.begin(model, tx)
        del model
        ready["before_bytes"] = device.memory_stats()["bytes_in_use"] if gpu else resident("VmRSS")
        compiled = train.train_step.lower(state, tokens, tx=tx, compute=compute).compile()

        def step() -> dict[str, Any]:
            nonlocal state
            state, metrics = compiled(state, tokens)
            jax.block_until_ready(state)
            return {"loss": float(metrics["loss"])}

        ready["losses"] = [step()["loss"], step()["loss"]]
        ready["peak_bytes"] = device.memory_stats()["peak_bytes_in_use"] if gpu else resident("VmHWM")
        sizes: Any = compiled.memory_analysis()
        inputs_and_outputs = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        ready["program_bytes"] = inputs_and_outputs + sizes.temp_size_in_bytes
        return step, gemm, ready

    def decode() -> dict[str, Any]:
        pieces, times = [], []
        for piece in generate.generate(model, tokens[:, :-1].tolist(), max_new_tokens=flags.new_tokens):
            pieces.append(piece)
            times.append(time.perf_counter())
        return decoded(pieces, times)

    def prefill() -> dict[str, Any]:
        start = jnp.zeros(flags.batch_size, jnp.int32)
        jax.block_until_ready(generate.prefill(model, tokens[:, :-1], start, slots=flags.sequence_length))
        return {}

    unit = decode if flags.what == "decode" else prefill
    ready["losses"] = [float(train.eval_step(model, tokens, compute))]
    return unit, gemm, ready | {"ids": unit().get("ids")}


def theirs(name: str, flags: Flags, folder: Path) -> tuple[Unit, Callable[[], int], dict[str, Any]]:
    """PyTorch's side: a unit of work, a matrix product, and what it has to say before."""
    import torch
    from transformers import CompileConfig, LlamaForCausalLM

    import smollm_torch.train
    from smollm_torch import weights

    gpu = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu"
    on, dtype, compiled = "cuda" if gpu else "cpu", getattr(torch, flags.dtype), name.endswith("-compile")
    wait = torch.cuda.synchronize if gpu else lambda: None
    training = flags.what in ("train", "memory", "startup")
    recipe, tokens = recipe_and_tokens(flags)
    tokens = torch.from_numpy(tokens).long().to(on)
    targets = tokens[:, 1:].contiguous()
    square = torch.ones((GEMM, GEMM), dtype=torch.bfloat16 if gpu else torch.float32, device=on)
    repeats = 200 if gpu else 1
    device = torch.cuda.get_device_name() if gpu else "cpu"
    ready: dict[str, Any] = {"device": device, "platform": "gpu" if gpu else "cpu"}

    def gemm() -> int:
        for _ in range(repeats):
            torch.mm(square, square)
        wait()
        return repeats

    if name.startswith("twin"):
        model: Any = weights.load(folder)[0].to(on)
        if compiled:
            smollm_torch.train.mean_loss = torch.compile(smollm_torch.train.mean_loss)
    else:
        kind = torch.float32 if training else dtype
        model = LlamaForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa")
        model.to(on)
        model.generation_config.eos_token_id = None  # so many tokens, whatever they are
    forward = torch.compile(model) if compiled and flags.what != "decode" else model

    def hf_loss() -> Any:
        with torch.autocast(on, dtype, enabled=training and flags.dtype == "bfloat16"):
            # `shift_labels`: transformers' own loss, of T positions as ours, not of T + 1 with the last one masked.
            return forward(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets, use_cache=False).loss

    if training:
        numbers = {"lr": recipe.learning_rate, "eps": recipe.eps, "weight_decay": recipe.weight_decay}
        adamw = torch.optim.AdamW(model.train().parameters(), betas=(recipe.beta1, recipe.beta2), fused=True, **numbers)

        def hf_step() -> float:
            adamw.zero_grad(set_to_none=True)
            loss = hf_loss()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            adamw.step()
            return float(loss.detach())

        def step() -> dict[str, Any]:
            twin = name.startswith("twin")
            loss = smollm_torch.train.train_step(model, adamw, tokens, recipe, 0)["loss"] if twin else hf_step()
            wait()
            return {"loss": loss}

        ready["before_bytes"] = torch.cuda.memory_allocated() if gpu else resident("VmRSS")
        ready["losses"] = [step()["loss"] for _ in range(1 if flags.what == "startup" else 2)]
        ready["peak_bytes"] = torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")
        return step, gemm, ready

    def decode() -> dict[str, Any]:
        clock = Clock()
        options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": flags.new_tokens}
        if compiled:
            options |= {"cache_implementation": "static", "compile_config": CompileConfig()}
            options["compile_config"]._compile_all_devices = True  # by default it compiles on a GPU only
        prompt = tokens[:, :-1]
        model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **options)
        return decoded(clock.pieces[1:], clock.times[1:])  # [0] is the prompt

    def prefill() -> dict[str, Any]:
        with torch.inference_mode():
            forward(input_ids=tokens[:, :-1], use_cache=True, logits_to_keep=1)
        wait()
        return {}

    unit = decode if flags.what == "decode" else prefill
    with torch.inference_mode():
        ready["losses"] = [float(hf_loss())]
    return unit, gemm, ready | {"ids": unit().get("ids")}


class Clock:
    """A streamer for transformers' `generate`, which shows it the prompt and then each token as it comes."""

    def __init__(self) -> None:
        self.pieces, self.times = [], []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())
        self.pieces.append(tokens.reshape(len(tokens), -1).numpy())

    def end(self) -> None:
        pass


# ------------------------------------------------------------------------------------------------------ checkpoints


def alternate(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds each side took in each round, the sides in turn; the first round, which compiles, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in seconds.items()}


def checkpoint(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """What the manifest adds to a save and to a restore, and the check for finite numbers to a step."""
    import jax
    import numpy as np
    import optax

    from smollm_jax import integrity, optimizer, train
    from smollm_jax.checkpoint import CheckpointStore, flatten

    recipe, tokens = recipe_and_tokens(flags)
    tokens, tx, compute = jax.numpy.asarray(tokens), optimizer.adamw(recipe), train.Compute("float32")
    state = train.begin(train.fresh(preset(flags.preset), 0), tx)

    @functools.partial(jax.jit, donate_argnums=0)
    def unguarded(state: train.TrainState) -> train.TrainState:
        gradients: Any
        _, gradients = train.mean_gradients(state.model, tokens, compute)
        model: Any = state.model
        updates, opt_state = tx.update(gradients, state.opt_state, model)
        return train.TrainState(optax.apply_updates(model, updates), opt_state)  # pyright: ignore[reportArgumentType]

    states = {"guarded": state, "unguarded": jax.tree.map(jax.numpy.copy, state)}

    def step(name: str) -> None:
        if name == "guarded":
            states[name], _ = train.train_step(states[name], tokens, tx=tx, compute=compute)
        else:
            states[name] = unguarded(states[name])
        jax.block_until_ready(states[name])

    del state
    seconds = alternate({name: functools.partial(step, name) for name in states}, flags.rounds)
    state = states.pop("guarded")  # moments that are no longer zero, which would compress to nothing

    items = {"params": flatten(state.model), "optimizer": flatten(state.opt_state)}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), items)
    sealing, seal = [], integrity.seal

    def timed_seal(folder: Path, about: dict[str, Any]) -> None:
        began = time.perf_counter()
        seal(folder, about)
        sealing.append(time.perf_counter() - began)

    integrity.seal = timed_seal
    with CheckpointStore(folder / "checkpoints", keep=1) as store:
        sides = {
            "save": lambda: store.save(len(sealing) + 1, items, {}),
            "verify": lambda: store.verify(store.latest_step()),
            "restore": lambda: jax.block_until_ready(store.restore(store.latest_step(), like)),
        }
        seconds |= alternate(sides, flags.rounds)
    integrity.seal = seal

    ratios = {
        "manifest / save": np.divide(sealing[1:], seconds["save"]),
        "verify / save": np.divide(seconds["verify"], seconds["save"]),
        "step guarded / unguarded": np.divide(seconds["guarded"], seconds["unguarded"]),
    }
    rows = {f"{name}, seconds": spread(times) for name, times in {**seconds, "manifest": sealing[1:]}.items()}
    rows |= {name: spread([float(x) for x in ratio]) for name, ratio in ratios.items()}
    return jax.devices()[0].device_kind, rows


if __name__ == "__main__":
    errors.run(functools.partial(work, *sys.argv[2:]) if sys.argv[1:2] == ["--side"] else main)
