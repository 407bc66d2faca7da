"""The law of the null server: how long each request takes, and what becomes of it. Pure, so that it can be known."""

from __future__ import annotations

import heapq
import math
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from headrace.clock import NS_PER_S
from headrace.errors import InvalidOption

LawKind = Literal["fixed", "exponential"]
Transport = Literal["http", "grpc"]
DRAWS = 1 << 16  # service times and fates are drawn once, and repeat after so many requests
MODEL = "null"
_UNITS = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": NS_PER_S}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|ms|s)")
_FATES = ("shed", "wrong", "drop")


class Fate(IntEnum):
    """What the null server does with a request."""

    ANSWER = 0
    SHED = 1  # 503 at once
    WRONG = 2  # another input's answer
    DROP = 3  # taken, and never answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """A queue in order of arrival before `servers` alike, and how the server misbehaves on top."""

    kind: LawKind = "fixed"
    service_ns: int = 1_000_000  # mean
    servers: int = 1
    seed: int = 0
    stall_ns: int = 0  # nothing is worked on for so long,
    stall_at_ns: int = 0  # so long after the first request
    shed: float = 0.0  # shares of the requests
    wrong: float = 0.0
    drop: float = 0.0
    cached: bool = False  # what has been asked before is answered at once
    input_bytes: int = 1024  # of the model's row
    transport: Transport = "http"  # by which requests come

    def service_times_ns(self) -> list[int]:
        """Return the service times of the first `DRAWS` requests, which then repeat."""
        if self.kind == "fixed":
            return [self.service_ns] * DRAWS
        drawn = np.random.default_rng([self.seed, 1]).exponential(self.service_ns, DRAWS)
        times: list[int] = np.rint(drawn).astype(np.int64).tolist()
        return times

    def fates(self) -> list[Fate]:
        """Return what becomes of the first `DRAWS` requests: exact shares, in random order."""
        fates = np.zeros(DRAWS, dtype=np.int8)
        at = 0
        for fate, share in ((Fate.SHED, self.shed), (Fate.WRONG, self.wrong), (Fate.DROP, self.drop)):
            count = round(share * DRAWS)
            fates[at : at + count] = fate
            at += count
        np.random.default_rng([self.seed, 2]).shuffle(fates)
        return [Fate(int(fate)) for fate in fates]


class Queue:
    """When each request is done: Lindley's recursion (1952), Kiefer and Wolfowitz's (1955) for several servers.

    Work that a stall meets goes on after it.
    """

    def __init__(self, law: Law) -> None:
        self._free_ns = [0] * law.servers
        self._stall_ns = law.stall_ns
        self._stall_at_ns = law.stall_at_ns
        self._begin_ns: int | None = None

    def due_ns(self, arrival_ns: int, service_ns: int) -> int:
        """Return when a request that arrived then, after all before it, is done."""
        if self._begin_ns is None:
            self._begin_ns = arrival_ns + self._stall_at_ns
        start_ns = max(arrival_ns, self._free_ns[0])
        end_ns = start_ns + service_ns
        if self._stall_ns and end_ns > self._begin_ns and start_ns < self._begin_ns + self._stall_ns:
            end_ns = self._begin_ns + self._stall_ns + service_ns - max(0, self._begin_ns - start_ns)
        heapq.heapreplace(self._free_ns, end_ns)
        return end_ns


def parse_law(url: str) -> Law:
    """Read "null://fixed?service=2ms&servers=1" or "null://exponential?mean=2ms&seed=1". Raises InvalidOption.

    Further words: stall=2s and stall_at=1s, shed, wrong and drop (shares), cached=1, bytes (of the model's input row),
    transport=grpc.
    """
    parts = urlsplit(url)
    if parts.scheme != "null" or parts.netloc not in get_args(LawKind):
        raise InvalidOption(f"{url}: no law; give null://fixed?service=2ms or null://exponential?mean=2ms")
    try:
        words = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError as error:
        raise InvalidOption(f"{url}: its words must be NAME=VALUE, joined by & ({error})") from error
    word = "service" if parts.netloc == "fixed" else "mean"
    shares = {name: _share(url, name, words.pop(name, "0")) for name in _FATES}
    if sum(shares.values()) > 1:
        raise InvalidOption(f"{url}: shed, wrong and drop are shares of the same requests; together at most 1")
    law = Law(
        kind="fixed" if parts.netloc == "fixed" else "exponential",
        service_ns=_duration_ns(url, word, words.pop(word, "1ms")),
        servers=_whole(url, "servers", words.pop("servers", "1"), 1),
        seed=_whole(url, "seed", words.pop("seed", "0"), 0),
        stall_ns=_duration_ns(url, "stall", words.pop("stall", "0s")),
        stall_at_ns=_duration_ns(url, "stall_at", words.pop("stall_at", "0s")),
        cached=bool(_whole(url, "cached", words.pop("cached", "0"), 0)),
        input_bytes=_whole(url, "bytes", words.pop("bytes", "1024"), 4),
        transport=_transport(url, words.pop("transport", "http")),
        **shares,
    )
    if words:
        raise InvalidOption(f"{url}: {next(iter(words))} is no word of law {parts.netloc}")
    return law


def _duration_ns(url: str, name: str, text: str) -> int:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise InvalidOption(f"{url}: {name}={text}; give a number and a unit, as 2ms (ns, us, ms, s)")
    return round(float(found[1]) * _UNITS[found[2]])


def _share(url: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise InvalidOption(f"{url}: {name}={text}; give a share from 0 to 1")
    return value


def _transport(url: str, text: str) -> Transport:
    for each in get_args(Transport):
        if each == text:
            found: Transport = each
            return found
    raise InvalidOption(f"{url}: transport={text}; give {' or '.join(get_args(Transport))}")


def _whole(url: str, name: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise InvalidOption(f"{url}: {name}={text}; give a whole number of at least {least}")
    return int(text)
