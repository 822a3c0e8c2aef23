"""The GPUs that kernels are compiled for, as XLA's compiler sees them, and the one that a program is traced for."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.checks import NoKernel


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """A GPU as XLA's compiler sees it; bytes, and bytes a second."""

    name: str
    capability: tuple[int, int]
    accelerated: bool  # instructions of this very architecture (wgmma) may be used
    multiprocessors: int
    shared_memory: int
    shared_memory_block: int
    l2: int
    bandwidth: int
    memory: int
    lanes: int
    ghz: float


CHIPS = {
    "sm_80": Chip(
        name="NVIDIA A100-SXM4-80GB", capability=(8, 0), accelerated=False, multiprocessors=108, shared_memory=167936,
        shared_memory_block=166912, l2=41943040, bandwidth=2039040000000, memory=85100068864, lanes=64, ghz=1.41,
    ),
    "sm_89": Chip(
        name="NVIDIA L4", capability=(8, 9), accelerated=False, multiprocessors=58, shared_memory=102400,
        shared_memory_block=101376, l2=50331648, bandwidth=300096000000, memory=23580639232, lanes=128, ghz=2.04,
    ),
    "sm_90": Chip(
        name="NVIDIA H200", capability=(9, 0), accelerated=True, multiprocessors=132, shared_memory=233472,
        shared_memory_block=232448, l2=52428800, bandwidth=4800000000000, memory=151397597184, lanes=128, ghz=1.98,
    ),
    "sm_100": Chip(
        name="NVIDIA B200", capability=(10, 0), accelerated=True, multiprocessors=148, shared_memory=233472,
        shared_memory_block=232448, l2=132644864, bandwidth=7672320000000, memory=191514411008, lanes=128, ghz=1.965,
    ),
}  # fmt: skip

FP8 = (8, 9)  # the compute capability from which on chips convert to and from FP8
_LEAST = (8, 0)
_NAMED = {  # compute capabilities by a part of the device kind
    r"\bG?B300": (10, 3), r"\bG?B200|\bB100": (10, 0), r"\bG?H\d": (9, 0), r"\bL\d|GeForce RTX 40|\bAda\b": (8, 9),
    r"GeForce RTX 50|RTX PRO": (12, 0), r"\bA(2|10G?|16|40)\b|RTX A\d|GeForce RTX 30": (8, 6),
    r"\bA\d": (8, 0),
}  # fmt: skip


@contextlib.contextmanager
def abstract_gpu(chip: str) -> Iterator[None]:
    """Inside, functions can be lowered for the chip, on any machine."""
    told = CHIPS[chip]
    device = AbstractDevice(told.name, told.multiprocessors, "gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def traced_kind() -> str | None:
    """The kind of device ("NVIDIA H200") that a program traced now is for: the abstract one, else this machine's GPU.

    None where neither is there. Starts JAX's backends, so it is for tracing, not for import."""
    told = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if told is not None:
        return told.device_kind if told.platform == "gpu" else None
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def abstract_capability() -> int | None:
    """The compute capability (90 for sm_90) of the abstract NVIDIA GPU that a program is traced for, 80, what kernels
    need at least, for an unknown name; None without one."""
    told = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if told is None or told.platform != "gpu" or not told.device_kind.startswith("NVIDIA"):
        return None
    found = (capability for pattern, capability in _NAMED.items() if re.search(pattern, told.device_kind))
    major, minor = next(found, _LEAST)
    return 10 * major + minor


def traced_capability() -> tuple[int, int]:
    """The compute capability of the GPU that a program is traced for, abstract or real; (0, 0) where none is known."""
    if (told := abstract_capability()) is not None:
        return divmod(told, 10)
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None) is not None
    if abstract or jax.default_backend() != "gpu":
        return 0, 0
    major, dot, minor = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if dot and major.isdigit() and minor.isdigit() else (0, 0)


def check_fp8(who: str, way_out: str) -> None:
    """Raises: NoKernel when the GPU traced for is known to have no FP8 conversions: the compiler would abort."""
    if (0, 0) < (capability := traced_capability()) < FP8:
        raise NoKernel(
            f"{who} needs compute capability {FP8[0]}.{FP8[1]}, and the GPU traced for has"
            f" {capability[0]}.{capability[1]}. {way_out}."
        )
