"""One function per subject of scripts/benchmark.py: it starts the backends, alternates them and returns rows."""

import contextlib
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.compare import Backend, Rows, check_equal, peak_memory, spread, with_ratios, write_weights
from benchmarks.options import LLAMACPP, Flags
from smollm_jax import errors
from smollm_jax.config import preset
from smollm_jax.data.text import documents
from smollm_jax.data.text_sources import text_files
from smollm_jax.model import cost


def _started(flags: Flags, weights: Path, stack: contextlib.ExitStack) -> dict[str, Backend]:
    """Our backend and the baselines, each ready; `stack` closes them."""
    backends: dict[str, Backend] = {}
    for name in ("ours", *flags.baselines):
        print(f"{name}: preparing", flush=True)
        backends[name] = Backend(name, flags.workload(name), weights)
        stack.callback(backends[name].close)
    return backends


def speed(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """tokens/s, seconds, FLOP/s and MFU; the speed of a GEMM and the cores of other processes show how busy it was."""
    kernels = flags.what in ("loss", "attention", "packed", "gemm")
    gguf = any(name in LLAMACPP for name in flags.baselines)
    weights = folder if kernels else write_weights(flags.preset, folder, gguf=gguf)
    with contextlib.ExitStack() as stack:
        backends = _started(flags, weights, stack)
        ready = {name: backend.ready for name, backend in backends.items()}
        check_equal({name: flags.dtype_of(name) for name in backends}, ready)
        rounds = [{name: backend.run_once() for name, backend in backends.items()} for _ in range(flags.rounds)]
    device = ready["ours"]["device"]

    def per_backend(value: Callable[[dict[str, Any]], float]) -> dict[str, list[float]]:
        return {name: [value(answers[name]) for answers in rounds] for name in backends}

    if flags.what == "gemm":
        rows: Rows = {}
        for name in rounds[0]["ours"]["rates"]:
            rows |= with_ratios(f"GFLOP/s {name}", per_backend(lambda x, name=name: x["rates"][name] / 1e9))
        rows |= with_ratios("ceiling tokens/s", per_backend(lambda x: x["tokens"] / x["seconds"]))
        columns = {}
    else:
        rows = with_ratios("tokens/s", per_backend(lambda x: x["tokens"] / x["seconds"]))
        columns = {"seconds": per_backend(lambda x: x["seconds"])}
    if flops := ready["ours"].get("flops"):
        columns["GFLOP/s"] = per_backend(lambda x: flops / x["seconds"] / 1e9)
    if flags.what == "train":
        # The usual convention: 3 x forward, all matmuls with the head's and the causal half of attention's, no remat.
        flops = cost.flops_per_token(preset(flags.preset), flags.sequence_length)
        peak = cost.peak_flops(device, flags.dtype)
        title = "MFU of the bf16 peak" if peak else "MFU of the GEMM's speed"
        columns[title] = per_backend(lambda x: flops * x["tokens"] / x["seconds"] / (peak or x["gemm"]))
    columns |= {
        "GEMM GFLOP/s": per_backend(lambda x: x["gemm"] / 1e9),
        "cores others took": per_backend(lambda x: x["others"]),
    }
    for step in range(len(ready["ours"]["losses"])):
        columns[f"loss {step + 1}"] = {name: [ready[name]["losses"][step]] for name in backends}
    return device, rows | {
        f"{what}, {name}": spread(values) for what, column in columns.items() for name, values in column.items()
    }


def finetune(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """Learnt tokens/s of fine-tuning steps on the same chats, and the peak memory of each backend."""
    weights = write_weights(flags.preset, folder)
    with contextlib.ExitStack() as stack:
        backends = _started(flags, weights, stack)
        ready = {name: backend.ready for name, backend in backends.items()}
        for name in flags.baselines:
            for kind, loss in ready[name]["by_rows"].items():
                ours = ready["ours"] | {"losses": [ready["ours"]["by_rows"][kind]]}
                theirs = ready[name] | {"losses": [loss]}
                check_equal({"ours": flags.dtype, name: flags.dtype}, {"ours": ours, name: theirs})
        rounds = [{name: backend.run_once() for name, backend in backends.items()} for _ in range(flags.rounds)]
    speeds = {name: [answers[name]["tokens"] / answers[name]["seconds"] for answers in rounds] for name in backends}
    peaks = {name: [ready[name]["peak_bytes"] / 1e9] for name in backends}
    rows = with_ratios("learnt tokens/s", speeds) | with_ratios("peak GB", peaks, min)
    for name in backends:
        rows[f"cores others took, {name}"] = spread([answers[name]["others"] for answers in rounds])
    return ready["ours"]["device"], rows


def memory(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """Peak memory of compiling and two training steps: resident memory on a CPU, the allocator's peak on a GPU."""
    weights, names = write_weights(flags.preset, folder), ("ours", *flags.baselines)
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(flags.rounds):
        for name in names:
            backend = Backend(name, flags.workload(name), weights)
            backend.close()  # one at a time: two could be more than the machine has
            reports[name].append(backend.ready)
            if None in (backend.ready["before_bytes"], backend.ready["peak_bytes"]):
                raise errors.SmolLMError(f"memory of {name} is unknown: its allocator keeps no statistics")
        check_equal({name: flags.dtype_of(name) for name in names}, {name: reports[name][-1] for name in names})
    peaks = {name: [x["peak_bytes"] / 1e9 for x in rounds] for name, rounds in reports.items()}
    rows = with_ratios("peak GB", peaks, min)
    for name, rounds in reports.items():  # no ratio: PyTorch allocates optimizer state in the first step, ours before
        rows[f"GB above before the step, {name}"] = spread(
            [(x["peak_bytes"] - x["before_bytes"]) / 1e9 for x in rounds]
        )
    for name, rounds in reports.items():
        if "program_bytes" in rounds[0]:
            rows[f"GB of the compiled step, {name}"] = spread([x["program_bytes"] / 1e9 for x in rounds])
    return reports["ours"][0]["device"], rows


def checkpoint(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """The cost of the manifest in a save and a restore, and of the check for finite numbers in a step."""
    backend = Backend("checkpoint", flags.workload("ours"), folder / "none")
    backend.close()
    times = backend.ready["times"]
    rows = {f"{name}, seconds": spread(seconds) for name, seconds in times.items()}
    for name, a, b in (
        ("manifest / save", "manifest", "save"),
        ("verify / save", "verify", "save"),
        ("step guarded / unguarded", "guarded", "unguarded"),
    ):
        rows[name] = spread([x / y for x, y in zip(times[a], times[b], strict=True)])
    return backend.ready["device"], rows


def prepare(flags: Flags, folder: Path) -> tuple[str, Rows]:
    """MB/s of tokenising text, and peak memory in an untimed round before."""
    text, copies = flags.text.resolve(), folder / "text"
    files = text_files(text)
    for copy, file in itertools.product(range(flags.copies), files):  # not links: a file is read once
        target = copies / f"{copy}-{text.name}" / file.relative_to(text)  # "." where the text is one file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    size = flags.copies * sum(len(document.encode()) for file in files for document in documents(file)) / 1e6
    caches = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    variables = {"datasets": caches | {"TOKENIZERS_PARALLELISM": "false"}}  # one process per core, without threads
    with contextlib.ExitStack() as stack:
        backends: dict[str, Backend] = {}
        for name in ("ours", *flags.baselines):
            backends[name] = Backend(name, flags.workload(name), copies, **variables.get(name, {}))
            stack.callback(backends[name].close)
        peaks: dict[str, list[float]] = {}
        rounds: list[dict[str, Any]] = [{}]
        for name, backend in backends.items():
            rounds[0][name], peak = peak_memory(backend.process.pid, backend.run_once)
            peaks |= {name: [peak / 1e9]} if name != "tokenizers" else {}  # it holds all texts
        check_same_tokens(rounds[0])
        for _ in range(flags.rounds):
            rounds.append({name: backend.run_once() for name, backend in backends.items()})
            check_same_tokens(rounds[-1])
        device = backends["ours"].ready["device"]
    rows = with_ratios("peak GB", peaks, min)
    for what, seconds in (("MB/s", "seconds"), ("MB/s of a core", "cpu")):
        speeds = {name: [size / answers[name][seconds] for answers in rounds[1:]] for name in backends}
        rows |= with_ratios(what, speeds)
    return device, rows


def check_same_tokens(answers: dict[str, dict[str, Any]]) -> None:
    """Raises unless every backend made the same number of tokens."""
    ours = answers["ours"]["tokens"]
    for name, other in answers.items():
        if (theirs := other["tokens"]) != ours:
            raise errors.SmolLMError(f"ours makes {ours} tokens, {name} {theirs}: not the same work, so not compared")
