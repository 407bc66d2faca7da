"""Which of this machine's NVIDIA GPUs are used, by NVML: what is wrong is told before anything is loaded. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from headrace import nvml as numbers
from headrace.errors import DeviceUnavailable, InvalidOption

ALL = "all"
LEAST_FREE_BYTES = 1 << 30  # a CUDA context and the libraries' kernels alone take about half of it
MOST_TOLD = 5  # processes that a message names
_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenGpu:
    """One GPU, named so that no other can be meant."""

    number: int  # as nvidia-smi has it, or its place in CUDA_VISIBLE_DEVICES
    uuid: str
    name: str
    pci_bus_id: str | None = None

    @property
    def label(self) -> str:
        return f"GPU {self.number} ({self.name})"


def choose_gpus(text: str, named: str | None = None) -> tuple[ChosenGpu, ...]:
    """Return the GPUs that "all" or numbers with commas mean, in that order. `named` is how the user said it.

    Raises InvalidOption and DeviceUnavailable.
    """
    import pynvml  # noqa: PLC0415 - only a machine with GPUs needs it

    return find_gpus(pynvml, text, named or f"--gpus {text}", os.environ)


def find_gpus(nvml: ModuleType, text: str, named: str, environ: Mapping[str, str]) -> tuple[ChosenGpu, ...]:
    """Do what `choose_gpus` says, by this `pynvml` and in this environment."""
    wanted = _numbers(text, named)
    uuids = _seen(nvml, named, environ)
    chosen = range(len(uuids)) if wanted is None else wanted
    for number in chosen:
        if number >= len(uuids):
            raise DeviceUnavailable(
                f"{named}: there is no GPU {number}; {len(uuids)} are to be seen here, with numbers from 0 (for so many"
                " GPUs write all, or 0,1; CUDA_VISIBLE_DEVICES may hide some)"
            )
    return tuple(_gpu(nvml, number, uuids[number]) for number in chosen)


def _numbers(text: str, named: str) -> tuple[int, ...] | None:
    """Return the numbers; None for all."""
    if text.strip() == ALL:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() for word in words):
        raise InvalidOption(f'{named}: give "all", or numbers of GPUs with commas, as 0,1')
    found = tuple(map(int, words))
    twice = [number for number in dict.fromkeys(found) if found.count(number) > 1]
    if twice:
        raise InvalidOption(
            f"{named}: GPU {twice[0]} is there twice; name each once, and for several engines on a GPU add"
            " --engines-per-device"
        )
    return found


def _seen(nvml: ModuleType, named: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the UUIDs of the GPUs that a process with this environment sees."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise DeviceUnavailable(
            f"{named}: no NVIDIA GPU can be used on this machine (NVML: {error}); leave it out, and on the CPU use"
            " --engines-per-device"
        ) from error
    listed = numbers.list_devices(nvml)
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        found: tuple[str, ...] = tuple(gpu.uuid for gpu in listed)
    else:
        by_number = any(entry.strip().isdecimal() for entry in visible.split(","))
        alike = len({gpu.name for gpu in listed}) <= 1
        if by_number and not alike and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
            raise InvalidOption(
                f"{named}: CUDA_VISIBLE_DEVICES={visible} numbers unlike GPUs, by CUDA's own order of speed; set"
                " CUDA_DEVICE_ORDER=PCI_BUS_ID, or name them by UUID"
            )
        found = numbers.visible_uuids(visible, [gpu.uuid for gpu in listed])
    if not found:
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise DeviceUnavailable(f"{named}: no GPU is to be seen{hidden}; check nvidia-smi, or leave it out")
    return found


def _gpu(nvml: ModuleType, number: int, uuid: str) -> ChosenGpu:
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    try:
        pci = nvml.nvmlDeviceGetPciInfo(handle)
    except nvml.NVMLError:  # some sandboxes do not tell, and all goes on without
        pci = None
    return ChosenGpu(
        number=number,
        uuid=uuid,
        name=numbers.ask(nvml, nvml.nvmlDeviceGetName, handle) or "unknown",
        pci_bus_id=None if pci is None else _text(pci.busId),
    )


def require_free_memory(gpus: Sequence[ChosenGpu]) -> None:
    """Refuse a GPU that another program has filled. Raises DeviceUnavailable, which names it and its users."""
    import pynvml  # noqa: PLC0415

    for gpu in gpus:
        refuse_full(pynvml, gpu)


def refuse_full(nvml: ModuleType, gpu: ChosenGpu) -> None:
    """Do what `require_free_memory` says of one GPU, by this `pynvml`."""
    memory = numbers.ask(nvml, nvml.nvmlDeviceGetMemoryInfo, nvml.nvmlDeviceGetHandleByUUID(gpu.uuid))
    if memory is not None and memory.free < LEAST_FREE_BYTES:
        raise DeviceUnavailable(
            f"{gpu.label} is full: {memory_words(nvml, gpu.uuid)}; at least {LEAST_FREE_BYTES / _GB:.1f} GB must be"
            " free. End what uses it, or choose other GPUs with --gpus"
        )


def memory_words(nvml: ModuleType, uuid: str) -> str:
    """Say how full a GPU is, and by whom, as far as NVML tells: in a container it may name nobody."""
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    memory = numbers.ask(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    if memory is None:
        return "its memory is not told"
    try:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:  # likewise
        running = []
    told = [
        f"process {each.pid}" + ("" if each.usedGpuMemory is None else f" with {each.usedGpuMemory / _GB:.1f} GB")
        for each in sorted(running, key=lambda each: -(each.usedGpuMemory or 0))[:MOST_TOLD]
    ]
    used_by = f", used by {', '.join(told)}" if told else ""
    return f"{memory.free / _GB:.1f} of {memory.total / _GB:.1f} GB are free{used_by}"


def out_of_memory(label: str, uuid: str | None, said: str) -> DeviceUnavailable:
    """Return the error of an engine that found too little memory on its GPU, whose UUID is known if it was chosen."""
    import pynvml  # noqa: PLC0415

    words = ""
    if uuid is not None:
        try:
            pynvml.nvmlInit()
            words = f": {memory_words(pynvml, uuid)}"
        except (pynvml.NVMLError, DeviceUnavailable) as error:
            words = f" (NVML does not tell who uses it: {error})"
    return DeviceUnavailable(
        f"{label} has too little memory for this model{words}. It said: {said}. End what uses the GPU, lower"
        " --max-batch-size or --num-workers, or choose another one"
    )


def unlike_note(gpus: Sequence[ChosenGpu]) -> str | None:
    """Return what to know where GPUs are not of one kind."""
    names = dict.fromkeys(gpu.name for gpu in gpus)
    if len(names) <= 1:
        return None
    return (
        f"the GPUs are not alike ({', '.join(names)}): requests go where they are answered first, so the faster get"
        " more; each kind compiles and tunes its own programs, and answers may differ in the last digits"
    )


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
