"""Where tools disagree, in words, with the reason where it is known. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.referee.cases import AGAIN, LOADGEN, OURS, PERF_ANALYZER, WAITING, Case
from headrace.referee.found import LATENCIES, Basis, Found

OWN_NOISE = 2.0  # times as far as our own two runs differ is no disagreement
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
    """Return a sentence for each number that differs from ours, or that its own tool's records do not bear out."""
    sentences = []
    for found in judged.found:
        if found.error is not None:
            sentences.append(f"{found.tool}: no numbers that count: {found.error}")
        if found.tool in (OURS, AGAIN):
            continue
        sentences += _of_tool(judged, case, found, threshold)
    return tuple(sentences)


def _of_tool(judged: Judged, case: Case, found: Found, threshold: float) -> Iterator[str]:
    for basis, name in rows(judged):
        value, base = found.value(basis, name), ours(judged, basis, name)
        against = ratio(judged, found, basis, name)
        if value is None or base is None or against is None:
            continue
        limit = allowed(judged, basis, name, threshold)
        if abs(against - 1) > limit:
            yield (
                f"{found.tool}: {name} {basis} is {show(name, value)}, ours {show(name, base)}"
                f" ({against:.3g} times; {limit:.0%} allowed){_because(case, found, basis, name)}"
            )
    yield from _mean(found)


def _mean(found: Found) -> Iterator[str]:
    """A mean that is printed must be that of the records that it is printed of."""
    printed = found.value("printed", "mean")
    own = found.from_send if found.from_schedule is None else found.from_schedule
    if printed is not None and own is not None and abs(printed - own.mean) > max(MEAN_ERROR * own.mean, 2e-6):
        yield (
            f"{found.tool}: the mean that it prints, {show('mean', printed)}, is not that of its own records,"
            f" {show('mean', own.mean)}"
        )


def _because(case: Case, found: Found, basis: Basis, name: str) -> str:
    """Return the reason of a disagreement, where it is known."""
    latency = name != "throughput"
    if found.tool == WAITING and case.is_open and latency:
        return ": each of its threads waits for an answer before it sends again, and the time starts at sending"
    if found.tool == PERF_ANALYZER and basis == "printed" and case.is_open and latency:
        return ": it stamps at sending, and does not say how late that was"
    if found.tool in (PERF_ANALYZER, WAITING) and basis == "printed" and name == "throughput":
        return ": it counts in windows, with what was under way at their ends"
    if found.tool == LOADGEN and latency and found.own_cost is not None:
        return (
            f": handing over to the connections and back costs {found.own_cost.p50 * 1e3:.3g} ms (p50),"
            f" {found.own_cost.p99 * 1e3:.3g} (p99), which is in it"
        )
    return ""


def show(name: str, value: float) -> str:
    """Return a number with its unit."""
    return f"{value:,.5g}/s" if name == "throughput" else f"{value * 1e3:,.4g} ms"
