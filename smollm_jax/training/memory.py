"""The memory of a training step on each device: estimated before compiling, checked on the compiled step.

The estimate (`estimate`) chooses settings; the compiled step's own figure (`compiled_bytes`) decides whether it runs.
Memory peaks in one of three phases: the loss over the last hidden states, the layers' backward pass, or the
optimizer's update. Letters as in `model/smollm.py`; M is the tokens of one micro-batch on one device.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, get_args

import jaxlib

from smollm_jax.config import Config, Recipe
from smollm_jax.config.finetune_recipe import FinetuneRecipe
from smollm_jax.config.recipe import Remat
from smollm_jax.errors import UsageError
from smollm_jax.model import flash_attention
from smollm_jax.model.cost import count_parameters
from smollm_jax.model.cross_entropy import CHUNK_TOKENS, CPU_CHUNK_TOKENS
from smollm_jax.training import train_step
from smollm_jax.training.execution import ExecutionConfig
from smollm_jax.training.train_step import Step
from smollm_jax.weights.adapter import parse_targets, projection_shape

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
USABLE_FRACTION = 0.9  # of the memory: what an estimate may need for settings that are chosen here


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device. The peak is the largest of the loss, the layers' backward pass and the update."""

    parameters: int  # float32, a device's shard, with those of an adapter
    optimizer_state: int  # AdamW's two moments of what is trained, sharded as parameters
    gathered_parameters: int  # full float32 parameters, if devices hold shards
    accumulated_gradients: int  # sums over micro-batches
    cast_weights: int  # weights in the dtype of matmuls
    residuals: int  # what layers keep for the backward pass, and cuDNN's mask of documents
    loss: int  # a chunk's logits, and the gradients of head and hidden states
    gradients: int  # of what is trained, for one micro-batch
    layer_backward: int  # temporaries of one layer's backward pass
    attention_masks: int  # the causal mask of every pair of blocks
    workspace: int  # allowance for cuDNN, which a program compiled without a GPU does not show
    update: int  # gradients; on several devices also a device's shard of their sum

    @property
    def total(self) -> int:
        """Peak bytes on each device during a step."""
        computing = max(self.loss, self.gradients + self.layer_backward + self.attention_masks + self.workspace)
        computing += self.gathered_parameters + self.accumulated_gradients + self.cast_weights + self.residuals
        return self.parameters + self.optimizer_state + max(computing, self.update)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Sizes and dtype widths that the terms of an estimate share."""

    config: Config
    recipe: Recipe
    execution: ExecutionConfig
    cpu: bool

    @property
    def activation_bytes(self) -> int:
        """Bytes of an activation's element."""
        return BYTES[self.execution.dtype]

    @property
    def wide_bytes(self) -> int:
        """Bytes of an element that is computed in at least float32."""
        return max(self.activation_bytes, 4)

    @property
    def is_cast(self) -> bool:
        """Whether weights are cast: activations are not float32, as parameters are."""
        return self.activation_bytes != 4

    @property
    def is_widened(self) -> bool:
        """Whether XLA:CPU computes bfloat16 in float32 and converts all residuals before the backward pass starts: it
        does before jaxlib 0.11."""
        return self.cpu and self.is_cast and jaxlib.version.__version_info__ < (0, 11)

    @property
    def rows(self) -> int:
        """Rows of one micro-batch on one device."""
        return self.recipe.rows_per_step // (self.execution.devices * self.execution.accumulation_steps)

    @property
    def M(self) -> int:
        """Tokens of one micro-batch on one device."""
        return self.rows * self.recipe.sequence_length

    @property
    def parameters(self) -> int:
        """Bytes of all float32 parameters."""
        return 4 * count_parameters(self.config)

    @property
    def adapter(self) -> int:
        """Bytes of a LoRA adapter's float32 pairs, which alone are trained then; 0 if all parameters are."""
        recipe = self.recipe
        if not isinstance(recipe, FinetuneRecipe) or not recipe.lora_rank:
            return 0
        sizes = [sum(projection_shape(self.config, target)) for target in parse_targets(recipe.lora_targets)]
        return 4 * self.config.num_hidden_layers * recipe.lora_rank * sum(sizes)

    @property
    def trained(self) -> int:
        """Bytes of the float32 parameters that are trained."""
        return self.adapter or self.parameters

    @property
    def head_size(self) -> int:
        """Elements of the head, V D."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def layers_size(self) -> int:
        """Elements of all parameters except embedding and head."""
        return self.parameters // 4 - self.head_size * (1 if self.config.tie_word_embeddings else 2)


def estimate(config: Config, recipe: Recipe, execution: ExecutionConfig, platform: str = "cpu") -> MemoryEstimate:
    """The memory of the step that `train_step.compile_step` compiles; the mesh may be abstract.

    Comments mark where XLA:CPU differs from first principles. For a GPU the same terms count without those; programs
    that XLA compiles for one (`scripts/compile_for_gpu.py`) agree, apart from cuDNN's workspace. Not yet measured on a
    GPU.
    """
    shape = _Shape(config, recipe, execution, platform == "cpu")
    trained, fsdp = shape.trained, execution.mesh.shape["fsdp"] if execution.mesh else 1
    head_gradients = 0 if shape.adapter else shape.wide_bytes * shape.head_size
    return MemoryEstimate(
        parameters=(shape.parameters + shape.adapter) // fsdp,
        optimizer_state=2 * trained // fsdp,
        gathered_parameters=_gathered_parameters(shape) if fsdp > 1 else 0,
        accumulated_gradients=trained if execution.accumulation_steps > 1 else 0,
        cast_weights=_cast_weights(shape),
        residuals=_residuals(shape),
        loss=_loss(shape),
        gradients=shape.activation_bytes * (shape.adapter // 4 or shape.layers_size) + head_gradients,
        layer_backward=_layer_backward(shape),
        attention_masks=_attention_masks(shape),
        workspace=_workspace(shape),
        update=trained + (trained // fsdp if execution.devices > 1 else 0),
    )


def _gathered_parameters(shape: _Shape) -> int:
    if not shape.is_cast:
        return shape.parameters
    # Once cast, float32 weights are freed, except the embedding, which the next micro-batch's tokens need.
    return 4 * shape.head_size if shape.execution.accumulation_steps > 1 else 0


def _cast_weights(shape: _Shape) -> int:
    execution, layers, head = shape.execution, shape.layers_size, shape.head_size
    if execution.operands != execution.dtype:  # one layer's at a time
        return BYTES[execution.operands] * (layers // shape.config.num_hidden_layers + head)
    if not shape.is_cast:
        return 0
    if shape.cpu:  # every jaxlib converts the head to float32 again
        per_layer_element = shape.wide_bytes if shape.is_widened else shape.activation_bytes
        return per_layer_element * layers + (shape.activation_bytes + shape.wide_bytes) * head
    return shape.activation_bytes * (layers + head)


def _residuals(shape: _Shape) -> int:
    execution, narrow, wide, M = shape.execution, shape.activation_bytes, shape.wide_bytes, shape.M
    L, D = shape.config.num_hidden_layers, shape.config.hidden_size
    N, NH, KH = _heads(shape.config)
    elements = sum(residual_sizes(shape.config, execution))
    residuals = L * M * elements * (wide if shape.is_widened else narrow)
    residuals += L * M * wide * N if execution.remat != "full" else 0  # the softmax's logsumexp
    if execution.remat == "none" and not shape.is_cast:
        residuals += L * narrow * 2 * D * (NH + KH)  # a second, reshaped copy of the attention weights
    if execution.remat == "none" and shape.is_widened:
        residuals += L * M * wide * 2 * D  # two more tensors of the residual stream's size, found in XLA's program
    if execution.remat == "none" and shape.adapter:
        residuals += L * M * _adapter_residuals(shape)
    return residuals + (_document_mask(shape) if execution.remat != "full" else 0)


def _adapter_residuals(shape: _Shape) -> int:
    """Bytes per token and layer that `remat` "none" keeps for an adapter, counted in XLA's programs."""
    recipe, config, narrow = shape.recipe, shape.config, shape.activation_bytes
    assert isinstance(recipe, FinetuneRecipe)
    targets = parse_targets(recipe.lora_targets)
    kept = narrow * recipe.lora_rank * len(targets)  # what A returns
    if shape.is_cast:  # q, k, v, gate and up apart from the matmul of all, and SwiGLU's intermediates
        _, NH, KH = _heads(config)
        kept += narrow * (5 * config.intermediate_size + NH + 2 * KH)
    if recipe.lora_dropout:  # masks, a byte for each element, and three inputs scaled up
        kept += sum(projection_shape(config, target)[1] for target in targets) + 3 * narrow * config.hidden_size
    return kept


def _layer_backward(shape: _Shape) -> int:
    D, F, remat = shape.config.hidden_size, shape.config.intermediate_size, shape.execution.remat
    # Gradients of gate, up and their product, of q, k and v and of the residual stream, each before and after a matmul
    # or norm; with "full" also the recomputed gate, up, q, k, v and the layer's other activations.
    elements = 6 * F + 12 * D if remat == "full" else 5 * F + 7 * D
    layer = shape.M * (shape.wide_bytes if shape.cpu else shape.activation_bytes) * elements
    if remat == "full":  # the mask is recomputed, at a time when less than an MLP's gradients is live
        layer = max(layer, _document_mask(shape))
    if shape.is_widened and remat != "none":
        # The largest residual is converted last: its old buffer is free, and a layer's temporaries reuse it.
        largest = max(residual_sizes(shape.config, shape.execution))
        layer = max(layer, shape.config.num_hidden_layers * shape.M * shape.activation_bytes * largest)
    return layer


def _document_mask(shape: _Shape) -> int:
    """The dense mask of documents that cuDNN's attention takes: one for all layers."""
    if shape.execution.attention != "cudnn" or shape.execution.separator_id is None:
        return 0
    return shape.rows * shape.recipe.sequence_length**2 * shape.activation_bytes


def _attention_masks(shape: _Shape) -> int:
    if shape.execution.attention != "xla" or (shape.cpu and shape.is_cast):  # XLA:CPU then makes no mask
        return 0
    # The causal mask of every pair of blocks, of the shape of their scores, a byte each; computed once for all layers.
    length = shape.recipe.sequence_length
    block = min(flash_attention.CPU_BLOCK if shape.cpu else flash_attention.BLOCK, length)
    n = -(-length // block)
    return n * (n + 1) // 2 * shape.rows * shape.config.num_attention_heads * block**2


def _loss(shape: _Shape) -> int:
    narrow, wide, M = shape.activation_bytes, shape.wide_bytes, shape.M
    chunks = -(-M // (CPU_CHUNK_TOKENS if shape.cpu else CHUNK_TOKENS))
    # The gradient of the logits overwrites them if it has the same dtype.
    logits = -(-M // chunks) * shape.config.vocab_size * (wide if shape.cpu or not shape.is_cast else wide + narrow)
    head_gradients = wide * shape.head_size * (2 if chunks > 1 else 1)  # a chunk's, and their sum
    if shape.adapter:  # the head is not trained
        head_gradients = 0
    return logits + head_gradients + 2 * narrow * M * shape.config.hidden_size


def _workspace(shape: _Shape) -> int:
    if shape.execution.attention != "cudnn":
        return 0
    return cudnn_workspace(shape.config, shape.rows, shape.recipe.sequence_length)


def _heads(config: Config) -> tuple[int, int, int]:
    """The number of query heads, and a token's elements in all query heads and in all key heads."""
    heads = config.num_attention_heads
    return heads, heads * config.head_dim, config.num_key_value_heads * config.head_dim


def cudnn_workspace(config: Config, rows: int, length: int) -> int:
    """An estimate of the workspace of cuDNN attention's backward pass, in bytes, for one layer.

    In float32, for lengths rounded up to 128: the accumulated gradient of the queries, sum(dO * O) of each query, and,
    if query heads share key heads, the gradients of keys and values for each query head.
    Source: NVIDIA/cudnn-frontend, node/scaled_dot_product_flash_attention.h, CompositeSDPABackwardNode: dQ_accum,
    softmax_sum, dK_fullhead and dV_fullhead. What cuDNN itself allocates is not public; not yet measured on a GPU.
    """
    N, NH, KH = _heads(config)
    return 4 * rows * (-(-length // 128) * 128) * (N + NH * (3 if NH != KH else 1))


def residual_sizes(config: Config, execution: ExecutionConfig) -> list[int]:
    """Elements per token of each residual that a layer keeps, apart from the softmax's logsumexp."""
    D, F = config.hidden_size, config.intermediate_size
    _, NH, KH = _heads(config)
    if execution.remat == "full":
        return [D]  # its input
    if execution.remat in ("swiglu", "dots"):
        gate_up = [F, F] if execution.dtype == "float32" else [2 * F]  # see `smollm.fused`
        # Its input, queries, keys, values, gate and up, the attention's output, and o_proj's.
        return [D, NH, KH, KH, *gate_up, NH, D] + [F] * (execution.remat == "swiglu")
    # Gate, up and SwiGLU's intermediates; inputs and outputs of both norms; queries, keys and values, the attention's
    # output, and blocked queries or o_proj's input: counted in XLA's programs.
    return [F] * (6 if execution.dtype == "float32" else 3) + [D] * 4 + [NH] * 3 + [KH] * 2


def compiled_bytes(step: Any) -> int:
    """Bytes on each device that a compiled step needs, by XLA's memory analysis."""
    sizes = step.memory_analysis()
    return (
        sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    )


def compile_within(
    limit: int, config: Config, recipe: Recipe, execution: ExecutionConfig, platform: str, **options: Any
) -> Step:
    """`train_step.compile_step`, but raises `UsageError` if the compiled step needs more than `limit` bytes.

    `limit` 0 means unknown: nothing is checked.
    """
    step: Any = train_step.compile_step(config, recipe, execution, **options)
    if limit:
        require_fit(config, recipe, execution, platform, compiled_bytes(step), limit)
    return step


def device_limit(device: Any, sharing: int = 1) -> int:
    """Bytes that a device may use: JAX's limit on a GPU; on a CPU the free memory divided by `sharing` virtual devices.

    0 if JAX reports no limit: some allocators keep no statistics (for XLA_PYTHON_CLIENT_ALLOCATOR=platform jax returns
    None) or none with a limit.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit") or 0
    if (meminfo := Path("/proc/meminfo")).exists():
        free = next(row for row in meminfo.read_text().splitlines() if row.startswith("MemAvailable:"))
        return (int(free.split()[1]) << 10) // sharing
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // sharing


def largest_batch(config: Config, recipe: Recipe, execution: ExecutionConfig, platform: str, limit: int) -> Recipe:
    """The recipe with the largest batch that is estimated to fit in 90 % of `limit`.

    A micro-batch has a power of two of rows on each device.

    Raises `UsageError` if not even one row fits.
    """
    limit, rows = int(USABLE_FRACTION * limit), _smallest_batch(execution)
    chosen, larger = None, dataclasses.replace(recipe, batch_size=rows)
    while (need := estimate(config, larger, execution, platform).total) <= limit:
        chosen, larger = larger, dataclasses.replace(larger, batch_size=2 * larger.batch_size)
    if chosen is None:
        require_fit(config, larger, execution, platform, need, limit)
    assert chosen
    return chosen


def choose_remat(
    config: Config, recipe: Recipe, execution: ExecutionConfig, platform: str, limit: int
) -> ExecutionConfig:
    """`execution` with the default `remat`: on a GPU "none" or "swiglu" if it is estimated to fit in 90 % of `limit`.

    A GPU moves fewer bytes for these than for recomputing (docs/gpu.md, "What XLA makes of a step"). Else "dots", also
    on a CPU, where keeping more makes a step slower. Never "full".
    """
    candidates: tuple[Remat, ...] = () if platform == "cpu" else ("none", "swiglu")
    for remat in candidates:
        changed = dataclasses.replace(execution, remat=remat)
        if estimate(config, recipe, changed, platform).total <= int(USABLE_FRACTION * limit):
            return changed
    return dataclasses.replace(execution, remat="dots")


def require_fit(
    config: Config, recipe: Recipe, execution: ExecutionConfig, platform: str, need: int, limit: int
) -> None:
    """Raises `UsageError`, with changes that would fit, if a step needs more than `limit` bytes on a device."""
    if need <= limit:
        return
    # Scale the suggestions' estimates by the ratio of compiled to estimated bytes.
    excess = max(1.0, need / estimate(config, recipe, execution, platform).total)
    fitting = []
    for alternatives in _suggestions(recipe, execution):
        for flags, changed_recipe, changed_execution in alternatives:
            if estimate(config, changed_recipe, changed_execution, platform).total * excess <= limit:
                fitting.append(flags)
                break
    advice = f"{' or '.join(fitting)} should fit" if fitting else "use more devices (--mesh fsdp=N) or a smaller model"
    flags = f"--batch-size {recipe.batch_size} --remat {execution.remat}"
    sizes = f"{need / 1e9:.2f} GB on each device, which has {limit / 1e9:.2f} GB for it"
    raise UsageError(f"{flags} needs {sizes}: {advice}")


def _suggestions(recipe: Recipe, execution: ExecutionConfig) -> list[list[tuple[str, Recipe, ExecutionConfig]]]:
    """Changes that take less memory, one list for each kind, the smallest change first: flags, and their settings."""
    smallest = _smallest_batch(execution)
    rows = recipe.batch_size // smallest
    policies = get_args(Remat)
    remat = [
        (f"--remat {policy}", recipe, dataclasses.replace(execution, remat=policy))
        for policy in policies[policies.index(execution.remat) + 1 :]
    ]
    factors = [1 << n for n in range(1, rows.bit_length())]
    batches = [
        (
            f"--batch-size {rows // n * smallest}",
            dataclasses.replace(recipe, batch_size=rows // n * smallest),
            execution,
        )
        for n in factors
    ]
    micro_batches = [
        (
            f"--gradient-accumulation-steps {n * execution.accumulation_steps}",
            dataclasses.replace(recipe, gradient_accumulation_steps=n * execution.accumulation_steps),
            dataclasses.replace(execution, accumulation_steps=n * execution.accumulation_steps),
        )
        for n in factors
        if rows % n == 0
    ]
    both = [
        (f"--remat full {flags}", changed, dataclasses.replace(other, remat="full"))
        for flags, changed, other in micro_batches
    ]
    return [batches, remat, micro_batches, both if execution.remat != "full" else []]


def _smallest_batch(execution: ExecutionConfig) -> int:
    """The smallest batch: one row in each micro-batch of each device."""
    return execution.devices * execution.accumulation_steps
