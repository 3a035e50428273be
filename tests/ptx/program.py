"""The text of a PTX kernel as instructions."""

import re
from dataclasses import dataclass

LABEL = re.compile(r"(\$?[\w$]+):$")
GUARDED = re.compile(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)$")
WITH_TEMPORARY = re.compile(r"\{ \.reg \.b32 tmp; (.*); \}$")  # a block of inline assembly on one line


@dataclass(frozen=True)
class Instruction:
    """``@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1];``: predicate %p1, negated, parts (ld, global, v2, b32), operands as they stand."""

    predicate: str | None
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        return self.parts[0]

    @property
    def type(self) -> str:
        return self.parts[-1]


@dataclass(frozen=True)
class Program:
    """parameters: names in order; threads: of a block; labels: the places of instructions that branches go to."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def parse(ptx: str) -> Program:
    """The one kernel of a module."""
    name = re.search(r"\.entry (\w+)", ptx)[1]
    parameters = tuple(re.findall(r"\.param \.\w+[^\n]*?(\w+_param_\d+)", ptx))
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    instructions, labels = _body(ptx[ptx.index(".reqntid") :].split("{", 1)[1])
    return Program(name, parameters, threads, tuple(instructions), labels)


def _body(text: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions, labels, depth = [], {}, 0
    for line in (line.split("//")[0].strip() for line in text.splitlines()):
        if line == "}" and depth == 0:
            break
        depth += (line == "{") - (line == "}")
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif line and line not in "{}" and not line.startswith("."):
            instructions.append(_instruction(line))
    return instructions, labels


def _instruction(line: str) -> Instruction:
    inner = WITH_TEMPORARY.match(line)
    line = re.sub(r"\btmp\b", "%temporary", inner[1] if inner else line).rstrip(";")
    negation, predicate, opcode, operands = GUARDED.match(line).groups()
    # Commas within braces belong to one operand, a vector.
    split = tuple(part.strip() for part in re.split(r",(?![^{]*\})", operands)) if operands else ()
    return Instruction(predicate, negation == "!", tuple(opcode.split(".")), split, line)
