"""How tests are shared out to several workers (pytest-xdist): whole files, in an order that suits two CPUs."""

from __future__ import annotations

import pytest

# Folders whose files share something: a cluster that takes long to start, and GPUs.
ONE_WORKER = ("tests/ray_serve/", "tests/gpu/")
# What measures and mostly waits begins, each beside another such; then what takes longest, so that it is not left over.
FIRST = (
    *("tests/search/test_real_capacity.py", "tests/target/test_null_runs.py", "tests/referee/test_runs.py"),
    *("tests/ray_serve/", "tests/test_cli.py", "tests/bench/test_run.py", "tests/search/test_real_tune.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((number for number, path in enumerate(FIRST) if item.nodeid.startswith(path)), len(FIRST))

    items.sort(key=place)  # stable: within a file nothing changes


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Share out whole files, and the folders of `ONE_WORKER` whole."""
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415  called by xdist only

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in ONE_WORKER if nodeid.startswith(folder)), super()._split_scope(nodeid))

    return Scheduling(config, log)
