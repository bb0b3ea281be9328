"""Name and features of a CPU, read from /proc/cpuinfo; they decide the default dtype of a run."""

import pytest

from smollm_jax.runtime import cpu

LINES = (
    "processor\t: 0\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon\nstepping\t: 8\nflags\t\t: {}\n\n"
    "processor\t: 1\n"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Replaces /proc/cpuinfo by one whose processors have the given flags."""

    def make(flags):
        (tmp_path / "cpuinfo").write_text(LINES.format(flags))
        monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
        cpu._fields.cache_clear()

    monkeypatch.delenv("XLA_FLAGS", raising=False)
    yield make
    cpu._fields.cache_clear()


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("fpu avx2 avx512f", False),
        ("avx2 avx512f avx512_bf16", True),
        ("avx2 amx_bf16 amx_tile", True),
        ("avx512_bf16x", False),
        ("", False),
    ],
)
def test_bfloat16_is_fast_on_cpus_with_instructions_for_it(machine, flags, fast):
    machine(flags)
    assert cpu.has_fast_bfloat16() == fast


@pytest.mark.parametrize(("flags", "fast"), [("AVX2", False), ("AVX512", False), ("AVX512_BF16", True), ("amx", True)])
def test_xla_flags_can_disable_bfloat16(machine, monkeypatch, flags, fast):
    machine("avx512_bf16 amx_bf16")
    monkeypatch.setenv("XLA_FLAGS", f"--xla_foo=1 --xla_cpu_max_isa={flags}")
    assert cpu.has_fast_bfloat16() == fast


def test_name_and_features_are_read_from_cpuinfo(machine):
    machine("fpu amx_bf16 avx2")
    assert cpu.name() == "Xeon (6/143/8)"
    assert cpu.features() == ["avx2", "amx_bf16"]


def test_a_system_without_cpuinfo_has_a_name_and_no_features(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    cpu._fields.cache_clear()
    assert cpu.name()
    assert cpu.features() == []
    assert not cpu.has_fast_bfloat16()
    cpu._fields.cache_clear()
