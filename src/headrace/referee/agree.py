"""Where tools disagree, in words, with the reason where it is known. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.referee.cases import AGAIN, LOADGEN, OURS, PERF_ANALYZER, TRUTH, WAITING, Case
from headrace.referee.found import LATENCIES, Basis, Found

OWN_NOISE = 2.0  # times as far as our own two runs differ is no disagreement
ROUNDING_S = 2e-6  # perf_analyzer prints whole microseconds
MEAN_ERROR = 0.001  # between a mean that is printed and the one of the tool's own records
BASES: tuple[Basis, ...] = ("from schedule", "from send", "printed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A load under every tool."""

    name: str
    words: str
    found: tuple[Found, ...]  # the truth first, where it is known; then ours, and the others
    disagreements: tuple[str, ...] = ()

    def of(self, tool: str) -> Found | None:
        return next((each for each in self.found if each.tool == tool), None)

    @property
    def base(self) -> Found | None:
        """What ratios are taken to: ours."""
        return self.of(OURS)


def rows(judged: Judged) -> Iterator[tuple[Basis, str]]:
    """Return the quantities that any tool has a number of, in order."""
    quantities: list[tuple[Basis, str]] = [("computed", "throughput")]
    quantities += [(basis, name) for basis in BASES[:2] for name in LATENCIES]
    quantities += [("printed", name) for name in ("throughput", *LATENCIES)]
    for basis, name in quantities:
        if any(each.value(basis, name) is not None for each in judged.found):
            yield basis, name


def ours(judged: Judged, basis: Basis, name: str, tool: str = OURS) -> float | None:
    """Return our number for a quantity: what a tool prints stands beside our throughput and our response time."""
    found = judged.of(tool)
    if found is None:
        return None
    if basis == "printed":
        basis = "computed" if name == "throughput" else "from schedule"
    return found.value(basis, name)


def ratio(judged: Judged, found: Found, basis: Basis, name: str) -> float | None:
    """Return a tool's number over ours."""
    value, base = found.value(basis, name), ours(judged, basis, name)
    return value / base if value is not None and base else None


def allowed(judged: Judged, basis: Basis, name: str, threshold: float) -> float:
    """Return by how much a ratio may differ from 1: the threshold, or twice what our own two runs differ by."""
    first, again = ours(judged, basis, name), ours(judged, basis, name, AGAIN)
    noise = abs(again / first - 1) if first and again is not None else 0.0
    return max(threshold, OWN_NOISE * noise)


def disagreements(judged: Judged, case: Case, threshold: float) -> tuple[str, ...]:
    """Return a sentence for each tool and basis with numbers that differ from ours, and for each that is no number."""
    sentences = [
        f"{found.tool}: no numbers that count: {found.error}" for found in judged.found if found.error is not None
    ]
    for found in judged.found:
        if found.tool not in (OURS, AGAIN):
            sentences += _of_tool(judged, case, found, threshold)
    return tuple(sentences)


def _of_tool(judged: Judged, case: Case, found: Found, threshold: float) -> Iterator[str]:
    quantities = list(rows(judged))
    for basis in ("computed", *BASES):
        names = [name for each, name in quantities if each == basis and _differs(judged, found, basis, name, threshold)]
        if names:
            numbers = ", ".join(_against(judged, found, basis, name) for name in names)
            how = "" if basis == "computed" else f", {basis}"
            sent_alike = not any(_differs(judged, found, "from send", name, threshold) for name in names)
            yield f"{found.tool}{how}: {numbers}{_because(case, found, basis, names, sent_alike=sent_alike)}"
    yield from _mean(found)


def _differs(judged: Judged, found: Found, basis: Basis, name: str, threshold: float) -> bool:
    against = ratio(judged, found, basis, name)
    return against is not None and abs(against - 1) > allowed(judged, basis, name, threshold)


def _against(judged: Judged, found: Found, basis: Basis, name: str) -> str:
    value, base, against = (
        found.value(basis, name),
        ours(judged, basis, name),
        ratio(judged, found, basis, name),
    )
    assert value is not None
    assert base is not None
    return f"{name} {show(name, value)}, ours {show(name, base)} ({against:.3g} times)"


def _mean(found: Found) -> Iterator[str]:
    """A mean that is printed must be that of the records that it is printed of."""
    printed = found.value("printed", "mean")
    own = found.from_send if found.from_schedule is None else found.from_schedule
    if printed is not None and own is not None and abs(printed - own.mean) > max(MEAN_ERROR * own.mean, ROUNDING_S):
        yield (
            f"{found.tool}: the mean that it prints, {show('mean', printed)}, is not that of its own records,"
            f" {show('mean', own.mean)}"
        )


def _because(case: Case, found: Found, basis: Basis, names: Sequence[str], *, sent_alike: bool) -> str:
    """Return the reason of a disagreement, where it is known: the first that applies."""
    cost = found.own_cost
    open_analyzer = case.is_open and found.tool in (PERF_ANALYZER, WAITING)
    reasons = (
        (
            case.load.kind == "burst" and basis == "from send",
            "ours sends when a connection is free, and the wait for one is before that",
        ),
        (found.tool == TRUTH, "ours has the way between two processes in it, and what else the machine does"),
        (
            found.tool == LOADGEN and cost is not None,
            f"of its times {cost.p50 * 1e3:.3g} ms (p50) to {cost.p99 * 1e3:.3g} (p99) are our adapter's"
            if cost
            else "",
        ),
        (open_analyzer and basis == "printed" and names == ["throughput"], "it counts in windows"),
        (
            open_analyzer and found.tool == WAITING,
            "each of its threads waits for an answer before it sends again, and its clock starts at sending",
        ),
        (
            open_analyzer and basis == "printed" and sent_alike,
            "it stamps at sending, and does not say how late that was",
        ),
    )
    return next((f"; {text}" for applies, text in reasons if applies), "")


def show(name: str, value: float) -> str:
    """Return a number with its unit."""
    return f"{value:,.5g}/s" if name == "throughput" else f"{value * 1e3:,.4g} ms"
