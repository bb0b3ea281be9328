"""Compiles a training step for a GPU without having one, and describes the GPUs to compile for."""

import contextlib
import dataclasses
import os
from typing import Any
from unittest import mock

from smollm_jax import errors
from smollm_jax.model import cost
from smollm_jax.runtime import install

# XLA's description of a GPU; the `%` fields differ between models.
CARD = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation"
  device_address_bits: 64 driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0" name: "%(name)s" platform_version: "Compute Capability %(capability)s" %(numbers)s
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "%(name)s"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for, with the bytes/s and FLOP/s that its roofline assumes."""

    name: str  # as the driver reports it
    capability: str
    numbers: str
    bandwidth: float
    peak_flops: float
    source: str  # of bandwidth and peak_flops

    @property
    def platform(self) -> str:
        """As in `jax.Device`."""
        return "gpu"

    @property
    def compute_capability(self) -> str:
        """As in `jax.Device`, without the suffix for architecture-specific features."""
        return self.capability.rstrip("a")

    @property
    def config(self) -> str:
        """The text for XLA's `target_config`."""
        return CARD % {"name": self.name, "capability": self.capability, "numbers": " ".join(self.numbers.split())}


def from_data_sheet(name: str, capability: str, numbers: str) -> Target:
    bandwidth, peak_flops = cost.bandwidth(name), cost.peak_flops(name)
    assert bandwidth
    assert peak_flops
    return Target(name, capability, numbers, bandwidth, peak_flops, "from its data sheet")


# Sources for h100 and a100: openxla/xla, xla/backends/gpu/target_config/specs/h100_sxm.txtpb, a100_sxm_80.txtpb.
# For rtx4090, which XLA does not list: NVIDIA's Ada whitepaper, appendix A, and the CUDA programming guide's table of
# compute capability 8.9, which an L40S has too.
TARGETS = {
    "h100": Target(
        "NVIDIA H100 80GB HBM3",
        "9.0a",
        """cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES } core_count: 132
        fpus_per_core: 128 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
        threads_per_core_limit: 2048 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
        device_memory_size: 84942979072""",
        3.0e12,
        790e12,
        "reached by large copies and matmuls",  # docs/performance.md
    ),
    "a100": from_data_sheet(
        "NVIDIA A100-SXM4-80GB",
        "8.0",
        """cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64
        shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 threads_per_core_limit: 2048
        memory_bandwidth: 2039040000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41 device_memory_size: 85100068864""",
    ),
    "rtx4090": from_data_sheet(
        "NVIDIA GeForce RTX 4090",
        "8.9",
        """cuda_compute_capability { major: 8 minor: 9 } core_count: 128 fpus_per_core: 128
        shared_memory_per_core: 102400 shared_memory_per_block_optin: 101376 threads_per_core_limit: 1536
        memory_bandwidth: 1008000000000 l2_cache_size: 75497472 clock_rate_ghz: 2.52 device_memory_size: 25769803776""",
    ),
}
H100 = TARGETS["h100"]


def compile_step(config: Any, recipe: Any, execution: Any, target: Target = H100) -> Any:
    """`train_step.compile_step` for a GPU; raises `SmolLMError` where JAX's CUDA plugin is not installed."""
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the check needs a driver
    import jax
    import jax.numpy as jnp
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    from smollm_jax.training import optimizer, train_step
    from smollm_jax.training.state import abstract_state

    try:
        topology = topologies.get_topology_desc(platform="cuda", target_config=target.config, topology="1x1x1")
    except Exception as error:
        raise errors.SmolLMError(f"JAX's CUDA plugin is not installed, {install.command('cuda13')}: {error}") from error
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    state = abstract_state(config, recipe)
    tokens = jax.ShapeDtypeStruct((recipe.batch_size, recipe.sequence_length + 1), jnp.int32)
    on_gpu = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)  # noqa: E731
    state, tokens = jax.tree.map(on_gpu, (state, tokens))
    with contextlib.ExitStack() as mocks:  # the answers of a GPU and its libraries
        mocks.enter_context(mock.patch.object(jax, "default_backend", return_value="gpu"))
        mocks.enter_context(mock.patch.object(cudnn, "check_cudnn_version", return_value=91200))
        mocks.enter_context(mock.patch.object(cudnn, "check_compute_capability", return_value=True))
        mocks.enter_context(mock.patch.object(cudnn, "is_cuda_compute_capability_equal", return_value=False))
        traced = train_step.train_step.trace(state, tokens, tx=optimizer.adamw(recipe), execution=execution)
        return traced.lower(lowering_platforms=("cuda",)).compile()
