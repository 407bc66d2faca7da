"""How many requests a replica is given, when there are to be more replicas, and how many fit. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SATURATION = 0.75  # of the requests that fill all lanes; the rest is headroom until a new replica is warm
BATCHES_PER_LANE = 2  # that a replica is given: one that runs, and one that is gathered meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests of one row, per replica."""

    target: float  # the average that replicas are added and taken away for
    most: int  # at once; beyond it requests wait at the proxies


def load_of(max_batch_size: int, lanes: int) -> Load:
    """Return what a replica of so many lanes is given.

    Requests are batched by the engine, so as many must be there as its batches hold. Up to one full batch for each
    lane, more requests make larger batches, and throughput grows; beyond, they wait. So replicas are added at three
    quarters of that, and a replica gets twice that at most: a second batch is gathered while the first one runs.
    """
    full = max_batch_size * lanes
    return Load(target=max(1.0, SATURATION * full), most=BATCHES_PER_LANE * full)


def room(nodes: Sequence[Mapping[str, float]], needs: Mapping[str, float]) -> int:
    """Return how many replicas of these needs fit on nodes of these resources, each whole on one node."""
    needed = {name: amount for name, amount in needs.items() if amount > 0}
    return sum(
        min((math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in needed.items()), default=0)
        for node in nodes
    )


def words(resources: Mapping[str, float]) -> str:
    """Return resources for people: "1 CPU and 1 GPU"."""
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount) or "nothing"
