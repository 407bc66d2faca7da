"""Which GPUs are chosen, and what is refused before anything is loaded: by a fake pynvml, with no GPU."""

from types import SimpleNamespace

import pynvml
import pytest

from headrace.errors import DeviceUnavailable, InvalidOption
from headrace.gpus import ChosenGpu, choose_gpus, find_gpus, memory_words, out_of_memory, refuse_full, unlike_note
from tests.test_nvml import FakeNvml

UUIDS = ("GPU-aaaa-1", "GPU-bbbb-2", "GPU-cccc-3")
GB = 1_000_000_000


def machine(names=("H100", "H100"), **answers):
    """A machine with these GPUs, whose handles are their UUIDs."""
    names_of = dict(zip(UUIDS, names, strict=False))
    found = {
        "nvmlDeviceGetCount": len(names),
        "nvmlDeviceGetHandleByIndex": lambda index: UUIDS[index],
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetUUID": lambda handle: handle,
        "nvmlDeviceGetName": lambda handle: names_of[handle],
        "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(busId=f"00000000:{UUIDS.index(handle):02X}:00.0"),
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(free=80 * GB, used=0, total=80 * GB),
        "nvmlDeviceGetComputeRunningProcesses": [],
    }
    return FakeNvml(**found | answers)


def numbers(text, nvml=None, **environ):
    return [(gpu.number, gpu.uuid) for gpu in find_gpus(nvml or machine(), text, f"--gpus {text}", environ)]


@pytest.mark.parametrize(
    ("text", "chosen"),
    [("all", [0, 1]), ("0,1", [0, 1]), ("1, 0", [1, 0]), ("1", [1])],
)
def test_gpus_are_named_by_number_or_all_together(text, chosen):
    assert numbers(text) == [(number, UUIDS[number]) for number in chosen]


def test_a_gpu_says_what_it_is_and_where_it_sits():
    (_, gpu) = find_gpus(machine(("H100", "A10")), "all", "--gpus all", {})
    assert gpu == ChosenGpu(number=1, uuid=UUIDS[1], name="A10", pci_bus_id="00000000:01:00.0")
    assert gpu.label == "GPU 1 (A10)"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("0,0", InvalidOption, "--gpus 0,0: GPU 0 is there twice; name each once"),
        ("0,1,1,0", InvalidOption, "GPU 0 is there twice"),
        ("2", DeviceUnavailable, "there is no GPU 2; 2 are to be seen here, with numbers from 0"),
        ("0,1,7", DeviceUnavailable, "there is no GPU 7"),
        ("", InvalidOption, 'give "all", or numbers of GPUs'),
        ("cuda:0", InvalidOption, 'give "all", or numbers of GPUs'),
        ("-1", InvalidOption, 'give "all", or numbers of GPUs'),
        ("0,", InvalidOption, 'give "all", or numbers of GPUs'),
        ("²", InvalidOption, 'give "all", or numbers of GPUs'),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(text, error, words):
    with pytest.raises(error) as raised:
        numbers(text)
    assert words in str(raised.value)


def test_what_cuda_hides_cannot_be_chosen_and_numbers_are_places_in_what_it_shows():
    assert numbers("all", CUDA_VISIBLE_DEVICES="1") == [(0, UUIDS[1])]
    assert numbers("0,1", CUDA_VISIBLE_DEVICES="1,0") == [(0, UUIDS[1]), (1, UUIDS[0])]
    assert numbers("0", CUDA_VISIBLE_DEVICES=UUIDS[1]) == [(0, UUIDS[1])]
    with pytest.raises(DeviceUnavailable, match="there is no GPU 1; 1 are to be seen"):
        numbers("1", CUDA_VISIBLE_DEVICES="1")
    with pytest.raises(DeviceUnavailable, match=r"no GPU is to be seen \(CUDA_VISIBLE_DEVICES=-1\)"):
        numbers("all", CUDA_VISIBLE_DEVICES="-1")


def test_numbers_that_cuda_gives_by_speed_are_refused():
    nvml = machine(("T4", "H100"))
    with pytest.raises(InvalidOption, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        numbers("0", nvml, CUDA_VISIBLE_DEVICES="0")
    assert numbers("0", nvml, CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID") == [(0, UUIDS[1])]
    assert numbers("all", nvml) == [(0, UUIDS[0]), (1, UUIDS[1])], "by UUID nothing can be mistaken"


def test_a_machine_without_a_gpu_is_told_what_to_use():
    nvml = FakeNvml(errors={"nvmlInit": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND})
    with pytest.raises(DeviceUnavailable, match=r"no NVIDIA GPU can be used on this machine.*--engines-per-device"):
        numbers("all", nvml)


def test_this_machine_is_asked_where_none_is_given(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceUnavailable):
        choose_gpus("all")


def test_a_full_gpu_is_refused_and_who_uses_it_is_told():
    users = [SimpleNamespace(pid=12, usedGpuMemory=9 * GB), SimpleNamespace(pid=7, usedGpuMemory=70 * GB)]
    memory = SimpleNamespace(free=GB // 2, used=79 * GB, total=80 * GB)
    nvml = machine(nvmlDeviceGetMemoryInfo=memory, nvmlDeviceGetComputeRunningProcesses=users)
    (gpu, _) = find_gpus(nvml, "all", "--gpus all", {})
    with pytest.raises(DeviceUnavailable) as raised:
        refuse_full(nvml, gpu)
    told = "GPU 0 (H100) is full: 0.5 of 80.0 GB are free, used by process 7 with 70.0 GB, process 12 with 9.0 GB"
    assert told in str(raised.value)


def test_a_gpu_with_room_is_taken_whoever_else_is_there():
    nvml = machine(nvmlDeviceGetComputeRunningProcesses=[SimpleNamespace(pid=12, usedGpuMemory=None)])
    for gpu in find_gpus(nvml, "all", "--gpus all", {}):
        refuse_full(nvml, gpu)
    assert memory_words(nvml, UUIDS[0]) == "80.0 of 80.0 GB are free, used by process 12"


def test_unlike_gpus_are_allowed_and_noted():
    assert unlike_note(find_gpus(machine(), "all", "", {})) is None
    assert "(H100, A10)" in unlike_note(find_gpus(machine(("H100", "A10")), "all", "", {}))


def test_what_a_sandbox_does_not_tell_is_left_out():
    unknown = pynvml.NVML_ERROR_UNKNOWN
    nvml = machine()
    nvml._errors = {"nvmlDeviceGetPciInfo": unknown, "nvmlDeviceGetComputeRunningProcesses": unknown}
    assert [gpu.pci_bus_id for gpu in find_gpus(nvml, "all", "--gpus all", {})] == [None, None]
    assert memory_words(nvml, UUIDS[0]) == "80.0 of 80.0 GB are free"


def test_an_engine_without_memory_says_which_gpu_and_what_to_do():
    told = str(out_of_memory("GPU 1 (H100)", "GPU-not-here", "OutOfMemoryError: tried to allocate 2 GiB"))
    assert told.startswith("GPU 1 (H100) has too little memory for this model (NVML does not tell who uses it")
    assert "It said: OutOfMemoryError: tried to allocate 2 GiB. End what uses the GPU, lower --max-batch-size" in told
    assert str(out_of_memory("cuda", None, "no")).startswith("cuda has too little memory for this model. It said: no")
