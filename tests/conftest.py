"""How tests are shared out to several workers (pytest-xdist): a file to a worker, and what takes longest first."""

from __future__ import annotations

import pytest

# Folders whose files share something: a cluster that takes long to start, and GPUs.
ONE_WORKER = ("tests/ray_serve/", "tests/gpu/")
SLOWEST = (
    *ONE_WORKER,
    "tests/test_cli.py",
    "tests/bench/test_run.py",
    "tests/search/test_real_",
    "tests/target/test_null_runs.py",
    "tests/referee/test_runs.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(SLOWEST))  # stable: the order is kept within each


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Share out whole files, and the folders of `ONE_WORKER` whole."""
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415  called by xdist only

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in ONE_WORKER if nodeid.startswith(folder)), super()._split_scope(nodeid))

    return Scheduling(config, log)
