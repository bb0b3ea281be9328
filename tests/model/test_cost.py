"""A GPU's peak FLOP/s is that of the card that the driver names, or unknown: another card's would give a wrong MFU."""

from types import SimpleNamespace
from typing import Any

import pytest

from smollm_jax.config import Recipe, preset
from smollm_jax.model import cost
from smollm_jax.training.announce import announce
from smollm_jax.training.execution import ExecutionConfig, Intervals

# What drivers call cards: dense bfloat16 with float32 sums in TFLOP/s, memory in GB/s, of NVIDIA's own documents.
CARDS = {
    "NVIDIA H100 80GB HBM3": (989, 3350),
    "NVIDIA H100 PCIe": (756, 2000),
    "NVIDIA H100 NVL": (835, 3900),
    "NVIDIA H200": (989, 4800),
    "NVIDIA H200 NVL": (835, 4800),
    "NVIDIA B200": (2250, 8000),
    "NVIDIA A100-SXM4-40GB": (312, 1555),
    "NVIDIA A100-SXM4-80GB": (312, 2039),
    "NVIDIA A100-PCIE-40GB": (312, 1555),
    "NVIDIA A100 80GB PCIe": (312, 1935),
    "A100-SXM4-40GB": (312, 1555),  # drivers before 470
    "NVIDIA A10": (125, 600),
    "NVIDIA A10G": (70, 600),
    "NVIDIA L4": (121, 300),
    "NVIDIA L40": (181, 864),
    "NVIDIA L40S": (362, 864),
    "NVIDIA RTX A6000": (154.8, 768),
    "NVIDIA RTX 6000 Ada Generation": (364.2, 960),
    "NVIDIA GeForce RTX 3090": (71, 936),
    "NVIDIA GeForce RTX 3090 Ti": (80, 1008),
    "NVIDIA GeForce RTX 4090": (165.2, 1008),
    "NVIDIA GeForce RTX 5090": (209.5, 1792),
}
# Other cards whose names hold one of these, cards without bfloat16, parts of a card, and what is no GPU.
OTHERS = """
NVIDIA GH200 480GB
NVIDIA GB200
NVIDIA H100 80GB HBM3 MIG 1g.10gb
NVIDIA A100-SXM4-40GB MIG 3g.20gb
NVIDIA RTX A1000
NVIDIA A16
NVIDIA GeForce RTX 4090 D
NVIDIA GeForce RTX 4090 Laptop GPU
NVIDIA GeForce RTX 3080
NVIDIA GeForce RTX 5090 D
Quadro RTX 6000
Tesla T4
AMD Instinct MI300X
cpu
"""


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_its_own_peak_and_bandwidth(name):
    tflops, gigabytes = CARDS[name]
    assert cost.peak_flops(name) == pytest.approx(1e12 * tflops)
    assert cost.bandwidth(name) == pytest.approx(1e9 * gigabytes)


@pytest.mark.parametrize("name", OTHERS.strip().splitlines())
def test_a_card_that_is_not_known_has_none(name):
    assert cost.peak_flops(name) is None
    assert cost.bandwidth(name) is None


def test_float32_has_no_peak_of_bfloat16():
    assert cost.peak_flops("NVIDIA H100 PCIe", "float32") is None


@pytest.mark.parametrize(
    ("kind", "dtype", "lines"),
    [
        ("NVIDIA H100 PCIe", "bfloat16", []),
        (
            "Tesla T4",
            "bfloat16",
            ["note: MFU is not reported: smollm_jax/model/cost.py has no peak for Tesla T4 in bfloat16"],
        ),
        (
            "NVIDIA L4",
            "float32",
            ["note: MFU is not reported: smollm_jax/model/cost.py has no peak for NVIDIA L4 in float32"],
        ),
    ],
)
def test_where_mfu_is_left_out_one_line_says_so(tmp_path, capsys, kind, dtype, lines):
    recipe = Recipe(10, 2, 64, learning_rate=1e-3, warmup_steps=0, dtype=dtype)
    start = SimpleNamespace(config=preset("tiny"), recipe=recipe, restored=None, bundle=None, defaults="")
    setup = SimpleNamespace(
        start=start, recipe_name="demo", execution=ExecutionConfig(dtype), intervals=Intervals(1, 1)
    )
    setup.limit, setup.planned, setup.why_not_cudnn = 1 << 30, 1 << 20, ""
    flags: Any = SimpleNamespace(recipe=None, mesh=None, init_from=None, remat=None)
    announce(tmp_path, flags, setup, SimpleNamespace(platform="gpu", device_kind=kind), retained=False)
    assert [line for line in capsys.readouterr().out.splitlines() if "MFU" in line] == lines
