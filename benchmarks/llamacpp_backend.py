"""llama.cpp's backend, through llama-cpp-python: one text, as many threads as cores.

"llamacpp" has float32 weights and a float32 cache; "llamacpp-q8_0" and the like have weights that llama.cpp quantised
itself, and its default cache, float16.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]  # no dependency: installed by whoever measures it
import numpy as np

from benchmarks.workload import GEMM, Prepared, Workload, decoded

FTYPE = {"bf16": 32, "q8_0": 7, "q4_0": 2}  # llama.h's llama_ftype


def prepare(name: str, workload: Workload, folder: Path) -> Prepared:
    """A unit of work, a GEMM to time, and the backend's `ready` report; the weights are in `folder/model.gguf`."""
    file = folder / "model.gguf"
    if kind := name.partition("-")[2]:
        file = quantised(file, kind)
    if crashes(file):
        print(
            f"{name}: llama.cpp crashes with weights repacked for this CPU; measuring without that",
            file=sys.stderr,
        )
        without_repacking()
    tokens, square = workload.tokens()[0], np.ones((GEMM, GEMM), np.float32)
    prompt, vocabulary = tokens[:-1].tolist(), workload.config.vocab_size
    whole = model(file, len(prompt), logits_all=True)
    whole.eval(prompt)
    logits = np.asarray(whole.scores[: len(prompt)], np.float32)
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = np.take_along_axis(shifted, tokens[1:, None], axis=1)[:, 0]
    losses = [float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - chosen, dtype=np.float64))]
    del whole, logits, shifted
    llama = model(file, len(prompt) + (workload.new_tokens if workload.what == "decode" else 0), logits_all=False)

    def gemm() -> int:
        np.matmul(square, square)  # NumPy's: llama.cpp has no matmul to call
        return 1

    def decode() -> dict[str, Any]:
        llama.reset()
        llama.eval(prompt)
        pieces, times = [], []
        while True:
            last = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), (vocabulary,))
            pieces.append(np.array([[last.argmax()]]))
            times.append(time.perf_counter())
            if len(pieces) == workload.new_tokens:
                return decoded(pieces, times)
            llama.eval(pieces[-1][0].tolist())

    def prefill() -> dict[str, Any]:
        llama.reset()
        llama.eval(prompt)
        return {}

    unit = decode if workload.what == "decode" else prefill
    return unit, gemm, {"device": "cpu", "platform": "cpu", "losses": losses, "ids": unit().get("ids")}


def quantised(file: Path, kind: str) -> Path:
    """Writes the weights next to `file` with every matrix in another of llama.cpp's types; returns the path."""
    out, options = file.with_stem(f"model-{kind}"), llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure = FTYPE[kind], True
    if status := llama_cpp.llama_model_quantize(bytes(file), bytes(out), options):
        raise RuntimeError(f"llama.cpp could not write {kind}: status {status}")
    return out


def crashes(file: Path) -> bool:
    """Whether reading a short prompt ends a process by a signal (0.3.36, q8_0 on a CPU with AMX: SIGSEGV)."""
    if (child := os.fork()) == 0:
        try:
            model(file, 64, logits_all=False).eval(list(range(64)))
        finally:  # also after an exception: the child must not go on as a second backend
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def without_repacking() -> None:
    """Makes llama.cpp load weights in the file's layout, for all models from now on."""
    default = llama_cpp.llama_cpp.llama_model_default_params

    def changed() -> Any:
        parameters = default()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = changed


def model(file: Path, positions: int, *, logits_all: bool) -> Any:
    threads = len(os.sched_getaffinity(0))
    cache = llama_cpp.GGML_TYPE_F32 if file.stem == "model" else llama_cpp.GGML_TYPE_F16
    return llama_cpp.Llama(
        str(file),
        n_gpu_layers=0,
        n_ctx=positions,
        n_batch=positions,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=cache,
        type_v=cache,
        logits_all=logits_all,
        verbose=False,
    )
