"""The inputs of the parity report's backends, and the process that runs each backend (`measure.py`)."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from smollm_jax import errors
from smollm_jax.config import Recipe
from smollm_jax.data.text import documents
from smollm_jax.data.text_sources import text_files

NEW_TOKENS = 48  # per greedy continuation


def make_job(text: Path, tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The inputs of every backend: texts, a window for gradients, batches to train on, prompts to continue.

    `texts` `[8, 128]`, `firsts` (distinct first tokens) `[256, 1]`, `window` `[1, 513]`, `batches` `[10, 1, 257]`,
    `prompts` `[10, 32]` padded with -1, and `recipe` (JSON). Raises `InputFileError` for too little text, and
    `UsageError` for a tokenizer with ids beyond the weights' vocabulary.
    """
    files = text_files(text)
    chosen = files[:: max(1, len(files) // 9)][:9]
    ids = [tokenizer.encode(document) for file in chosen for document in documents(file)]
    stream = [token for document in ids for token in document]
    if len(stream) < 3000:
        raise errors.InputFileError(f"{text}: has {len(stream)} tokens, the report needs at least 3,000")
    if max(stream) >= vocab_size:
        problem = f"the tokenizer produces id {max(stream)}, but the weights have {vocab_size} tokens"
        raise errors.UsageError(f"{problem}: give the matching --tokenizer")
    # From the middle of documents: their beginnings are alike, so one rounding error there would count many times.
    middles = [document[len(document) // 2 :][:128] for document in ids if len(document) >= 256]
    while len(middles) < 8:  # few documents: pieces of the whole text
        middles.append(stream[128 * len(middles) : 128 * (len(middles) + 1)])
    recipe = Recipe(
        steps=10,
        batch_size=1,
        sequence_length=256,
        learning_rate=1e-4,
        warmup_steps=2,
        dtype="float32",
        schedule="cosine",
    )
    batches = np.array([stream[i * 256 : i * 256 + 257] for i in range(recipe.steps)], np.int32)[:, None]
    prompts = np.full((10, 32), -1, np.int32)
    for index, row in enumerate(prompts):
        length = 4 + 3 * index
        row[:length] = stream[200 * index : 200 * index + length]
    return {
        "texts": np.array(middles[:8], np.int32),
        "firsts": np.unique(stream)[:256, None].astype(np.int32),
        "window": np.array([stream[:513]], np.int32),
        "batches": batches,
        "prompts": prompts,
        "recipe": json.dumps(dataclasses.asdict(recipe)),
    }


def prompts_of(job: dict[str, Any]) -> list[list[int]]:
    """The prompts without padding."""
    return [[int(i) for i in row if i >= 0] for row in job["prompts"]]


def measure(backend: str, work: Path, device: str) -> None:
    """Runs one backend in its own process on `work/job.npz` and `work/hf`; it writes its results to `work/backend`.

    Raises `RuntimeError` with the process's stderr when it fails.
    """
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "smollm_parity.measure", backend, "--device", device]
    command += ["--weights", str(work / "hf"), "--job", str(work / "job.npz"), "--out", str(work / backend)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"measuring {backend} failed:\n{done.stderr}")
