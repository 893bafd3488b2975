"""What there is to run on: the GPUs of this machine, or of one named, and memory. Knows nothing of models."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pynvml

from tiers.errors import ConfigError, PlacementError
from tiers.ram import free_ram

MIB, GIB = 1 << 20, 1 << 30
FP8_CAPABILITY = (8, 9)
"""The compute capability from which on tensor cores multiply FP8: Ada and Hopper."""
NODE_GPUS = 8
"""What a node of data-centre cards holds; tensor parallelism stays inside one."""
NEEDS_CUDA = (13, 0)
"""What a driver must be for: vLLM 0.32.0 on GPUs wants PyTorch 2.13.0, whose wheels bring that of CUDA 13.0."""
FIRST_DRIVER = "R580"
"""With which NVIDIA's drivers are for that."""
_CPU_INFO = Path("/proc/cpuinfo")
_INSTRUCTIONS = {"amx_tile": "amx", "avx512f": "avx512"}
"""Flags of a CPU by which vLLM chooses its kernels, the first that it has, and what they are called."""


@dataclass(frozen=True)
class Gpu:
    """One GPU: ``memory`` in bytes as NVML reports it, ``capability`` as CUDA counts generations."""

    name: str
    memory: int
    capability: tuple[int, int]

    @property
    def has_fp8(self) -> bool:
        """Whether it multiplies FP8 itself."""
        return self.capability >= FP8_CAPABILITY


CARDS: tuple[Gpu, ...] = tuple(
    Gpu(name, mib * MIB, capability)
    for name, mib, capability in (
        ("A10", 23028, (8, 6)),
        ("L4", 23034, (8, 9)),
        ("RTX-4090", 24564, (8, 9)),
        ("RTX-3090", 24576, (8, 6)),
        ("RTX-5090", 32607, (12, 0)),
        ("A100-40GB", 40960, (8, 0)),
        ("L40S", 46068, (8, 9)),
        ("RTX-6000-Ada", 49140, (8, 9)),
        ("H100", 81559, (9, 0)),
        ("A100-80GB", 81920, (8, 0)),
        ("H100-NVL", 95830, (9, 0)),
        ("H20", 97871, (9, 0)),
        ("H200", 143771, (9, 0)),
        ("B200", 183359, (10, 0)),
    )
)
"""Cards by name, smallest first, with the MiB that nvidia-smi prints for them."""


def find_card(name: str) -> Gpu:
    """The card of this name.

    Raises:
        ConfigError: there is none; the sentence lists those there are.
    """
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    for card in CARDS:
        if card.name.lower() == wanted:
            return card
    raise ConfigError(f"There is no card {name!r}; the cards are {', '.join(card.name for card in CARDS)}.")


@dataclass(frozen=True)
class Machine:
    """Where engines run: on the GPUs of one or more equal nodes, or on a CPU with ``ram`` free bytes."""

    backend: Literal["cpu", "cuda"]
    gpus: tuple[Gpu, ...] = ()
    """Of one node."""
    ram: int = 0
    nodes: int = 1

    @classmethod
    def of(cls, card: Gpu, count: int = NODE_GPUS, nodes: int = 1) -> "Machine":
        """Nodes with ``count`` of the same card in each."""
        return cls("cuda", gpus=(card,) * count, nodes=nodes)

    @classmethod
    def here(cls, backend: Literal["auto", "cpu", "cuda"] = "auto") -> "Machine":
        """This machine; ``auto`` is for its GPUs if it has any.

        Raises:
            PlacementError: there is an NVIDIA driver and it does not answer, or is too old.
        """
        gpus = present_gpus() if backend != "cpu" else ()
        if backend == "auto":
            backend = "cuda" if gpus else "cpu"
        return cls(backend, gpus, ram=free_ram())

    @property
    def smallest(self) -> Gpu:
        """The GPU with the least memory: parallelism takes the same of each."""
        return min(self.gpus, key=lambda gpu: gpu.memory)

    def __str__(self) -> str:
        if self.backend == "cpu":
            return f"this machine's CPU, {self.ram / GIB:.1f} GiB of memory free"
        names = " and ".join(dict.fromkeys(gpu.name for gpu in self.gpus))
        per_node = f"{len(self.gpus)} × {names}" if self.gpus else "no GPUs"
        return per_node if self.nodes == 1 else f"{self.nodes} nodes of {per_node}"


def present_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that this process may use, in the order the config counts them; none without a driver.

    That is the order of the PCI bus, in which NVML and nvidia-smi count, or the order of CUDA_VISIBLE_DEVICES.

    Raises:
        PlacementError: there is a driver and it does not answer, or is older than vLLM can use.
    """
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return ()
    except pynvml.NVMLError as error:
        raise PlacementError(f"The NVIDIA driver does not answer ({error}): does `nvidia-smi` work?") from error
    try:
        _refuse_old_driver()
        return tuple(_read(handle) for handle in _visible())
    except pynvml.NVMLError as error:
        raise PlacementError(f"A GPU cannot be asked for its memory ({error}): does `nvidia-smi` work?") from error
    finally:
        pynvml.nvmlShutdown()


def _refuse_old_driver() -> None:
    number = int(pynvml.nvmlSystemGetCudaDriverVersion())  # such as 12040
    version = number // 1000, number % 1000 // 10
    if version < NEEDS_CUDA:
        has, needs = (".".join(map(str, each)) for each in (version, NEEDS_CUDA))
        raise PlacementError(
            f"The NVIDIA driver is for CUDA {has}, and vLLM on GPUs needs {needs}: install a driver of "
            f"{FIRST_DRIVER} or newer, or set `backend: cpu` where the build for CPUs is installed."
        )


def _visible() -> Iterator[object]:
    """Handles of the GPUs given to this process, as CUDA reads them: the first name that is none ends the list."""
    count = pynvml.nvmlDeviceGetCount()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    if given is None:
        yield from handles
        return
    uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    for name in map(str.strip, given.split(",")):
        if name.isdigit() and int(name) < count:
            yield handles[int(name)]
        elif name.startswith("MIG-"):
            try:
                yield pynvml.nvmlDeviceGetHandleByUUID(name)
            except pynvml.NVMLError_NotFound:
                return
        else:
            # Any beginning of a UUID that belongs to one GPU only names it.
            matching = [handle for handle, uuid in zip(handles, uuids, strict=True) if uuid.startswith(name)]
            if not name.startswith("GPU-") or len(matching) != 1:
                return
            yield matching[0]


def _read(handle: object) -> Gpu:
    return Gpu(
        name=str(pynvml.nvmlDeviceGetName(handle)),
        memory=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
    )


@cache
def device_class(device: str) -> str:
    """What chooses the kernels of an engine on this machine: machines of one class compute alike.

    Args:
        device: what the engine runs on, as it names it: ``cpu``, or a GPU's name.

    Returns:
        Such as ``x86_64 with amx``, or ``sm_90``. A GPU whose generation cannot be told is a class by itself.

    Raises:
        PlacementError: there is an NVIDIA driver and it does not answer.
    """
    if device == "cpu":
        flags = _cpu_flags()
        known = next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), None)
        return f"{platform.machine()} with {known}" if known else platform.machine()
    gpus = present_gpus()
    # A part of a GPU has a name of its own; that of all being of one generation is its too.
    generations = {gpu.capability for gpu in gpus if gpu.name == device} or {gpu.capability for gpu in gpus}
    if len(generations) != 1:
        return device
    major, minor = generations.pop()
    return f"sm_{major}{minor}"


def _cpu_flags() -> frozenset[str]:
    """Of the first core, as Linux for x86 lists them; none elsewhere."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
