"""Where an engine's process lives: which GPU it sees, and which CPUs, whose memory is then the nearest, it runs on.

Linux gives a page of memory to the NUMA node of the CPU that touches it first. So an engine runs on the CPUs of its
GPU's node, and its rings are made there: then what the GPU copies does not cross between the nodes. On a machine with
one node, or where the system does not tell, nothing is changed.
Source: Linux, Documentation/ABI/testing/sysfs-bus-pci (numa_node) and sysfs-devices-node; sched_setaffinity(2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.gpus import ChosenGpu

SYSFS = Path("/sys")
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one engine computes."""

    device: str  # as torch calls it in the engine's process
    label: str = ""  # for people; "" where there is one engine
    gpu_uuid: str | None = None  # the only GPU that the process sees
    cpus: frozenset[int] | None = None  # None: wherever the system likes
    sharers: int = 1  # engines that compute on these CPUs, this one among them


def places(device: str, gpus: Sequence[ChosenGpu], per_device: int, sysfs: Path = SYSFS) -> tuple[Place, ...]:
    """Return a place for each engine: `per_device` on each of the GPUs, or, without any, on `device`."""
    nodes = _nodes(sysfs)
    if gpus:
        chosen = [gpu for gpu in gpus for _ in range(per_device)]
        several = len(chosen) > 1
        return tuple(
            Place(
                device="cuda",
                label=(f"engine {number}, {gpu.label}" if per_device > 1 else gpu.label) if several else "",
                gpu_uuid=gpu.uuid,
                cpus=_near(gpu.pci_bus_id, nodes, sysfs),
            )
            for number, gpu in enumerate(chosen)
        )
    if per_device == 1:
        return (Place(device=device),)
    near = sorted(nodes) if device == "cpu" and len(nodes) > 1 else []
    return tuple(
        Place(
            device=device,
            label=f"engine {number}",
            cpus=nodes[near[number % len(near)]] if near else None,
            sharers=len(range(number % len(near), per_device, len(near))) if near else per_device,
        )
        for number in range(per_device)
    )


@contextmanager
def inherited(place: Place) -> Iterator[None]:
    """Have a process that is started within see the place's GPU alone, and run on its CPUs, from its first moment."""
    before = os.environ.get(VISIBLE)
    if place.gpu_uuid is not None:
        os.environ[VISIBLE] = place.gpu_uuid
    try:
        with on_cpus(place.cpus):
            yield
    finally:
        if place.gpu_uuid is not None:
            os.environ.pop(VISIBLE)
            if before is not None:
                os.environ[VISIBLE] = before


@contextmanager
def on_cpus(cpus: frozenset[int] | None) -> Iterator[None]:
    """Run the calling thread on these CPUs within, so that memory that it is the first to touch lies near them."""
    if cpus is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus & before or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _nodes(sysfs: Path) -> dict[int, frozenset[int]]:
    """Return the CPUs that we may use of each NUMA node that has any."""
    ours = os.sched_getaffinity(0)
    found = {}
    for folder in (sysfs / "devices/system/node").glob("node[0-9]*"):
        try:
            cpus = parse_cpus((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        if cpus & ours:
            found[int(folder.name.removeprefix("node"))] = cpus & ours
    return found


def _near(pci_bus_id: str | None, nodes: dict[int, frozenset[int]], sysfs: Path) -> frozenset[int] | None:
    """Return the CPUs near a PCI device; None where there is one node, or it is not told."""
    if pci_bus_id is None or len(nodes) <= 1:
        return None
    domain, _, rest = pci_bus_id.lower().partition(":")
    # NVML writes the domain with 8 digits, the kernel with at least 4.
    address = f"{int(domain, 16):04x}:{rest}"
    try:
        node = int((sysfs / "bus/pci/devices" / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return nodes.get(node)  # -1: the firmware does not say


def parse_cpus(text: str) -> frozenset[int]:
    """Read the kernel's list of CPUs, such as "0-3,8". Raises ValueError."""
    cpus: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)
