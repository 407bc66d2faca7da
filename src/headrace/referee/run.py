"""Has every tool measure the same server, one after the other, ours first and last; and writes what came out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.bench import arrivals, environment
from headrace.bench.crew import Crew
from headrace.bench.output import output_folder
from headrace.bench.record import PHASES
from headrace.bench.stats import Distribution
from headrace.bench.summary import FILE_NAME, RunSummary, TargetFacts, encode
from headrace.config import InputConfig, RunConfig, TargetConfig
from headrace.errors import HeadraceError, InvalidOption, OutputError
from headrace.referee import loadgen_log, perf_analyzer
from headrace.referee.agree import Judged, disagreements
from headrace.referee.cases import AGAIN, LOADGEN, OURS, PERF_ANALYZER, WAITING, Case, Settings, cases
from headrace.referee.found import Found, Requests, of_requests
from headrace.referee.loadgen_sut import LoadgenJob
from headrace.referee.perf_analyzer import Asked, PerfAnalyzer
from headrace.referee.report import JSON_NAME, PAGE_NAME, SCHEMA_VERSION, Report, page
from headrace.referee.truth import truth
from headrace.target.law import MODEL, parse_law
from headrace.target.null_server import Listening, NullJob
from headrace.target.run import START_TIMEOUT_S, Files, Outcome, Sender, Watcher, run_target

if TYPE_CHECKING:
    from headrace.target.sending import GeneratorJob

LOADGEN_PACKAGE = "mlcommons-loadgen"
LOADGEN_REMEDY = "mlcommons-loadgen is not installed: pip install 'headrace[referee]'"
TRACE = "mlperf_log_trace.json"
TOOLS = ("loadgen", "perf_analyzer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What there is besides ours."""

    loadgen: str | None  # its version
    perf_analyzer: PerfAnalyzer | None
    missing: tuple[str, ...] = ()

    @property
    def versions(self) -> dict[str, str]:
        found = {LOADGEN: self.loadgen, "perf_analyzer": self.perf_analyzer and self.perf_analyzer.version}
        return {name: version for name, version in found.items() if version}


def find_tools(
    asked: Sequence[str] | None,
    binary: Path | None,
    find_spec: Callable[[str], object | None] = importlib.util.find_spec,
) -> Tools:
    """Look which tools are there: those asked for must be, of all (None) at least one. Raises InvalidOption."""
    missing = []
    loadgen, analyzer = None, None
    wanted = TOOLS if asked is None else asked
    if "loadgen" in wanted:
        if find_spec("mlperf_loadgen") is None:
            missing.append(LOADGEN_REMEDY)
        else:
            loadgen = metadata.version(LOADGEN_PACKAGE)
    if "perf_analyzer" in wanted:
        try:
            analyzer = perf_analyzer.find(binary)
        except InvalidOption as error:
            if binary is not None:
                raise
            missing.append(str(error))
    if missing and (asked is not None or len(missing) == len(wanted)):
        raise InvalidOption("; ".join(missing))
    return Tools(loadgen=loadgen, perf_analyzer=analyzer, missing=tuple(missing))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What is measured, by whom and how long."""

    target: TargetConfig  # of one generator
    tools: Tools
    settings: Settings
    only: tuple[str, ...] = ()  # names of cases; (): all


def referee(asking: Asking, output_dir: Path, command: Sequence[str], watcher: Watcher, *, overwrite: bool) -> Report:
    """Measure every load under every tool that can make it, and write all of it into one folder.

    Raises InvalidOption, Unreachable, UnknownModel and OutputError, where nothing could be measured at all; what fails
    under one tool is said in the report.
    """
    asking.settings.validate()
    asking.target.validate()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    chosen = [each for each in cases(asking.settings) if not asking.only or each.name in asking.only]
    with output_folder(output_dir, overwrite=overwrite) as folder:
        judged = tuple(_Bout(asking, case, folder / case.folder, watcher).judge() for case in chosen)
        report = Report(
            schema_version=SCHEMA_VERSION,
            started_at=started_at,
            command=tuple(command),
            environment=environment.collect(None),
            versions=asking.tools.versions,
            url=asking.target.url,
            model=asking.target.model or MODEL,
            settings=asking.settings,
            cases=judged,
            notes=(*asking.tools.missing, *_left_out(asking)),
        )
        (folder / JSON_NAME).write_bytes(encode(report))
        (folder / PAGE_NAME).write_text(page(report))
    return report


def _left_out(asking: Asking) -> list[str]:
    if asking.target.scheme != "grpc":
        return []
    return ["over gRPC there is no mlcommons-loadgen, which is driven over our HTTP connections, and no --sync"]


class _Bout:
    """One load under every tool."""

    def __init__(self, asking: Asking, case: Case, folder: Path, watcher: Watcher) -> None:
        self._asking, self._case, self._folder, self._watcher = asking, case, folder, watcher
        shapes = {
            name: (case.samples, *shape[1:]) if case.samples > 1 else shape
            for name, shape in asking.target.shapes.items()
        }
        self._target = replace(asking.target, label=case.folder, shapes=shapes)
        self._is_null = asking.target.scheme == "null"
        folder.mkdir()

    def judge(self) -> Judged:
        """Measure, LoadGen first where it makes the plan that the others keep."""
        case = self._case
        loadgen = self._loadgen() if self._can_loadgen else None
        if case.is_open:
            case = self._replayed(loadgen)
        ours = self._ours(case, OURS)
        others = [] if loadgen is None else [loadgen[0]]
        if self._asking.tools.perf_analyzer is not None and case.perf_analyzer:
            others.append(self._perf_analyzer(case, PERF_ANALYZER, ours))
            if case.is_open and self._target.scheme != "grpc":
                others.append(self._perf_analyzer(case, WAITING, ours))
        again = self._ours(case, AGAIN)
        known = [truth(parse_law(self._target.url), case.load, case.samples)] if self._is_null else []
        judged = Judged(name=case.name, words=case.words, found=(*known, ours[0], *others, again[0]))
        return replace(judged, disagreements=disagreements(judged, case, self._asking.settings.threshold))

    @property
    def _can_loadgen(self) -> bool:
        """LoadGen is driven over our HTTP connections."""
        return (
            self._asking.tools.loadgen is not None and self._case.scenario is not None and self._target.scheme != "grpc"
        )

    def _replayed(self, loadgen: tuple[Found, Requests | None] | None) -> Case:
        """Write down when LoadGen had requests due, or our own plan, and have everybody keep it."""
        moments = None if loadgen is None or loadgen[1] is None else loadgen[1].scheduled
        if moments is None:
            moments = arrivals.planned(self._case.load)
            assert moments is not None
        path = self._folder / "arrivals.parquet"
        pq.write_table(pa.table({"scheduled_ns": moments - moments[0]}), path)
        return self._case.replayed(path)

    def _ours(self, case: Case, tool: str) -> tuple[Found, Outcome | None]:
        self._watcher.stage(f"{case.name}: {tool}")
        try:
            outcome = self._measure(case, tool.replace(", ", "-"))
        except HeadraceError as error:
            return Found(tool=tool, error=str(error)), None
        return _found(tool, case, outcome), outcome

    def _measure(self, case: Case, name: str, sender: Sender | None = None) -> Outcome:
        config = RunConfig(
            inputs=InputConfig(kind="random", batch_size=case.samples, seed=case.load.seed),
            load=case.load,
            target=self._target,
        )
        files = Files(output_dir=self._folder / name, calibration=self._folder / "none.json")
        outcome = run_target(config, files, ("headrace", "referee"), self._watcher, sender or Sender())
        if case.load.arrivals is None:
            return outcome
        summary = _beside(outcome.summary, Path("..") / case.load.arrivals.name)
        (files.output_dir / FILE_NAME).write_bytes(encode(summary))
        return replace(outcome, summary=summary)

    def _loadgen(self) -> tuple[Found, Requests | None]:
        """Run LoadGen; its times are those of its own trace."""
        case, scenario = self._case, self._case.scenario
        assert scenario is not None
        self._watcher.stage(f"{case.name}: {LOADGEN}")
        logs = (self._folder / f"{LOADGEN}-logs").absolute()

        def job(generator: GeneratorJob) -> LoadgenJob:
            return LoadgenJob(
                generator=generator, scenario=scenario, samples=case.samples, logs=logs, seed=self._asking.settings.seed
            )

        try:
            outcome = self._measure(case, LOADGEN, Sender("headrace.referee.loadgen_sut:run_loadgen", job))
            with (logs / TRACE).open() as lines:
                requests = loadgen_log.read_trace(lines, case.samples)
            with (logs / "mlperf_log_detail.txt").open() as lines:
                printed = loadgen_log.printed(loadgen_log.read_results(lines))
        except OSError as error:
            raise OutputError(f"{error.filename}: cannot be read ({error.strerror})") from error
        except HeadraceError as error:
            return Found(tool=LOADGEN, error=str(error)), None
        _keep_trace(requests, logs)
        facts = {"version": self._asking.tools.loadgen or ""}
        failed = outcome.summary.error or _wrong_rows(case, outcome)
        if failed is not None:
            return Found(tool=LOADGEN, requests=len(requests.issued), error=failed, facts=facts), requests
        found = of_requests(LOADGEN, requests, printed=printed, facts=facts)
        return replace(found, own_cost=_own_cost(requests, outcome)), requests

    def _perf_analyzer(self, case: Case, tool: str, ours: tuple[Found, Outcome | None]) -> Found:
        analyzer, outcome = self._asking.tools.perf_analyzer, ours[1]
        assert analyzer is not None
        if ours[0].error is not None or outcome is None or outcome.summary.target is None:
            return Found(tool=tool, error="not run, since our own run does not count")
        self._watcher.stage(f"{case.name}: {tool}")
        with ExitStack() as open_things:
            url = self._null_server(open_things) if self._is_null else self._target.url
            asked = Asked(
                url=url,
                target=replace(self._target, model=self._target.model or MODEL),
                load=case.load,
                samples=case.samples,
                duration_s=self._asking.settings.duration_s,
                payload_bytes=_exported_bytes(outcome.summary.target),
                requests=ours[0].requests,
                wait=tool == WAITING,
            )
            offsets = arrivals.planned(case.load)
            plan = None if offsets is None else offsets.tolist()
            return perf_analyzer.measure(tool, analyzer, asked, plan, self._folder / tool.replace(" --", "-"))

    def _null_server(self, open_things: ExitStack) -> str:
        """Start one of the same law for another tool; it is honest about refusals and lies, which that cannot tell."""
        law = parse_law(self._target.url)
        crew = Crew(lambda: None)
        open_things.callback(crew.stop)
        entry = "headrace.target.null_server:run_null_server"
        member = crew.start("null server", entry, lambda report: NullJob(law=law, report=report))
        return f"http://127.0.0.1:{crew.expect(member, Listening, START_TIMEOUT_S).port}"


def _beside(summary: RunSummary, arrivals: Path) -> RunSummary:
    """Name the plan by where it lies beside the run: the folder is written under another name, and may be moved."""
    load = replace(summary.options.load, arrivals=arrivals)
    return replace(summary, options=replace(summary.options, load=load))


def _exported_bytes(target: TargetFacts) -> float:
    """Return what perf_analyzer exports of a request's inputs; floats it cannot write (seen with 2.48)."""
    return 0.0 if all(words.startswith("float32 ") for words in target.inputs.values()) else target.payload_bytes


def _found(tool: str, case: Case, outcome: Outcome) -> Found:
    """Return what a run of ours found; its numbers stay out where it does not count."""
    records = outcome.records[outcome.records["phase"] == PHASES.index("measured")]
    error = outcome.summary.error or _wrong_rows(case, outcome)
    if error is not None:
        return Found(tool=tool, requests=len(records), error=error)
    order = np.argsort(records["scheduled_ns"], kind="stable")
    issued, completed, scheduled = (records[f"{name}_ns"][order] for name in ("issued", "completed", "scheduled"))
    return of_requests(tool, Requests(issued, completed, scheduled, case.samples))


def _wrong_rows(case: Case, outcome: Outcome) -> str | None:
    """Say if requests have other rows than the load wants: a model may fix their number."""
    rows = sorted(set(outcome.records["rows"].tolist()))
    if rows == [case.samples]:
        return None
    return f"the model takes requests of {', '.join(map(str, rows))} rows, and this load has {case.samples}"


def _own_cost(requests: Requests, outcome: Outcome) -> Distribution | None:
    """Return what lies between LoadGen's times and those of the connections, request by request.

    None where requests wait for a connection too: LoadGen's only query of Offline is all of them.
    """
    if outcome.summary.options.load.kind == "burst":
        return None
    records = outcome.records[outcome.records["phase"] == PHASES.index("measured")]
    if len(records) != len(requests.issued):
        return None
    carried = (records["completed_ns"] - records["issued_ns"])[np.argsort(records["scheduled_ns"], kind="stable")]
    return Distribution.of(requests.completed - requests.issued - carried)


def _keep_trace(requests: Requests, logs: Path) -> None:
    """Keep what the trace says of each query, and not its megabytes."""
    table = pa.table(
        {
            "scheduled_ns": requests.scheduled,
            "issued_ns": requests.issued,
            "completed_ns": requests.completed,
        }
    )
    pq.write_table(table, logs / "queries.parquet")
    (logs / TRACE).unlink()
