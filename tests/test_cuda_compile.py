"""The CUDA sources compiled by nvcc for every architecture, without a GPU: no spills, wide accesses, budgets of the main loops.

The budgets are the counts of nvcc 13.0 for sm_90 with a little room; a change that exceeds one is slower on every GPU. A loop's count
includes its rarely taken branches (mirrored data, element weights, losses a sample).
"""

import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
KERNEL_FILES = sorted((SOURCES / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
ELEMENTS = 8  # of a thread in one pass of a main loop
SIGNS = 32  # the same of divergence_step's
RESOURCES = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc was not found"),
    pytest.mark.skipif(find_spec("triton") is None, reason="cuobjdump and nvdisasm come with triton, which is not installed"),
]


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin: its resources and its instructions, with the places that branches go back to."""

    registers: int
    stack: int
    local: int
    opcodes: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    def storing_loops(self) -> list[tuple[str, ...]]:
        """Opcodes of the loops that store to global memory in 16-byte accesses, the smallest first."""
        bodies = [self.opcodes[first : last + 1] for first, last in self.loops]
        return sorted((body for body in bodies if any(op.startswith("STG.E.128") for op in body)), key=len)

    def main_loop(self) -> Counter:
        """Of the smallest of them, how often it has each opcode."""
        return Counter(self.storing_loops()[0])


@dataclass(frozen=True)
class Budget:
    """What the main loop of one kernel may cost on sm_90: instructions an element; how many 16-byte loads and stores it has.

    Each tensor is loaded once, whether x1 is mirrored or not; the loads of weights are two more in path_loss.
    """

    file: str
    kernel: str
    instructions: float
    loads: int
    stores: int
    registers: int = 64

    def __str__(self):
        return f"{self.file} {self.kernel}"


# kernel: the template arguments (output, x1, whether x0 is drawn, whether nothing is mirrored or weighted) as they are mangled.
BF16 = r"NS_8Bfloat16ES\d+_"
BUDGETS = [
    Budget("path_loss", f"{BF16}Lb1ELb1", 56, 2, 1),
    Budget("path_loss", f"{BF16}Lb1ELb0", 62, 4, 1),
    Budget("path_loss", "ffLb1ELb1", 58, 4, 2, registers=72),
    Budget("path_loss", "ffLb1ELb0", 66, 6, 2, registers=72),
    Budget("path_loss", f"{BF16}Lb0ELb1", 25, 3, 1),
    Budget("path_sample", f"{BF16}Lb1ELb1", 41, 1, 1),
    Budget("path_sample", f"{BF16}Lb1ELb0", 44, 1, 1),
    Budget("path_sample", "ffLb1ELb1", 40, 2, 2),
    Budget("path_sample", "ffLb1ELb0", 45, 2, 2),
    Budget("path_sample", f"{BF16}Lb0ELb0", 12, 2, 1),
]


# Of linear_step's kernels: the template arguments, and the 16-byte loads that wait for memory together: x, and two of each known term.
TOGETHER = {"fLi1": 3, "fLi2": 5, "fLi4": 7} | {
    f"NS_{dtype}ELi{terms}": 2 + 2 * known for dtype in ("8Bfloat16", "7Float16") for terms, known in ((1, 1), (2, 2), (4, 3))
}


def tool(name, *arguments):
    program = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def compile_cubin(source, architecture, folder):
    cubin = folder / f"{source.stem}.{architecture}.cubin"
    code = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [NVCC, "-std=c++17", "-O3", "-Werror", "all-warnings", "-gencode", code, f"-I{SOURCES}", "-cubin", source, "-o", cubin]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return cubin


def kernels_of(cubin):
    resources = {m[1]: tuple(map(int, m.groups()[1:])) for m in RESOURCES.finditer(tool("cuobjdump", "-res-usage", cubin))}
    code = dict(_listing(section) for section in re.split(r"\n\t\.section\t\.text\.", tool("nvdisasm", cubin))[1:])
    return {name: Kernel(registers, stack, local, *code[name]) for name, (registers, stack, _, local) in resources.items()}


def _listing(section):
    """(name, (opcodes, loops)) of one function of a disassembly."""
    opcodes, labels, branches = [], {}, []
    for line in section.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(opcodes)
        elif found := INSTRUCTION.search(line):
            if found[1].startswith("BRA") and (target := re.search(r"\.L_x_\d+", found[2])):
                branches.append((target[0], len(opcodes)))
            opcodes.append(found[1])
    loops = tuple((labels[target], place) for target, place in branches if labels.get(target, place + 1) < place)
    return section.split(",", 1)[0], (tuple(opcodes), loops)


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """Every file for every architecture that this nvcc knows."""
    folder = tmp_path_factory.mktemp("cubins")
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    jobs = [(source, arch) for source in KERNEL_FILES for arch in ARCHITECTURES if f"compute_{arch}\n" in known]
    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip([(source.stem, arch) for source, arch in jobs], pool.map(lambda job: compile_cubin(*job, folder), jobs), strict=True)
        )


def test_no_kernel_spills_on_any_architecture(cubins):
    assert {file for file, _ in cubins} == {source.stem for source in KERNEL_FILES}
    for (file, architecture), cubin in cubins.items():
        for name, kernel in kernels_of(cubin).items():
            spilled = [op for op in kernel.opcodes if op.startswith(("LDL", "STL"))]
            assert (kernel.stack, kernel.local, spilled) == (0, 0, []), f"{file} sm_{architecture} {name}"
            assert kernel.registers <= 96, f"{file} sm_{architecture} {name}"


@pytest.mark.parametrize("kernel", ["ffLb1ELb1", f"{BF16}Lb1ELb1", r"NS_8Bfloat16EfLb1ELb1", r"NS_7Float16EfLb1ELb1"])
def test_a_loss_is_loaded_before_its_noise_is_drawn(cubins, kernel):
    """Instructions are issued in order: the noise is drawn while memory is waited for, not before."""
    (found,) = [each for name, each in kernels_of(cubins["path_loss", 90]).items() if re.search(f"packed_kernelI{kernel}", name)]
    body = found.storing_loops()[0]
    loads = [place for place, op in enumerate(body) if op.startswith("LDG.E.128")]
    assert loads and max(loads) < 0.2 * len(body)


@pytest.mark.parametrize("dtype", ["f", "NS_8Bfloat16E", "NS_7Float16E"])
def test_products_with_signs_are_loaded_before_the_signs_are_drawn(cubins, dtype):
    """The loop over chunks, of which a thread has SIGNS elements, with the sum of a chunk."""
    (found,) = [each for name, each in kernels_of(cubins["divergence_step", 90]).items() if f"packed_signs_kernelI{dtype}" in name]
    bodies = [found.opcodes[first : last + 1] for first, last in found.loops]
    body = min((body for body in bodies if any(op.startswith("LDG.E.128") for op in body)), key=len)
    wide = [place for place, op in enumerate(body) if op.startswith("LDG.E.128")]
    assert max(wide) < 0.36 * len(body)
    assert len(wide) == (8 if dtype == "f" else 4) and found.registers <= 64
    assert (len(body) - body.count("NOP")) / SIGNS <= 15


@pytest.mark.parametrize(("kernel", "loads"), TOGETHER.items())
def test_a_step_waits_for_memory_once(cubins, kernel, loads):
    """No arithmetic comes between the loads of a pack: it would wait for those before it, as instructions are issued in order."""
    (found,) = [each for name, each in kernels_of(cubins["linear_step", 90]).items() if f"packed_kernelI{kernel}" in name]
    body = found.storing_loops()[-1]  # over packs, with those of the terms within
    arithmetic = next(place for place, op in enumerate(body) if op.startswith(("FMUL", "FADD", "FFMA")))
    assert sum(op.startswith("LDG.E.128") for op in body[:arithmetic]) >= loads


@pytest.mark.parametrize("source", KERNEL_FILES, ids=lambda source: source.stem)
def test_gpus_before_ampere(source, tmp_path):
    """They lack the conversions of two numbers at once and of bfloat16."""
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    if "compute_75\n" not in known:
        pytest.skip("this nvcc does not know them")
    assert compile_cubin(source, 75, tmp_path).stat().st_size > 1000


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_main_loops_are_within_budget(cubins, budget):
    kernels = kernels_of(cubins[budget.file, 90])
    (kernel,) = [kernel for name, kernel in kernels.items() if re.search(f"packed_kernelI{budget.kernel}", name)]
    loop = kernel.main_loop()
    loads, stores = ({op: n for op, n in loop.items() if op.startswith(kind)} for kind in ("LDG.", "STG."))
    assert kernel.registers <= budget.registers
    assert (loop.total() - loop["NOP"]) / ELEMENTS <= budget.instructions
    assert all(op.startswith("LDG.E.128") for op in loads) and sum(loads.values()) == budget.loads
    # Beside the results only the partial sum of a chunk, where every sample has a loss of its own.
    assert {op: n for op, n in stores.items() if op != "STG.E.64"} == {"STG.E.128": budget.stores}
