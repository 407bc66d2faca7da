from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from headrace.bench.environment import (
    GitState,
    collect,
    cpu_model,
    differences,
    git_state,
    package_versions,
    platform_text,
    steering_variables,
)
from headrace.bench.summary import Environment, encode
from headrace.nvml import GpuFacts

H100 = GpuFacts(
    name="NVIDIA H100 80GB HBM3",
    count=2,
    memory_bytes=80 << 30,
    driver="580.1",
    power_limit_w=700.0,
    max_sm_clock_mhz=1980,
    max_memory_clock_mhz=2619,
    pcie_generation=5,
    pcie_width=16,
)

BASE = Environment(
    headrace="0.1.0",
    git_revision="a" * 40,
    git_dirty=False,
    python="3.12.4",
    platform="Linux 6.1.0 glibc-2.36 x86_64",
    cpu_model="Zen 5",
    cpu_count=16,
    memory_bytes=1 << 37,
    gpu_name="NVIDIA H100",
    gpu_driver="580.1",
    gpu_power_limit_w=700.0,
    packages={"torch": "2.11.0", "torchvision": "0.26.0", "numpy": "2.4.0"},
)


class DescribedGpu:
    def facts(self) -> GpuFacts:
        return H100


def test_a_gpus_facts_are_recorded_each_in_its_field():
    environment = collect(DescribedGpu(), {})
    assert environment.gpu_name == "NVIDIA H100 80GB HBM3"
    assert environment.gpu_count == 2
    assert environment.gpu_memory_bytes == 80 << 30
    assert environment.gpu_driver == "580.1"
    assert environment.gpu_power_limit_w == 700.0
    assert (environment.gpu_max_sm_clock_mhz, environment.gpu_max_memory_clock_mhz) == (1980, 2619)
    assert (environment.pcie_generation, environment.pcie_width) == (5, 16)


def test_without_a_gpu_its_facts_are_none():
    environment = collect(None, {})
    gpu_facts = {
        name: value for name, value in dataclasses.asdict(environment).items() if name.startswith(("gpu_", "pcie_"))
    }
    assert gpu_facts.pop("gpu_count") == 0
    assert set(gpu_facts.values()) == {None}


def test_this_machine_is_described_and_survives_json():
    environment = collect(None, {"OMP_NUM_THREADS": "4"})
    assert environment.cpu_count == len(os.sched_getaffinity(0))
    assert environment.memory_bytes > 0
    assert environment.cpu_model
    assert environment.variables == {"OMP_NUM_THREADS": "4"}
    assert environment.packages is not None
    assert {"torch", "numpy"} <= set(environment.packages)
    assert msgspec.json.decode(encode(environment), type=Environment) == environment


def test_the_record_holds_neither_host_name_nor_home():
    environment = collect(None, {"TORCH_HOME": "/home/someone/.cache", "LD_PRELOAD": "/opt/someone/lib.so"})
    assert b"someone" not in encode(environment)
    assert os.uname().nodename not in environment.platform.split()


def test_the_platforms_last_word_is_the_machine():
    assert platform_text().split(" ")[-1] == os.uname().machine


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        pytest.param("CUDA_VISIBLE_DEVICES", "0,1", "0,1", id="CUDA"),
        pytest.param("TORCHINDUCTOR_MAX_AUTOTUNE", "1", "1", id="inductor"),
        pytest.param("TORCH_HOME", "/home/someone/.cache", "(path)", id="a path is hidden"),
        pytest.param("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "expandable_segments:True", id="torch"),
        pytest.param("OMP_NUM_THREADS", "8", "8", id="OpenMP"),
        pytest.param("MKL_NUM_THREADS", "8", "8", id="MKL"),
        pytest.param("KMP_AFFINITY", "granularity=fine", "granularity=fine", id="Intel's OpenMP"),
        pytest.param("NVIDIA_TF32_OVERRIDE", "0", "0", id="TF32"),
        pytest.param("MALLOC_ARENA_MAX", "2", "2", id="allocator"),
        pytest.param("LD_PRELOAD", "/usr/lib/libjemalloc.so", "(path)", id="preload's path is hidden"),
        pytest.param("LD_PRELOAD", "libjemalloc.so.2", "libjemalloc.so.2", id="preload by name"),
        pytest.param("HOME", "someone", None, id="home is no steering"),
        pytest.param("MY_CUDA_KEY", "secret", None, id="only beginnings count"),
    ],
)
def test_variables_that_steer_are_kept_without_paths(name, value, kept):
    assert steering_variables({name: value}) == ({} if kept is None else {name: kept})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) 8480C: 2.0 GHz\n\nmodel name\t: other\n",
            "Intel(R) Xeon(R) 8480C: 2.0 GHz",
            id="the first CPU's",
        ),
        pytest.param("model\t\t: 143\nmodel name : AMD EPYC\n", "AMD EPYC", id="not the model's number"),
    ],
)
def test_cpu_model_is_read_from_the_kernels_text(text, expected):
    assert cpu_model(text) == expected


def test_a_cpu_that_the_kernel_does_not_name_is_still_something():
    assert cpu_model("CPU implementer\t: 0x41\n") not in ("", "0x41")


def test_packages_that_are_absent_are_left_out():
    versions = package_versions(("numpy", "no-such-package-as-this"))
    assert set(versions) == {"numpy"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"gpu_name": "NVIDIA H200"}, "GPU: NVIDIA H100 and NVIDIA H200", id="GPU"),
        pytest.param({"gpu_name": None}, "GPU: NVIDIA H100 and unknown", id="no GPU"),
        pytest.param({"gpu_driver": "570.9"}, "GPU driver: 580.1 and 570.9", id="driver"),
        pytest.param({"gpu_power_limit_w": 350.0}, "GPU power limit: 700 W and 350 W", id="power limit"),
        pytest.param({"cpu_model": "Xeon"}, "CPU: Zen 5 and Xeon", id="CPU"),
        pytest.param({"cpu_count": 8}, "CPUs that the run may use: 16 and 8", id="number of CPUs"),
        pytest.param({"platform": "Linux 6.1.0 glibc-2.36 aarch64"}, "machine: x86_64 and aarch64", id="architecture"),
        pytest.param({"python": "3.13.0"}, "Python: 3.12 and 3.13", id="Python's minor version"),
        pytest.param(
            {"packages": {"torch": "2.12.0", "torchvision": "0.26.0"}}, "torch: 2.11.0 and 2.12.0", id="torch"
        ),
        pytest.param({"packages": {"torch": "2.11.0"}}, "torchvision: 0.26.0 and unknown", id="torchvision absent"),
    ],
)
def test_what_forbids_a_comparison_is_said_with_both_values(change, reason):
    assert differences(BASE, dataclasses.replace(BASE, **change)) == (reason,)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="nothing"),
        pytest.param({"git_revision": "b" * 40, "git_dirty": True, "headrace": "0.2.0"}, id="Headrace"),
        pytest.param({"python": "3.12.9"}, id="Python's patch"),
        pytest.param({"platform": "Linux 6.9.9 glibc-2.40 x86_64"}, id="kernel and libc"),
        pytest.param({"packages": BASE.packages | {"numpy": "2.5.0"}}, id="numpy"),
        pytest.param({"variables": {"OMP_NUM_THREADS": "4"}}, id="variables"),
    ],
)
def test_what_may_differ_forbids_nothing(change):
    assert differences(BASE, dataclasses.replace(BASE, **change)) == ()


def test_several_differences_are_all_said():
    other = dataclasses.replace(BASE, gpu_name="NVIDIA H200", cpu_count=8)
    assert len(differences(BASE, other)) == 2


@pytest.fixture
def repository(tmp_path) -> Path:
    """A git repository with one committed package."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    git(tmp_path, *identity, "commit", "--quiet", "--no-verify", "-m", "first")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    """Run git as `git_state` does: without the environment that a hook may have set."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout.strip()


def test_a_clean_checkout_is_its_revision(repository):
    head = git(repository, "rev-parse", "HEAD")
    assert git_state(repository / "package" / "__init__.py") == GitState(revision=head, dirty=False)


@pytest.mark.parametrize(
    ("file", "dirty"),
    [
        pytest.param("package/__init__.py", True, id="changed file of the package"),
        pytest.param("package/new.py", True, id="new file of the package"),
        pytest.param("results.csv", False, id="new file beside the package"),
    ],
)
def test_a_checkout_is_dirty_by_the_packages_own_files(repository, file, dirty):
    (repository / file).write_text("changed")
    state = git_state(repository / "package" / "__init__.py")
    assert state is not None
    assert state.dirty is dirty


def test_a_package_that_lies_in_another_projects_checkout_has_no_revision(repository):
    installed = repository / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_state(installed / "__init__.py") is None


def test_a_package_outside_any_checkout_has_no_revision(tmp_path):
    (tmp_path / "__init__.py").write_text("")
    assert git_state(tmp_path / "__init__.py") is None
