"""What a training step needs of a device's memory: planned by arithmetic, checked against the compiled step.

The arithmetic chooses; what a compiled step says of itself (`needed`) decides. A step has three heights, of which the
highest counts: the loss over the last hidden states, the layers' backward pass, and the optimizer's update.
Letters as in `model/smollm.py`; M tokens are computed at once: a device's rows of one part of the batch, times T.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, get_args

import jaxlib

from smollm_jax.config import Config, Recipe
from smollm_jax.config.recipe import Remat
from smollm_jax.errors import UsageError
from smollm_jax.model import flash_attention
from smollm_jax.model.cost import count_parameters
from smollm_jax.model.cross_entropy import CHUNK_TOKENS, CPU_CHUNK_TOKENS
from smollm_jax.training import train_step
from smollm_jax.training.execution import Compute
from smollm_jax.training.train_step import Step

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
SHARE = 0.9  # of the memory, that a batch chosen here may need by the arithmetic


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on each device. Of the loss, the layers' backward pass and the update, the highest counts."""

    parameters: int  # float32, a device's part
    moments: int  # AdamW's two, as parameters
    gathered: int  # whole float32 parameters, where devices hold parts
    summed: int  # gradients added up over the parts of a batch
    casts: int  # weights in the dtype of the products
    saved: int  # what layers keep for the backward pass, and which tokens see each other where cuDNN is told
    loss: int  # a chunk's logits, and the gradients of head and hidden states
    gradients: int  # whole, of what is computed at once
    layer: int  # what one layer's backward pass holds
    attention: int  # which scores are visible, of all pairs of blocks
    workspace: int  # left for cuDNN, which no program shows that is compiled without a GPU
    update: int  # gradients; on several devices also their sum, a device's part of it

    @property
    def total(self) -> int:
        """The most bytes a device holds during a step."""
        computing = max(self.loss, self.gradients + self.layer + self.attention + self.workspace)
        computing += self.gathered + self.summed + self.casts + self.saved
        return self.parameters + self.moments + max(computing, self.update)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """The sizes and widths that the terms of a plan share."""

    config: Config
    recipe: Recipe
    compute: Compute
    cpu: bool

    @property
    def narrow(self) -> int:
        """Bytes of a number of the activations."""
        return BYTES[self.compute.dtype]

    @property
    def wide(self) -> int:
        """Bytes of what is computed in at least float32."""
        return max(self.narrow, 4)

    @property
    def is_cast(self) -> bool:
        """Whether activations are not float32, as the parameters are."""
        return self.narrow != 4

    @property
    def is_widened(self) -> bool:
        """Whether XLA:CPU computes bfloat16 in float32, and widens all that was saved before the backward pass begins:
        before jaxlib 0.11."""
        return self.cpu and self.is_cast and jaxlib.version.__version_info__ < (0, 11)

    @property
    def rows(self) -> int:
        """Rows computed at once."""
        return self.recipe.batch_size // (self.compute.devices * self.compute.parts)

    @property
    def M(self) -> int:
        """Tokens computed at once."""
        return self.rows * self.recipe.sequence_length

    @property
    def parameters(self) -> int:
        """Bytes of all float32 parameters."""
        return 4 * count_parameters(self.config)

    @property
    def head(self) -> int:
        """Numbers of the head, V D."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def layers(self) -> int:
        """Numbers of all parameters but the embedding and the head."""
        return self.parameters // 4 - self.head * (1 if self.config.tie_word_embeddings else 2)


def plan(config: Config, recipe: Recipe, compute: Compute, platform: str = "cpu") -> Plan:
    """What the step of `train_step.compile_step` needs; its mesh may be an abstract one.

    Where XLA:CPU differs from first principles a comment says so. A GPU's is the same arithmetic without that; what XLA
    compiles for one needs as much, without cuDNN's workspace (`scripts/compile_for_gpu.py`), and no GPU was asked yet.
    """
    shape = _Shape(config, recipe, compute, platform == "cpu")
    whole, fsdp = shape.parameters, compute.mesh.shape["fsdp"] if compute.mesh else 1
    return Plan(
        parameters=whole // fsdp,
        moments=2 * whole // fsdp,
        gathered=_gathered(shape) if fsdp > 1 else 0,
        summed=whole if compute.parts > 1 else 0,
        casts=_casts(shape),
        saved=_saved(shape),
        loss=_loss(shape),
        gradients=shape.narrow * shape.layers + shape.wide * shape.head,
        layer=_layer(shape),
        attention=_attention(shape),
        workspace=_workspace(shape),
        update=whole + (whole // fsdp if compute.devices > 1 else 0),
    )


def _gathered(shape: _Shape) -> int:
    if not shape.is_cast:
        return shape.parameters
    # Weights that were cast are needed no longer; the embedding is, for the next part's tokens.
    return 4 * shape.head if shape.compute.parts > 1 else 0


def _casts(shape: _Shape) -> int:
    compute, layers, head = shape.compute, shape.layers, shape.head
    if compute.operands != compute.dtype:  # one layer's at a time
        return BYTES[compute.operands] * (layers // shape.config.num_hidden_layers + head)
    if not shape.is_cast:
        return 0
    if shape.cpu:  # the head is widened by any jaxlib
        return (shape.wide if shape.is_widened else shape.narrow) * layers + (shape.narrow + shape.wide) * head
    return shape.narrow * (layers + head)


def _saved(shape: _Shape) -> int:
    compute, narrow, wide, M = shape.compute, shape.narrow, shape.wide, shape.M
    L, D = shape.config.num_hidden_layers, shape.config.hidden_size
    N, NH, KH = _heads(shape.config)
    numbers = sum(saved_numbers(shape.config, compute))
    saved = L * M * (numbers * (wide if shape.is_widened else narrow) + (wide * N if compute.remat != "full" else 0))
    if compute.remat == "none" and not shape.is_cast:
        saved += L * narrow * 2 * D * (NH + KH)  # the attention's weights, laid flat, once more
    if compute.remat == "none" and shape.is_widened:
        saved += L * M * wide * 2 * D  # two more as wide as the residual stream, by what XLA says
    return saved + (_document_mask(shape) if compute.remat != "full" else 0)


def _layer(shape: _Shape) -> int:
    D, F, remat = shape.config.hidden_size, shape.config.intermediate_size, shape.compute.remat
    # The gradients of gate, up and their product, of q, k and v and of the residual stream, each before and after a
    # product or norm; with "full", gate, up, q, k, v and the rest of the layer's own values too.
    numbers = 6 * F + 12 * D if remat == "full" else 5 * F + 7 * D
    layer = shape.M * (shape.wide if shape.cpu else shape.narrow) * numbers
    if remat == "full":  # the mask is made again, beside less than an MLP's gradients
        layer = max(layer, _document_mask(shape))
    if shape.is_widened and remat != "none":
        # The largest thing saved is widened last: where it lay stays a hole, in which a layer's values find room.
        largest = max(saved_numbers(shape.config, shape.compute))
        layer = max(layer, shape.config.num_hidden_layers * shape.M * shape.narrow * largest)
    return layer


def _document_mask(shape: _Shape) -> int:
    """Which tokens see each other, where cuDNN is told: once for all layers."""
    if shape.compute.implementation != "cudnn" or shape.compute.document_end is None:
        return 0
    return shape.rows * shape.recipe.sequence_length**2 * shape.narrow


def _attention(shape: _Shape) -> int:
    if shape.compute.implementation != "xla" or (shape.cpu and shape.is_cast):  # there XLA:CPU does without, as counted
        return 0
    # The causal mask of every pair of blocks, as wide as their scores, a byte each: XLA computes it once for all
    # layers.
    length = shape.recipe.sequence_length
    block = min(flash_attention.CPU_BLOCK if shape.cpu else flash_attention.BLOCK, length)
    n = -(-length // block)
    return n * (n + 1) // 2 * shape.rows * shape.config.num_attention_heads * block**2


def _loss(shape: _Shape) -> int:
    narrow, wide, M = shape.narrow, shape.wide, shape.M
    chunks = -(-M // (CPU_CHUNK_TOKENS if shape.cpu else CHUNK_TOKENS))
    # Logits are overwritten by their error where that is as wide.
    logits = -(-M // chunks) * shape.config.vocab_size * (wide if shape.cpu or not shape.is_cast else wide + narrow)
    head_gradients = wide * shape.head * (2 if chunks > 1 else 1)  # a chunk's, and their sum
    return logits + head_gradients + 2 * narrow * M * shape.config.hidden_size


def _workspace(shape: _Shape) -> int:
    if shape.compute.implementation != "cudnn":
        return 0
    return cudnn_workspace(shape.config, shape.rows, shape.recipe.sequence_length)


def _heads(config: Config) -> tuple[int, int, int]:
    """Query heads, and the numbers of all queries and of all keys of a token."""
    heads = config.num_attention_heads
    return heads, heads * config.head_dim, config.num_key_value_heads * config.head_dim


def cudnn_workspace(config: Config, rows: int, length: int) -> int:
    """The most bytes that the gradient of cuDNN's attention is taken to use beside its inputs and results, a layer's.

    In float32, of lengths rounded up to 128: the gradient of the queries as it is added up, a number for each query
    (the sum of dO * O), and, where query heads share key heads, the gradients of keys and values for each query head.
    Source: NVIDIA/cudnn-frontend, node/scaled_dot_product_flash_attention.h, CompositeSDPABackwardNode: dQ_accum,
    softmax_sum, dK_fullhead and dV_fullhead. cuDNN's own part is not public; no GPU was asked yet.
    """
    N, NH, KH = _heads(config)
    return 4 * rows * (-(-length // 128) * 128) * (N + NH * (3 if NH != KH else 1))


def saved_numbers(config: Config, compute: Compute) -> list[int]:
    """How many numbers each thing has that a layer keeps for a token, next to the logarithm of its softmax's sum."""
    D, F = config.hidden_size, config.intermediate_size
    _, NH, KH = _heads(config)
    if compute.remat == "full":
        return [D]  # its input
    if compute.remat in ("swiglu", "dots"):
        gate_up = [F, F] if compute.dtype == "float32" else [2 * F]  # see `smollm.fused`
        # Its input, queries, keys and values, the attention's output, and what that adds to the residual stream.
        return [D, NH, KH, KH, *gate_up, NH, D] + [F] * (compute.remat == "swiglu")
    # Gate, up, and what SwiGLU makes of them; both norms' inputs and outputs; queries, keys and values, the
    # attention's output, and queries in blocks or what o_proj reads: counted in XLA's programs.
    return [F] * (6 if compute.dtype == "float32" else 3) + [D] * 4 + [NH] * 3 + [KH] * 2


def needed(step: Any) -> int:
    """The bytes on each device that a compiled step says it needs."""
    sizes = step.memory_analysis()
    return (
        sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    )


def compile_within(limit: int, config: Config, recipe: Recipe, compute: Compute, platform: str) -> Step:
    """`train_step.compile_step`'s; raises `UsageError` when it says itself that it needs more than `limit` bytes.

    A limit of 0 is one that nobody knows: nothing is refused.
    """
    step: Any = train_step.compile_step(config, recipe, compute)
    if limit:
        check(config, recipe, compute, platform, needed(step), limit)
    return step


def available(device: Any, sharing: int = 1) -> int:
    """The bytes a device may use: of a GPU's memory what JAX may allocate; of what a machine has free, a CPU device's
    share, where `sharing` of them are made of it. 0 where JAX does not say: some allocators keep no statistics (jax
    gives None for them, as for XLA_PYTHON_CLIENT_ALLOCATOR=platform) or none with a limit."""
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit") or 0
    if (meminfo := Path("/proc/meminfo")).exists():
        free = next(row for row in meminfo.read_text().splitlines() if row.startswith("MemAvailable:"))
        return (int(free.split()[1]) << 10) // sharing
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // sharing


def largest_batch(config: Config, recipe: Recipe, compute: Compute, platform: str, limit: int) -> Recipe:
    """The recipe with the largest batch planned to take 90 % of `limit`: a power of two of rows, on each device a part.

    Raises `UsageError` when one row is too much.
    """
    limit, rows = int(SHARE * limit), _rows_at_once(compute)
    chosen, larger = None, dataclasses.replace(recipe, batch_size=rows)
    while (need := plan(config, larger, compute, platform).total) <= limit:
        chosen, larger = larger, dataclasses.replace(larger, batch_size=2 * larger.batch_size)
    if chosen is None:
        check(config, larger, compute, platform, need, limit)
    assert chosen
    return chosen


def fastest(config: Config, recipe: Recipe, compute: Compute, platform: str, limit: int) -> Compute:
    """`compute` with the `remat` for whoever names none: on a GPU the most that is planned to take 90 % of `limit`.

    That is "none" or "swiglu", for a GPU moves less than it would to compute it again (docs/gpu.md, "What XLA
    makes of a step"); else, and on a CPU, whose step takes longer then, "dots". Never "full".
    """
    kept: tuple[Remat, ...] = () if platform == "cpu" else ("none", "swiglu")
    for remat in kept:
        changed = dataclasses.replace(compute, remat=remat)
        if plan(config, recipe, changed, platform).total <= int(SHARE * limit):
            return changed
    return dataclasses.replace(compute, remat="dots")


def check(config: Config, recipe: Recipe, compute: Compute, platform: str, need: int, limit: int) -> None:
    """Raises `UsageError`, with each change that would do, when a step needs more bytes on a device than there are."""
    if need <= limit:
        return
    # What a compiled step needs beyond its plan, a changed one is taken to need, too.
    beyond = max(1.0, need / plan(config, recipe, compute, platform).total)
    found = []
    for kind in _changes(recipe, compute):
        for flags, one, other in kind:
            if plan(config, one, other, platform).total * beyond <= limit:
                found.append(flags)
                break
    advice = (
        f"by the plan {' or '.join(found)} fits" if found else "take more devices (--mesh fsdp=N), or a smaller model"
    )
    said = f"--batch-size {recipe.batch_size} --remat {compute.remat}"
    raise UsageError(f"{said} needs {need / 1e9:.2f} GB of {limit / 1e9:.2f} GB on each device: {advice}")


def _changes(recipe: Recipe, compute: Compute) -> list[list[tuple[str, Recipe, Compute]]]:
    """What takes less memory, of each kind the smallest change first: flags, and what they make of a run."""
    at_once = _rows_at_once(compute)
    rows = recipe.batch_size // at_once
    policies = get_args(Remat)
    remat = [
        (f"--remat {policy}", recipe, dataclasses.replace(compute, remat=policy))
        for policy in policies[policies.index(compute.remat) + 1 :]
    ]
    halves = [1 << n for n in range(1, rows.bit_length())]
    batches = [
        (f"--batch-size {rows // n * at_once}", dataclasses.replace(recipe, batch_size=rows // n * at_once), compute)
        for n in halves
    ]
    parts = [
        (
            f"--gradient-accumulation-steps {n * compute.parts}",
            dataclasses.replace(recipe, gradient_accumulation_steps=n * compute.parts),
            dataclasses.replace(compute, parts=n * compute.parts),
        )
        for n in halves
        if rows % n == 0
    ]
    both = [(f"--remat full {flag}", one, dataclasses.replace(other, remat="full")) for flag, one, other in parts]
    return [batches, remat, parts, both if compute.remat != "full" else []]


def _rows_at_once(compute: Compute) -> int:
    """The least batch: one row on each device in each part."""
    return compute.devices * compute.parts
