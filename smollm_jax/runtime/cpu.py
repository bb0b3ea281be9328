"""Name and features of this machine's CPU, from /proc/cpuinfo. Framework-free."""

import functools
import os
import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # used by matmuls
# Values of `--xla_cpu_max_isa` under which XLA may use bfloat16 instructions.
ISAS_WITH_BFLOAT16 = ("AVX512_BF16", "AMX", "AMX_FP16")


@functools.cache
def _fields() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def name() -> str:
    """The CPU's name with family/model/stepping, as the name alone can be vague ("Intel(R) Xeon(R) Processor")."""
    fields = _fields()
    model_name = fields.get("model name", platform.processor() or platform.machine())
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{model_name} ({'/'.join(numbers)})" if numbers else model_name


def features() -> list[str]:
    """Those of `FEATURES` that this CPU has."""
    flags = _fields().get("flags", "").split()
    return [feature for feature in FEATURES if feature in flags]


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 matmuls are faster than float32 ones: on x86 with AVX-512 BF16 or AMX, if XLA may use them."""
    limit = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    allowed = not limit or limit[-1].upper() in ISAS_WITH_BFLOAT16
    return allowed and bool({"avx512_bf16", "amx_bf16"} & set(features()))
