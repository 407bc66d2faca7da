"""The environment record: where a run took place, without host name or path, since results are published."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import psutil

import headrace
from headrace.bench.summary import Environment

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pyarrow",
    "msgspec",
    "nvidia-ml-py",
    "psutil",
    "scipy",
    "timm",
    "scikit-image",
)
STEERING = (
    "CUDA_",
    "TORCH",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "KMP_",
    "NVIDIA_TF32",
    "MALLOC_",
    "LD_PRELOAD",
)  # beginnings of variables' names
GIT_TIMEOUT_S = 5.0


class GpuFacts(Protocol):
    """What a GPU is; None where it does not say."""

    @property
    def name(self) -> str | None: ...
    @property
    def count(self) -> int: ...
    @property
    def memory_bytes(self) -> int | None: ...
    @property
    def driver(self) -> str | None: ...
    @property
    def power_limit_w(self) -> float | None: ...
    @property
    def max_sm_clock_mhz(self) -> int | None: ...
    @property
    def max_memory_clock_mhz(self) -> int | None: ...
    @property
    def pcie_generation(self) -> int | None: ...
    @property
    def pcie_width(self) -> int | None: ...


class DescribedGpu(Protocol):
    def facts(self) -> GpuFacts: ...


REVISION_VARIABLE = "HEADRACE_GIT_REVISION"  # for a copy without its repository, such as one in a container


def collect(gpu: DescribedGpu | None, environ: Mapping[str, str] = os.environ) -> Environment:
    """Describe this machine and interpreter; `gpu` is the one that the run used, None for the CPU.

    Where no git knows the code, the variable HEADRACE_GIT_REVISION may say which it is.
    Raises DeviceUnavailable if the GPU is lost.
    """
    facts = gpu.facts() if gpu else None
    git = git_state(Path(headrace.__file__))
    return Environment(
        headrace=headrace.__version__,
        git_revision=git.revision if git else environ.get(REVISION_VARIABLE),
        git_dirty=git.dirty if git else None,
        python=platform.python_version(),
        platform=platform_text(),
        cpu_model=cpu_model(_read_text(Path("/proc/cpuinfo"))),
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        gpu_name=facts.name if facts else None,
        gpu_count=facts.count if facts else 0,
        gpu_memory_bytes=facts.memory_bytes if facts else None,
        gpu_driver=facts.driver if facts else None,
        gpu_power_limit_w=facts.power_limit_w if facts else None,
        gpu_max_sm_clock_mhz=facts.max_sm_clock_mhz if facts else None,
        gpu_max_memory_clock_mhz=facts.max_memory_clock_mhz if facts else None,
        pcie_generation=facts.pcie_generation if facts else None,
        pcie_width=facts.pcie_width if facts else None,
        variables=steering_variables(environ),
        packages=package_versions(PACKAGES),
    )


def differences(a: Environment, b: Environment) -> tuple[str, ...]:
    """Return why measurements of the two must not be compared: one reason per fact, with both values.

    Headrace's own revision may differ, so that its versions can be compared; so may the kernel's release and
    the variables.
    """
    facts = zip(_decisive(a), _decisive(b), strict=True)
    return tuple(
        f"{one.what}: {one.value or 'unknown'} and {other.value or 'unknown'}"
        for one, other in facts
        if one.value != other.value
    )


@dataclass(frozen=True, slots=True)
class _Fact:
    what: str
    value: str | None


def _decisive(of: Environment) -> tuple[_Fact, ...]:
    packages = of.packages or {}
    limit_w = of.gpu_power_limit_w
    return (
        _Fact("GPU", of.gpu_name),
        _Fact("GPU driver", of.gpu_driver),
        _Fact("GPU power limit", None if limit_w is None else f"{limit_w:g} W"),
        _Fact("CPU", of.cpu_model),
        _Fact("CPUs that the run may use", str(of.cpu_count)),
        _Fact("machine", of.platform.rpartition(" ")[2]),
        _Fact("Python", ".".join(of.python.split(".")[:2])),
        _Fact("torch", packages.get("torch")),
        _Fact("torchvision", packages.get("torchvision")),
    )


@dataclass(frozen=True, slots=True)
class GitState:
    revision: str
    dirty: bool  # the package's own files differ from the revision, or there are more of them


def git_state(file: Path) -> GitState | None:
    """Describe the checkout that `file` belongs to; None if no git tracks it, or git cannot or will not say.

    Whether the file is tracked matters: a package that is installed below some other project's checkout would
    else be given that project's revision.
    """
    revision = _git(file.parent, "rev-parse", "HEAD")
    tracked = _git(file.parent, "ls-files", "--error-unmatch", "--", file.name)
    changes = _git(file.parent, "status", "--porcelain", "--", ".")
    if revision is None or tracked is None or changes is None:
        return None
    return GitState(revision=revision, dirty=bool(changes))


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints. A hook's GIT_DIR would name the wrong repository, so git inherits none."""
    git = shutil.which("git")
    if git is None:
        return None
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = [git, "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True, env=environ)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def platform_text() -> str:
    """Return "system release libc machine"; the machine is the last word."""
    libc = "-".join(platform.libc_ver()).strip("-")
    words = (platform.system(), platform.release(), libc, platform.machine())
    return " ".join(word for word in words if word)


def cpu_model(cpuinfo: str) -> str:
    """Find the model in the text of /proc/cpuinfo. Arm's kernels name none there."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those that are installed, without importing any."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def steering_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return those that steer torch, CUDA, OpenMP and the allocator; of a path only that there is one."""
    return {
        name: "(path)" if "/" in value else value
        for name, value in sorted(environ.items())
        if name.startswith(STEERING)
    }


def _read_text(path: Path) -> str:
    """Return the file's text, empty where the system has no such file."""
    return path.read_text(errors="replace") if path.exists() else ""
