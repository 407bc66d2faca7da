"""Where engines live, by a fake sysfs: near their GPUs, and nowhere in particular where the system does not tell."""

import multiprocessing
import os

import pytest

from headrace.gpus import ChosenGpu
from headrace.placement import Place, inherited, on_cpus, parse_cpus, places

OURS = sorted(os.sched_getaffinity(0))
GPUS = tuple(
    ChosenGpu(number=number, uuid=f"GPU-{number}", name="H100", pci_bus_id=f"0000000{number}:3B:00.0")
    for number in range(2)
)


def machine(folder, nodes, gpu_nodes=()):
    """Write down a machine: the CPUs of each node, and the nodes of the GPUs."""
    for number, cpus in enumerate(nodes):
        place = folder / f"devices/system/node/node{number}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(f"{cpus}\n")
    for number, node in enumerate(gpu_nodes):
        place = folder / f"bus/pci/devices/000{number}:3b:00.0"
        place.mkdir(parents=True)
        (place / "numa_node").write_text(f"{node}\n")
    return folder


@pytest.fixture
def two_nodes():
    if len(OURS) < 2:
        pytest.skip("needs two CPUs to divide")
    return [str(OURS[0]), f"{OURS[1]},9000-9003"]


def test_an_engine_lives_on_the_node_of_its_gpu(tmp_path, two_nodes):
    sysfs = machine(tmp_path, two_nodes, gpu_nodes=(1, 0))
    first, second = places("cuda", GPUS, 1, sysfs)
    assert (first.gpu_uuid, first.device, first.label) == ("GPU-0", "cuda", "GPU 0 (H100)")
    assert first.cpus == {OURS[1]}, "of those that we may use"
    assert second.cpus == {OURS[0]}


@pytest.mark.parametrize("gpu_nodes", [(-1, -1), ()], ids=["the firmware does not say", "nothing is told"])
def test_where_the_system_does_not_tell_nothing_is_changed(tmp_path, two_nodes, gpu_nodes):
    assert [place.cpus for place in places("cuda", GPUS, 1, machine(tmp_path, two_nodes, gpu_nodes))] == [None, None]


def test_on_a_machine_with_one_node_nothing_is_changed(tmp_path):
    sysfs = machine(tmp_path, [f"0-{OURS[-1]}"], gpu_nodes=(0, 0))
    assert [place.cpus for place in places("cuda", GPUS, 1, sysfs)] == [None, None]
    assert [place.cpus for place in places("cpu", (), 2, sysfs)] == [None, None]
    assert [place.cpus for place in places("cuda", GPUS, 1, tmp_path / "none")] == [None, None]


def test_several_engines_of_a_gpu_are_told_apart(tmp_path):
    found = places("cuda", GPUS, 2, tmp_path)
    assert [place.gpu_uuid for place in found] == ["GPU-0", "GPU-0", "GPU-1", "GPU-1"]
    assert len({place.label for place in found}) == 4


def test_engines_on_the_cpu_divide_the_nodes(tmp_path, two_nodes):
    found = places("cpu", (), 3, machine(tmp_path, two_nodes))
    assert [place.cpus for place in found] == [{OURS[0]}, {OURS[1]}, {OURS[0]}]
    assert [place.sharers for place in found] == [2, 1, 2]
    assert [place.sharers for place in places("cpu", (), 3, tmp_path / "none")] == [3, 3, 3]


def test_the_only_engine_is_where_it_always_was(tmp_path):
    assert places("cuda:1", (), 1, tmp_path) == (Place(device="cuda:1"),)


def surroundings(pipe):
    pipe.send((os.environ.get("CUDA_VISIBLE_DEVICES"), os.sched_getaffinity(0)))


@pytest.mark.parametrize("before", [None, "3,4"])
def test_a_process_begins_with_its_gpu_and_its_cpus_and_ours_stay_as_they_were(monkeypatch, before):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=surroundings, args=(theirs,))
    with inherited(Place(device="cuda", gpu_uuid="GPU-7", cpus=frozenset(OURS[-1:]))):
        process.start()
    assert ours.poll(60)
    assert ours.recv() == ("GPU-7", set(OURS[-1:]))
    process.join(60)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before
    assert sorted(os.sched_getaffinity(0)) == OURS


def test_cpus_that_are_not_ours_are_not_asked_for():
    with on_cpus(frozenset({9000})):
        assert sorted(os.sched_getaffinity(0)) == OURS
    with on_cpus(None):
        assert sorted(os.sched_getaffinity(0)) == OURS


@pytest.mark.parametrize(("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("\n", set()), ("0-0", {0})])
def test_the_kernels_lists_are_read(text, cpus):
    assert parse_cpus(text) == cpus
