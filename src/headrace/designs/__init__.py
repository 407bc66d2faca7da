"""The designs: each a way for the backend to move a batch, one file each, behind the protocol in `base`."""

from __future__ import annotations

from headrace.config import DesignConfig
from headrace.designs.base import Design
from headrace.designs.copy_threads import CopyThreads
from headrace.designs.executor import Executor
from headrace.designs.original import Original


def make_published_design(config: DesignConfig) -> Design:
    """Return the published design that `config` names; it has been validated."""
    if config.name == "original":
        return Original()
    if config.name == "executor":
        return Executor()
    return CopyThreads(config.num_workers)


__all__ = ["Design", "make_published_design"]
