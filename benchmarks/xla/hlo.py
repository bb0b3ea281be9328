"""The text of a compiled program (HLO), read."""

import dataclasses
import re

# The scopes named in train_step.py, loss.py and model.py; what is in none of them is a layer's.
SCOPES = {"optimizer": "optimizer", "loss": "head and loss", "attention": "attention"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str
    kind: str
    origin: str  # jax's name for what it computes


def instructions(text: str) -> dict[str, Instruction]:
    """The instructions of a compiled program by name, each with its kind of work."""
    computations: dict[str, str] = {}
    for block in re.split(r"\n(?=\S)", text):
        computations[block.removeprefix("ENTRY ").split(" ")[0].lstrip("%")] = block
    found = {}
    for name, opcode, rest in re.findall(r"^ +(?:ROOT )?%?([\w.-]+) = .*? ([\w-]+)\((.*)$", text, re.MULTILINE):
        origin = match[1] if (match := re.search(r'op_name="([^"]*)"', rest)) else ""
        called = computations.get(match[1], "") if (match := re.search(r"calls=%?([\w.-]+)", rest)) else ""
        scope = next((kind for word, kind in SCOPES.items() if re.search(rf"\b{word}\b", origin)), None)
        product = opcode == "dot" or " dot(" in called or re.search(r'custom_call_target="[^"]*(gemm|matmul)', rest)
        found[name] = Instruction(opcode, scope or ("matrix products" if product else "elementwise"), origin)
    return found
