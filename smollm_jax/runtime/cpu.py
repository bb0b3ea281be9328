"""What this machine's CPU is and can do, as its system tells it. Framework-free."""

import functools
import os
import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # what matrix products run on
# XLA's own names, which `--xla_cpu_max_isa` takes: what it uses when it is told to.
WITH_BFLOAT16 = ("AVX512_BF16", "AMX", "AMX_FP16")


@functools.cache
def _fields() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; none on another system."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def name() -> str:
    """The CPU's name, with family, model and stepping where names are vague ("Intel(R) Xeon(R) Processor")."""
    fields = _fields()
    found = fields.get("model name", platform.processor() or platform.machine())
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{found} ({'/'.join(numbers)})" if numbers else found


def features() -> list[str]:
    """Those of `FEATURES` that this CPU has."""
    flags = _fields().get("flags", "").split()
    return [feature for feature in FEATURES if feature in flags]


def has_fast_bfloat16() -> bool:
    """Whether products of bfloat16 run faster than float32's: on x86 with AVX-512 BF16 or AMX, if XLA may use them."""
    limit = re.findall(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    allowed = not limit or limit[-1].upper() in WITH_BFLOAT16
    return allowed and bool({"avx512_bf16", "amx_bf16"} & set(features()))
