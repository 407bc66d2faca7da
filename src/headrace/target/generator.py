"""A generator: a process that sends its share of a load, and compares the answers when its clock has stopped."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Protocol

from headrace.clock import NS_PER_S
from headrace.processes import Ready, allow_open_files, become_child, failures_reported, keep_freed_memory
from headrace.target.asking import decode_message
from headrace.target.counters import words_of
from headrace.target.expected import Tally, load_expected
from headrace.target.grpc_load import GrpcLoad
from headrace.target.http_load import HttpLoad
from headrace.target.kept import KeptAnswers
from headrace.target.recorder import OK, WRONG
from headrace.target.sending import GeneratorJob, GoAt, Sending
from headrace.wire.v2_call import Output, decode_answer


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorDone:
    requests: int
    tally: Tally
    first_error: str | None
    connections: int  # most at once
    compared_at_once: int  # answers that there was no room to keep
    cpu_share: float  # of a core, while it sent


class Load(Protocol):
    """Sends over one transport."""

    most_connections: int

    def open(self) -> None:
        """Connect before the clock starts. Raises Unreachable."""

    def run(self, start_ns: int) -> None:
        """Send everything and wait for the answers."""

    def close(self) -> None: ...


def run_generator(job: GeneratorJob) -> None:
    """Send, compare, write and report. The target of a process."""
    become_child()
    keep_freed_memory()
    allow_open_files()
    with failures_reported(job.report, f"generator {job.number} failed"):
        job.report.send(_generate(job))


def _generate(job: GeneratorJob) -> GeneratorDone:
    over_grpc = job.target.over_grpc
    expected = load_expected(job.expected, len(job.places), job.target.tolerance)
    answers = KeptAnswers(expected, _decode_message if over_grpc else decode_answer)
    sending = Sending(job, answers, words_of(job.counters, job.number))
    load: Load = GrpcLoad(job, sending) if over_grpc else HttpLoad(job, sending)
    load.open()
    gc.collect()
    gc.disable()  # a collection would hold up what is due; nothing here makes cycles by the request
    job.report.send(Ready())
    go: GoAt = job.report.recv()
    began_s, cpu_s = time.perf_counter(), time.process_time()
    load.run(go.start_ns)
    cpu_share = (time.process_time() - cpu_s) / max(time.perf_counter() - began_s, 1 / NS_PER_S)
    load.close()
    return finish(job, sending, answers, load.most_connections, cpu_share)


def finish(
    job: GeneratorJob, sending: Sending, answers: KeptAnswers, connections: int, cpu_share: float
) -> GeneratorDone:
    """Compare what was kept, write every request, and say what there is to report."""
    recorder, count = sending.recorder, sending.issued
    statuses = recorder.statuses(count)
    right = statuses == OK
    wrong, tally = answers.finish(recorder.answers(count)[right])
    statuses[right.nonzero()[0][wrong]] = WRONG
    recorder.save(job.output, count, sending.payloads())
    return GeneratorDone(
        requests=count,
        tally=tally,
        first_error=sending.first_error,
        connections=connections,
        compared_at_once=answers.compared_at_once,
        cpu_share=cpu_share,
    )


def _decode_message(body: bytes, _header_bytes: int | None) -> tuple[Output, ...]:
    return decode_message(body)
