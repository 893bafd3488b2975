"""GPUs are counted as the operator counts them; the driver is a stand-in."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

import tiers.hardware
from tiers.errors import ConfigError, PlacementError
from tiers.hardware import CARDS, Machine, device_class, find_card, present_gpus

GIB = 1 << 30


class Nvml:
    """What of pynvml is used, over a list of GPUs in PCI order: name, GiB, capability, UUID."""

    NVMLError = pynvml.NVMLError
    NVMLError_LibraryNotFound = pynvml.NVMLError_LibraryNotFound
    NVMLError_DriverNotLoaded = pynvml.NVMLError_DriverNotLoaded
    NVMLError_NotFound = pynvml.NVMLError_NotFound

    def __init__(
        self, *gpus: tuple[str, int, tuple[int, int], str], error: Exception | None = None, cuda: int = 13000
    ) -> None:
        self.gpus = gpus
        self.error = error
        self.cuda = cuda
        self.is_open = False

    def nvmlInit(self) -> None:  # noqa: N802  # NVML's names
        if self.error:
            raise self.error
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        return self.cuda

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:  # noqa: N802
        for index, gpu in enumerate(self.gpus):
            if gpu[3] == uuid:
                return index
        raise pynvml.NVMLError_NotFound

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return self.gpus[handle][3]

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return self.gpus[handle][0]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=self.gpus[handle][1] * GIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:  # noqa: N802
        return self.gpus[handle][2]


THREE = (
    ("NVIDIA L4", 24, (8, 9), "GPU-aaaa-1"),
    ("NVIDIA A100", 80, (8, 0), "GPU-aabb-2"),
    ("NVIDIA H200", 141, (9, 0), "GPU-cccc-3"),
)


def install(monkeypatch: pytest.MonkeyPatch, nvml: Nvml, given: str | None = None) -> Nvml:
    monkeypatch.setattr(tiers.hardware, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    return nvml


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (None, [24, 80, 141]),
        ("1", [80]),
        ("2, 0", [141, 24]),
        ("GPU-cccc-3,0", [141, 24]),
        ("GPU-cc", [141]),
        ("GPU-aa", []),
        ("", []),
        ("7", []),
        ("0,-1,1", [24]),
        ("0,7,1", [24]),
        ("MIG-none,1", []),
    ],
)
def test_gpus_are_those_that_this_process_was_given(
    monkeypatch: pytest.MonkeyPatch, given: str | None, sizes: list[int]
) -> None:
    nvml = install(monkeypatch, Nvml(*THREE), given)
    assert [gpu.memory // GIB for gpu in present_gpus()] == sizes
    assert not nvml.is_open


def test_a_gpu_is_known_by_name_and_by_its_fp8_units(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Nvml(*THREE))
    assert [(gpu.name, gpu.has_fp8) for gpu in present_gpus()] == [
        ("NVIDIA L4", True),
        ("NVIDIA A100", False),
        ("NVIDIA H200", True),
    ]


@pytest.mark.parametrize("kind", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_without_a_driver_there_are_no_gpus_and_plans_are_for_ram(
    monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    install(monkeypatch, Nvml(error=pynvml.NVMLError(kind)))
    assert present_gpus() == ()
    machine = Machine.here()
    assert machine.backend == "cpu"
    assert machine.ram > GIB
    assert "CPU" in str(machine)


def test_a_driver_that_does_not_answer_is_an_error_and_not_a_machine_without_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, Nvml(error=pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)))
    with pytest.raises(PlacementError, match="driver does not answer"):
        Machine.here()


@pytest.mark.parametrize(("cuda", "version"), [(12040, "12.4"), (12090, "12.9"), (11080, "11.8")])
def test_a_driver_that_is_too_old_is_a_sentence_that_names_one_that_is_not(
    monkeypatch: pytest.MonkeyPatch, cuda: int, version: str
) -> None:
    nvml = install(monkeypatch, Nvml(*THREE, cuda=cuda))
    with pytest.raises(PlacementError, match=rf"is for CUDA {version}, and .* needs 13\.0: install .* R580"):
        Machine.here()
    assert not nvml.is_open
    assert Machine.here("cpu").backend == "cpu", "where nothing is asked of it"


@pytest.mark.parametrize("cuda", [13000, 13020, 14000])
def test_a_newer_driver_will_do(monkeypatch: pytest.MonkeyPatch, cuda: int) -> None:
    install(monkeypatch, Nvml(*THREE, cuda=cuda))
    assert len(present_gpus()) == len(THREE)


def test_a_machine_with_gpus_is_planned_for_them_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Nvml(*THREE))
    assert Machine.here().backend == "cuda"
    assert Machine.here().smallest.name == "NVIDIA L4"
    assert Machine.here("cpu").gpus == ()


@pytest.mark.parametrize("name", ["h100", "H100", "rtx 4090", "RTX_4090", "a100-80gb"])
def test_cards_are_found_however_they_are_spelled(name: str) -> None:
    assert find_card(name) in CARDS


def test_an_unknown_card_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"H100.*H200"):
        find_card("V100")


def test_cards_are_listed_from_the_smallest() -> None:
    assert [card.memory for card in CARDS] == sorted(card.memory for card in CARDS)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512f amx_tile\n\nflags\t\t: fpu\n", "x86_64 with amx"),
        ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", "x86_64 with avx512"),
        ("vmx flags\t: amx_tile\nflags\t\t: fpu avx2 notavx512f\n", "x86_64"),
        ("Features\t: fp asimd\n", "x86_64"),
        (None, "x86_64"),
    ],
)
def test_a_cpu_is_of_a_class_by_its_instructions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, info: str | None, expected: str
) -> None:
    device_class.cache_clear()
    monkeypatch.setattr(tiers.hardware, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    if info is not None:
        (tmp_path / "cpuinfo").write_text(info)
    assert device_class("cpu") == expected
    device_class.cache_clear()


@pytest.mark.parametrize(
    ("gpus", "device", "expected"),
    [
        (THREE, "NVIDIA H200", "sm_90"),
        (THREE, "NVIDIA L4", "sm_89"),
        (THREE, "NVIDIA H200 MIG 1g.18gb", "NVIDIA H200 MIG 1g.18gb"),
        (THREE[2:], "NVIDIA H200 MIG 1g.18gb", "sm_90"),
        ((("NVIDIA B300", 268, (10, 3), "GPU-1"),), "NVIDIA B300", "sm_103"),
        ((), "NVIDIA H200", "NVIDIA H200"),
    ],
)
def test_a_gpu_is_of_a_class_by_its_generation(
    monkeypatch: pytest.MonkeyPatch, gpus: tuple[Any, ...], device: str, expected: str
) -> None:
    device_class.cache_clear()
    install(monkeypatch, Nvml(*gpus))
    assert device_class(device) == expected
    device_class.cache_clear()


def test_a_class_that_cannot_be_told_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device_class.cache_clear()
    install(monkeypatch, Nvml(error=pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)))
    with pytest.raises(PlacementError, match="does not answer"):
        device_class("NVIDIA H200")
    install(monkeypatch, Nvml(*THREE))
    assert device_class("NVIDIA H200") == "sm_90"
    device_class.cache_clear()
