"""A parser for the HLO text of compiled programs: computations and their instructions. Framework-free."""

import dataclasses
import functools
import math
import re

from smollm_jax import errors

# The `jax.named_scope`s of train_step.py, loss.py and smollm.py. Work outside them belongs to a layer.
SCOPES = {"optimizer": "optimizer", "loss": "head and loss", "attention": "attention"}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)(\(.*)$")
_CALLED = re.compile(
    r"\b(body|condition|to_apply|calls|\w+_computations?)=(?:%?([\w.-]+)|\{([^}]*)\})"  # a name, or {several}
)
_ARRAY = re.compile(r"\b(?:(pred)|(token)|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str  # of its result, as in the text: `f32[8,4]{1,0}`, or a tuple in parentheses
    opcode: str
    operands: tuple[str, ...]  # names
    attributes: str  # the text after the operands
    is_root: bool  # whether its result is that of its computation

    @property
    def origin(self) -> str:
        """JAX's name of the operation; "" without one."""
        return self._quoted("op_name")

    @property
    def custom_call_target(self) -> str:
        """The library function of a custom call; "" for any other instruction."""
        return self._quoted("custom_call_target")

    @property
    def called(self) -> dict[str, list[str]]:
        """The computations it refers to, by attribute (`body`, `calls`, `branch_computations` ...)."""
        names = _CALLED.findall(self.attributes)
        return {attribute: [name] if name else re.findall(r"[\w.-]+", several) for attribute, name, several in names}

    def _quoted(self, attribute: str) -> str:
        match = re.search(rf'\b{attribute}="([^"]*)"', self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Program:
    computations: dict[str, dict[str, Instruction]]  # by name, instructions in the order of the text
    entry: str  # name of the main computation

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        """The instructions of all computations by name; names are unique in a program."""
        return {name: each for computation in self.computations.values() for name, each in computation.items()}

    def kind(self, instruction: Instruction) -> str:
        """The kind of work: that of the scope it was traced in, or else of its operation."""
        for word, kind in SCOPES.items():
            if re.search(rf"\b{word}\b", instruction.origin):
                return kind
        fused = (self.computations.get(name, {}) for name in instruction.called.get("calls", []))
        opcodes = {instruction.opcode} | {each.opcode for computation in fused for each in computation.values()}
        is_matmul = "dot" in opcodes or re.search("gemm|matmul", instruction.custom_call_target)
        return "matrix products" if is_matmul else "elementwise"


def parse(text: str) -> Program:
    """The program that `compiled.as_text()` describes."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if match := _INSTRUCTION.match(line):
            root, name, shape, opcode, arguments = match.groups()
            operands, attributes = _split_at_closing(arguments)
            names = tuple(re.findall(r"%([\w.-]+)", operands))
            current[name] = Instruction(name, shape, opcode, names, attributes, bool(root))
        elif (match := _COMPUTATION.match(line)) and match[2] != "HloModule":
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
    return Program(computations, entry)


def _split_at_closing(text: str) -> tuple[str, str]:
    """The text up to the parenthesis that closes the first one, and the rest."""
    depth = 0
    for end, letter in enumerate(text, 1):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:end], text[end:]
    raise errors.SmolLMError(f"unbalanced parentheses in the HLO text: {text[:80]}")


def dimensions(shape: str) -> list[int]:
    """The dimensions of an array, or of a tuple's first array."""
    return [int(size) for size in re.search(r"\[([\d,]*)\]", shape)[1].split(",") if size]  # pyright: ignore


def size_in_bytes(shape: str) -> int:
    """Bytes of an array or of all arrays of a tuple."""
    total = 0
    for pred, token, bits, sizes in _ARRAY.findall(shape):
        width = 8 if pred else 0 if token else int(bits)
        total += math.prod(int(size) for size in sizes.split(",") if size) * width // 8
    return total
