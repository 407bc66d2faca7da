"""One run against a server that is named by its URL, from options to the same files as a run of a design.

The supervisor asks the server for its model's tensors and for an answer to every payload, one by one and twice;
then the generators send. It measures nothing itself while they do, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from headrace.bench import arrivals, calibration, environment, stats, validity
from headrace.bench.calibration import Calibration
from headrace.bench.crew import Crew, Member
from headrace.bench.output import output_folder
from headrace.bench.record import PHASES, Records, empty_records
from headrace.bench.summary import (
    FILE_NAME,
    SCHEMA_VERSION,
    Activity,
    AnswerCheck,
    RunSummary,
    TargetFacts,
    encode,
)
from headrace.clock import NS_PER_S, now_ns
from headrace.config import RunConfig, TargetConfig
from headrace.errors import InputError
from headrace.processes import Ready
from headrace.target import expected as right
from headrace.target import recorder
from headrace.target.access import read_access
from headrace.target.asking import Asker, Declared, ServerCounts, ask
from headrace.target.counters import shared_words
from headrace.target.expected import Expected, Tally
from headrace.target.generator import GeneratorDone
from headrace.target.handshake import Endpoint
from headrace.target.jobs import Checked, CheckJob
from headrace.target.law import MODEL, Transport, parse_law
from headrace.target.null_server import Listening, Log, NullJob
from headrace.target.payloads import Bodies, Inputs, grpc_body, http_body, make_inputs, read_arrays, rows_of
from headrace.target.sending import GeneratorJob, GoAt
from headrace.wire.datatypes import TO_DTYPE
from headrace.wire.v2_call import Output

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

START_DELAY_NS = 100_000_000  # from the word to go to the plan's beginning
START_TIMEOUT_S = 60.0
COUNTING_S = 2.0  # for a server's own counts to catch up
NULL_SERVERS: dict[Transport, str] = {
    "http": "headrace.target.null_server:run_null_server",
    "grpc": "headrace.target.null_grpc:run_null_grpc",
}
CACHE_SPEED = 2.0  # a repeated request that is so much faster was not computed
CACHE_LEAST = 8  # different payloads, for that to mean anything


class Watcher(Protocol):
    """Shows a run to whoever waits for it."""

    def tell(self, text: str) -> None:
        """A sentence worth reading."""

    def stage(self, text: str) -> None:
        """What is happening from now on."""

    def watch(self, counters: Any, generators: int, planned: int | None) -> None:  # noqa: ANN401
        """Take the memory in which generators count; `planned` requests in all, where that is known."""

    def look(self) -> None:
        """Called about ten times a second while requests are under way."""


@dataclass(frozen=True, slots=True)
class Sender:
    """The process that sends: a generator of ours, or another one that speaks as it does."""

    entry: str = "headrace.target.generator:run_generator"
    job: Callable[[GeneratorJob], object] = lambda job: job


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Where a run writes, and the calibration that it is held against."""

    output_dir: Path
    overwrite: bool = False
    calibration: Path | None = None  # None: this machine's own, where there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    summary: RunSummary
    records: Records  # of recorder.SLIM_DTYPE
    log: Log | None  # what a null server of ours saw


@dataclass(frozen=True, slots=True, kw_only=True)
class _Payloads:
    declared: tuple[Declared, ...]
    inputs: list[Inputs]
    bodies: list[tuple[bytes, int]]
    rows: recorder.Rows

    @property
    def mean_bytes(self) -> float:
        return float(np.mean([len(body) for body, _ in self.bodies]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The answers to each payload, one by one and twice."""

    records: Records
    first: list[tuple[Output, ...]]
    again: list[tuple[Output, ...]]

    @property
    def repeated_speed(self) -> float | None:
        """How many times faster the server was when asked again: what nine of ten payloads show at least.

        The two askings of a payload follow each other, so what else the machine does meets both.
        """
        times = (self.records["completed_ns"] - self.records["issued_ns"]).astype(np.float64).reshape(-1, 2)
        if len(times) < CACHE_LEAST:
            return None
        return float(np.quantile(times[:, 0] / np.maximum(times[:, 1], 1.0), 0.1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    records: Records
    done: list[GeneratorDone]
    before: ServerCounts | None
    after: ServerCounts | None
    log: Log | None


def run_target(
    config: RunConfig, files: Files, command: Sequence[str], watcher: Watcher, sender: Sender | None = None
) -> Outcome:
    """Measure once and write the run's folder. The summary's `error` says if the run does not count.

    Raises InvalidOption, InputError, Unreachable, UnknownModel, TransportFailed, ModelError, OutputError or RunFailed
    where there is nothing to write; the folder is then left as it was.
    """
    config.validate()
    target = config.target
    assert target is not None
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    with output_folder(files.output_dir, overwrite=files.overwrite) as folder, ExitStack() as open_things:
        run = _Run(config, target, folder, watcher, open_things)
        outcome = run.execute(files.calibration, sender or Sender())
        summary = replace(outcome.summary, command=tuple(command), started_at=started_at)
        (folder / FILE_NAME).write_bytes(encode(summary))
    return replace(outcome, summary=summary)


class _Run:
    """The processes of one run."""

    def __init__(
        self, config: RunConfig, target: TargetConfig, folder: Path, watcher: Watcher, open_things: ExitStack
    ) -> None:
        self._config, self._folder, self._watcher, self._open = config, folder, watcher, open_things
        self._counters = shared_words(target.generators)
        self._crew = Crew(watcher.look)
        open_things.callback(self._crew.stop)
        self._url, self._target = self._resolve(target)
        self._access = read_access(self._target)
        self._asker: Asker = ask(self._target, Endpoint(self._url, self._access))
        open_things.callback(self._asker.close)

    def _resolve(self, target: TargetConfig) -> tuple[str, TargetConfig]:
        """Return the URL to send to; for a null target, of a server that is started here."""
        if target.scheme != "null":
            return target.url, target
        law = parse_law(target.url)
        null = self._crew.start("null server", NULL_SERVERS[law.transport], lambda pipe: NullJob(law=law, report=pipe))
        port = self._crew.expect(null, Listening, START_TIMEOUT_S).port
        return f"{law.transport}://127.0.0.1:{port}", replace(target, model=MODEL)

    def execute(self, calibration_path: Path | None, sender: Sender) -> Outcome:
        """Ask, send, and judge."""
        self._watcher.stage("asking the server for its model and for an answer to each payload")
        payloads = self._make_payloads()
        asked = self._ask_all(payloads)
        expected, compared_with = self._expected(payloads, asked)
        sent = self._send(payloads, expected, asked, sender)
        return self._judge(
            payloads, asked, sent, _Compared(expected, compared_with), self._calibration(calibration_path)
        )

    def _make_payloads(self) -> _Payloads:
        target, config = self._target, self._config
        declared = self._asker.inputs()
        inputs = make_inputs(declared, target, config.inputs.batch_size, config.inputs.seed)
        over_grpc = target.over_grpc
        return _Payloads(
            declared=declared,
            inputs=inputs,
            bodies=[grpc_body(each, declared, target) if over_grpc else http_body(each, declared) for each in inputs],
            rows=np.asarray([rows_of(each) for each in inputs], dtype=np.int32),
        )

    def _ask_all(self, payloads: _Payloads) -> _Asked:
        count = len(payloads.bodies)
        records = empty_records(2 * count)
        answers = []
        for number, record in enumerate(records):
            payload = number // 2
            body, header_bytes = payloads.bodies[payload]
            record["scheduled_ns"] = record["issued_ns"] = now_ns()
            answers.append(self._asker.infer(body, header_bytes))
            record["completed_ns"] = now_ns()
            record["batch"], record["rows"] = payload, payloads.rows[payload]
        records["phase"] = PHASES.index("warm_up")
        records["phase"][0] = PHASES.index("first")
        records["status"] = recorder.OK
        return _Asked(records=records, first=answers[::2], again=answers[1::2])

    def _expected(self, payloads: _Payloads, asked: _Asked) -> tuple[Expected, str]:
        """Return what is right, and where that is from. Raises InputError, ModelError."""
        target, count = self._target, len(payloads.inputs)
        dtypes = {output.name: output.dtype for output in asked.first[0]}
        if target.reference is not None:
            arrays = read_arrays(target.reference, "--reference")
            if min(map(len, arrays.values())) < count or not set(arrays) <= set(dtypes):
                raise InputError(
                    f"--reference {target.reference}: needs arrays of {count} payloads by the names of outputs:"
                    f" {', '.join(dtypes)}"
                )
            return Expected(right.of_file(arrays, count), target.tolerance, dtypes), "a reference file"
        if target.check_model is not None:
            outputs = _renamed(self._eager(target.check_model, payloads), list(dtypes))
            return Expected(outputs, target.tolerance, dtypes), "the eager model's answers"
        own = Expected([right.of_answer(answer) for answer in asked.first], target.tolerance, dtypes)
        return own, "the server's own answers, asked one by one before"

    def _eager(self, model: str, payloads: _Payloads) -> list[dict[str, Any]]:
        path = self._folder / "eager.npz"

        def job(report: Connection) -> CheckJob:
            return CheckJob(
                model=model,
                payloads=payloads.inputs,
                bfloat16=frozenset(each.name for each in payloads.declared if each.datatype == "BF16"),
                output=path,
                report=report,
            )

        member = self._crew.start("eager model", "headrace.target.check_model:run_check_model", job)
        self._crew.expect(member, Checked)
        member.process.join()
        outputs = right.load_expected(path, len(payloads.inputs), None).outputs
        path.unlink()
        return outputs

    def _send(self, payloads: _Payloads, expected: Expected, asked: _Asked, sender: Sender) -> _Sent:
        """Have the generators send, and join what they wrote."""
        path = self._folder / "expected.npz"
        expected.save(path)
        bodies = Bodies(payloads.bodies)
        self._open.callback(bodies.close)
        outputs = [self._folder / f"generator-{number}.npy" for number in range(self._target.generators)]
        members = [self._start_generator(sender, number, bodies, path, output) for number, output in enumerate(outputs)]
        for member in members:
            self._crew.expect(member, Ready, START_TIMEOUT_S)
        null = self._asker if self._target.scheme == "null" else None
        if null is not None:
            null.reset()
        before = self._asker.counts()
        self._watcher.stage("sending")
        self._watcher.watch(self._counters, self._target.generators, self._planned())
        go = GoAt(now_ns() + START_DELAY_NS)
        for member in members:
            member.report.send(go)
        done = [self._crew.expect(member, GeneratorDone) for member in members]
        self._watcher.stage("writing")
        answered = sum(map(_answered, outputs))
        after = self._count_after(before, answered)
        log = None if null is None else null.log()
        records = recorder.join(asked.records, outputs, payloads.rows, self._folder / "requests.parquet")
        for each in (*outputs, path):
            each.unlink()
        return _Sent(records=records, done=done, before=before, after=after, log=log)

    def _start_generator(self, sender: Sender, number: int, bodies: Bodies, expected: Path, output: Path) -> Member:
        def job(report: Connection) -> object:
            own = GeneratorJob(
                number=number,
                url=self._url,
                target=self._target,
                load=self._config.load,
                bodies_path=bodies.path,
                places=bodies.places,
                expected=expected,
                output=output,
                report=report,
                counters=self._counters,
                access=self._access,
            )
            return sender.job(own)

        return self._crew.start(f"generator {number}", sender.entry, job)

    def _planned(self) -> int | None:
        load = self._config.load
        return None if load.kind == "closed" and load.duration_s else arrivals.count(load)

    def _count_after(self, before: ServerCounts | None, answered: int) -> ServerCounts | None:
        """Return the server's counts when they have caught up, or after `COUNTING_S`."""
        deadline_ns = now_ns() + int(COUNTING_S * NS_PER_S)
        after = self._asker.counts()
        while before and after and after.success - before.success < answered and now_ns() < deadline_ns:
            self._crew.tick()
            after = self._asker.counts()
        return after

    def _calibration(self, path: Path | None) -> Calibration | None:
        """Return what is known of the harness over this transport. Raises OutputError."""
        if path is None:
            machine = environment.collect(None)
            key = calibration.machine_key(machine.cpu_model, machine.cpu_count)
            path = calibration.default_path(key, transport=self._transport)
        found = calibration.load(path)
        return found if found is not None and found.transport == self._transport else None

    @property
    def _transport(self) -> Transport:
        return "grpc" if self._target.over_grpc else "http"

    def _limited(self, metrics: stats.Metrics, payload_bytes: float, known: Calibration | None) -> list[str]:
        """Say what the harness may have added."""
        if known is None and self._target.over_grpc:
            return ["not calibrated over gRPC: what the harness adds is unknown; headrace calibrate --transport grpc"]
        limited = validity.client_limited(validity.requests_per_s(metrics), metrics.response_time, payload_bytes, known)
        over_tls = ["not calibrated over TLS: what the harness adds there is unknown"] if self._target.encrypted else []
        return [*limited, *over_tls]

    def _judge(
        self, payloads: _Payloads, asked: _Asked, sent: _Sent, compared: _Compared, known: Calibration | None
    ) -> Outcome:
        config = self._config
        counted = None if sent.before is None or sent.after is None else sent.after.success - sent.before.success
        judged = validity.judge(sent.records, config.load, counted)
        metrics, verdict = judged.metrics, judged.verdict
        payload_bytes = payloads.mean_bytes
        limited = self._limited(metrics, payload_bytes, known)
        check = compared.expected.summary(_summed(sent.done))
        fail = None if sent.before is None or sent.after is None else sent.after.fail - sent.before.fail
        summary = RunSummary(
            schema_version=SCHEMA_VERSION,
            experiment=config.experiment,
            started_at="",
            options=config,
            command=(),
            metrics=metrics,
            warmup_parts_s={},
            workers_warmed=0,
            activity=Activity(),
            answers=check,
            environment=environment.collect(None),
            torch=None,
            target=TargetFacts(
                inputs=_described(payloads),
                payload_bytes=payload_bytes,
                payloads=len(payloads.bodies),
                compared_with=compared.compared_with,
                connections=sum(each.connections for each in sent.done),
                client_cpu_share=tuple(each.cpu_share for each in sent.done),
                server_success=counted,
                server_fail=fail,
                repeated_speed=asked.repeated_speed,
            ),
            calibration=known,
            marks=(*verdict.marks, *limited, *_cached(asked)),
            notes=_notes(compared, asked, sent, check),
            error=_error(metrics, check, sent.done, verdict),
        )
        return Outcome(summary=summary, records=sent.records, log=sent.log)


def _answered(path: Path) -> int:
    """Return how many requests of a generator were answered, rightly or not."""
    statuses = np.load(path, mmap_mode="r", allow_pickle=False)["status"]
    return int(np.isin(statuses, (recorder.OK, recorder.WRONG)).sum())


@dataclass(frozen=True, slots=True)
class _Compared:
    expected: Expected
    compared_with: str


def _renamed(outputs: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Give outputs that a model returned in order the server's names."""
    if set(outputs[0]) <= set(names):
        return outputs
    if len(outputs[0]) != len(names):
        raise InputError(f"--check-model: it has {len(outputs[0])} outputs, and the server {', '.join(names)}")
    return [dict(zip(names, each.values(), strict=True)) for each in outputs]


def _described(payloads: _Payloads) -> dict[str, str]:
    first = payloads.inputs[0]
    return {each.name: f"{TO_DTYPE[each.datatype]} {list(first[each.name].shape)}" for each in payloads.declared}


def _summed(done: Sequence[GeneratorDone]) -> Tally:
    total = Tally()
    for each in done:
        total.add(each.tally)
    return total


def _cached(asked: _Asked) -> list[str]:
    speed = asked.repeated_speed
    if speed is None or speed < CACHE_SPEED:
        return []
    return [
        f"the server caches: asked again, it answered the same inputs {speed:.3g} times faster; the run repeats"
        f" {len(asked.first)} payloads, so its numbers are the cache's"
    ]


def _notes(compared: _Compared, asked: _Asked, sent: _Sent, check: AnswerCheck) -> tuple[str, ...]:
    notes = []
    if compared.compared_with.startswith("the server's own"):
        notes.append(
            "answers were compared with the server's own, asked one by one before the run: that shows mix-ups, drops"
            " and lies under load, and not a model that is wrong; --reference or --check-model would"
        )
        again = Tally()
        for number, answer in enumerate(asked.again):
            again.add(compared.expected.compare(number, answer))
        if again.wrong_rows:
            notes.append(
                f"asked twice, one by one, the server gave {again.wrong_rows} of {again.rows} rows differently (largest"
                f" relative error {again.max_error:.3g}): it is not steady in itself"
            )
    warning = right.warning(check)
    notes.extend([warning] if warning else [])
    at_once = sum(each.compared_at_once for each in sent.done)
    if at_once:
        notes.append(f"{at_once} answers were compared while the clock ran, for want of room to keep them")
    if sent.before is None:
        notes.append("the server has no statistics, so its counts were not compared")
    return tuple(notes)


def _error(
    metrics: stats.Metrics, check: AnswerCheck, done: Sequence[GeneratorDone], verdict: validity.Verdict
) -> str | None:
    """Say why a run does not count, the gravest reason first."""
    first = next((each.first_error for each in done if each.first_error), "")
    reasons: list[tuple[bool, Callable[[], str]]] = [
        (
            metrics.wrong > 0,
            lambda: (
                f"{metrics.wrong} of {metrics.requests} answers are wrong; the largest relative error is"
                f" {check.max_error:.3g}, allowed is {check.tolerance:.3g}; the run has no throughput"
            ),
        ),
        (metrics.errors > 0, lambda: f"{metrics.errors} of {metrics.requests} requests failed: {first}"),
        (
            metrics.unanswered > 0,
            lambda: f"{metrics.unanswered} of {metrics.requests} requests were never answered: {first}",
        ),
        (bool(verdict.voids), lambda: "; ".join(verdict.voids)),
        (
            metrics.shed > 0,
            lambda: (
                f"the server refused {metrics.shed} of {metrics.requests} requests for want of room; what counts is"
                " the goodput (--bound)"
            ),
        ),
    ]
    return next((text() for applies, text in reasons if applies), None)
