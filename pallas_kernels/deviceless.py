"""Compiles a jitted function, Pallas kernels included, to machine code for an NVIDIA GPU on a machine that has none.

Needs the CUDA plugin of exactly jaxlib's version (`pip install jax-cuda13-plugin jax-cuda13-pjrt`, no driver), `ptxas`
(`nvidia-cuda-nvcc`) and, for instruction counts, the disassembler that the `triton` wheel carries. It is the compiler
of a GPU machine, so registers, spills, shared memory and instructions are those of a real run; times are not to be had.
Import this module before anything initializes JAX: it sets where XLA dumps its code.
"""

import collections
import dataclasses
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

_dump = pathlib.Path(tempfile.mkdtemp(prefix="lowbit_kernels_"))
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The dump takes stack traces; an installed llvm-symbolizer, run for each of their frames, makes it six times as slow.
os.environ.setdefault("LLVM_DISABLE_SYMBOLIZATION", "1")
os.environ["MOSAIC_GPU_DUMP_TO"] = str(_dump)
os.environ["JAX_TRITON_DUMP_DIR"] = str(_dump)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={_dump} --xla_dump_emitter_re=.*"

import jax  # noqa: E402  the flags come first
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from pallas_kernels.chips import CHIPS, Chip, abstract_gpu  # noqa: E402
from pallas_kernels.ptx import float_bytes  # noqa: E402


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the assembler and the disassembler say of one kernel."""

    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: dict[str, int]  # instruction -> how often it stands in the code
    instructions: int
    counts: dict[str, int]
    float_bytes: int  # lowest bytes of floats that are stored: assemblers before CUDA 13.1 store other bytes


def missing() -> str | None:
    """What is not installed that compiling needs, in words; None when all is there."""
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        version = importlib.metadata.version("jaxlib")
        return (
            f"the CUDA plugin: pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version}"
            " nvidia-cuda-nvcc triton"
        )
    if not _assemblers():
        return "ptxas: pip install --no-deps nvidia-cuda-nvcc"
    if _tool("cuobjdump") is None or _tool("nvdisasm") is None:
        return "cuobjdump and nvdisasm: pip install --no-deps triton"
    return None


def compile_for(chip: str, function: Callable, *arguments: jax.ShapeDtypeStruct) -> list[Report]:
    """The kernels that XLA makes of `function(*arguments)` on the chip, those written by hand first.

    Raises: ValueError for an unknown chip; RuntimeError when a tool is missing or the assembler fails."""
    if chip not in CHIPS:
        raise ValueError(f"pallas_kernels.deviceless: no chip {chip!r}; here are {', '.join(CHIPS)}.")
    if what := missing():
        raise RuntimeError(f"pallas_kernels.deviceless needs {what}.")
    before = set(_dump.rglob("*"))
    with abstract_gpu(chip):
        sharding = SingleDeviceSharding(_topology(chip).devices[0])
        jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
        jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    made = sorted(set(_dump.rglob("*")) - before)  # jax-triton writes into folders of its own
    dynamic = _dynamic_shared_memory([p for p in made if p.name.endswith("thunk_sequence.txt")])
    reports = [_assemble(path, dynamic) for path in made if path.suffix == ".ptx" and ".target" in path.read_text()]
    return sorted(reports, key=lambda r: (not r.tensor_core, -r.instructions))


_topologies: dict[str, Any] = {}


def _topology(chip: str) -> Any:
    if chip not in _topologies:
        _topologies[chip] = topologies.get_topology_desc(
            platform="cuda", topology_name="1x1x1", topology="1x1x1", target_config=_target(CHIPS[chip])
        )
    return _topologies[chip]


def _target(chip: Chip) -> str:
    major, minor = chip.capability
    extension = "ACCELERATED_FEATURES" if chip.accelerated else "NONE"
    return f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {chip.shared_memory} shared_memory_per_block_optin: {chip.shared_memory_block}
      threads_per_core_limit: 2048 core_count: {chip.multiprocessors} fpus_per_core: {chip.lanes}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      memory_bandwidth: {chip.bandwidth} l2_cache_size: {chip.l2} clock_rate_ghz: {chip.ghz}
      device_memory_size: {chip.memory} registers_per_core_limit: 65536 registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {major} {f"minor: {minor}" if minor else ""} feature_extension: {extension} }}
      device_vendor: "NVIDIA Corporation" name: "{chip.name}" driver_version: "13.0.0" runtime_version: "13.0.0"
      compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{chip.name}"
    """


def _tool(name: str) -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        carried = pathlib.Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if carried.exists():
            return str(carried)
    return shutil.which(name)


def _assemblers() -> list[str]:
    """`ptxas` programs, the newest first: that of triton does not read what the newest JAX writes."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    wheels = [path for place in places for path in sorted(glob.glob(f"{place}/*/bin/ptxas"), reverse=True)]
    return [path for path in (*wheels, shutil.which("ptxas"), _tool("ptxas")) if path]


def _assemble(path: pathlib.Path, dynamic: dict[str, int]) -> Report:
    text, object_file = path.read_text(), path.with_suffix(".cubin")
    target = re.search(r"\.target\s+(sm_\w+)", text)
    name = re.search(r"\.entry\s+(\S+?)\s*\(", text)
    said = ""
    for program in _assemblers():
        done = subprocess.run(
            [program, "-v", "-O3", f"-arch={target[1] if target else 'sm_90'}", str(path), "-o", str(object_file)],
            capture_output=True, text=True,
        )  # fmt: skip
        said = done.stdout + done.stderr
        if done.returncode == 0:
            break
    else:
        raise RuntimeError(f"pallas_kernels.deviceless: ptxas does not take {path.name}: {said[:500]}")
    number = lambda pattern: int(found[1]) if (found := re.search(pattern, said)) else 0
    counts, tensor = _disassemble(object_file)
    kernel = name[1] if name else path.stem
    return Report(
        kernel=kernel,
        registers=number(r"Used (\d+) registers"),
        spill_bytes=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        shared_bytes=dynamic.get(kernel, number(r"(\d+) bytes smem")),
        tensor_core=dict(tensor),
        instructions=sum(counts.values()),
        counts=dict(counts),
        float_bytes=float_bytes(text),
    )


_TENSOR_CORE = re.compile(r"\b((?:HGMMA|IGMMA|QGMMA|BGMMA|HMMA|IMMA|BMMA|QMMA|UTC\w*MMA|OMMA)[.\w]*)")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_]+)")


def _disassemble(path: pathlib.Path) -> tuple[collections.Counter, collections.Counter]:
    dumper, disassembler = _tool("cuobjdump"), _tool("nvdisasm")
    assert dumper and disassembler, "missing() was asked first"
    where = f"{os.path.dirname(disassembler)}:{os.environ['PATH']}"
    text = subprocess.run(
        [dumper, "-sass", str(path)], capture_output=True, text=True, env=os.environ | {"PATH": where}
    ).stdout
    counts, tensor = collections.Counter(), collections.Counter()
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            counts[found[1]] += 1
            if used := _TENSOR_CORE.search(line):
                tensor[used[1]] += 1
    return counts, tensor


def _dynamic_shared_memory(paths: list[pathlib.Path]) -> dict[str, int]:
    pattern = re.compile(r"kCustomKernel.*?(\S+) grid: .*shared_memory: (\d+)")
    found = [m for path in paths for line in path.read_text().splitlines() if (m := pattern.search(line))]
    return {m[1]: int(m[2]) for m in found}
