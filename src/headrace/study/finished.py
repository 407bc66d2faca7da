"""Finished runs as a set: found in a folder, sorted, told apart, and refused where they are unlike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec

from headrace.bench.environment import differences as environment_differences
from headrace.bench.summary import FILE_NAME, Environment, RunSummary, TargetFacts, load_summary
from headrace.config import PUBLISHED_DESIGNS, TargetConfig
from headrace.errors import OutputError
from headrace.study.plan import PlannedRun, load_plan

RUNS = "runs"  # in a sweep's folder
ERROR_SUFFIX = ".error"  # runs/NAME.error: why an attempt ended badly

Differences: TypeAlias = Callable[[Environment, Environment], tuple[str, ...]]

# What may differ between runs that are tabled or compared: the thing compared (design, and the number of
# warm-up requests, which by default follows from its workers; or the server), the cell (batch size, compile), and
# what touches no timing (where files lie, how long to wait for an answer that never comes, what is right).
_MAY_DIFFER = (
    "design.",
    "lanes.",
    "limits",
    "transport.",
    "inputs.batch_size",
    "model.compile",  # and where compiled code is kept
    "model.model_dir",
    "model.download",
    "load.warmup_iters",
    "load.stall_timeout_s",
    "load.keep_answers",
    *(f"target.{name}" for name in ("url", "version", "label", "access.")),  # the thing compared, if it is a server
    *(f"target.{name}" for name in ("reference", "check_model", "tolerance", "request_timeout_s")),
)
# Facts of torch that the environment does not hold. Not among them: threads, which the host divides by the
# workers.
_TORCH_FACTS = ("cuda", "cudnn", "cudnn_tf32", "matmul_tf32")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class CellKey:
    """What a published table is about."""

    compile: bool
    batch_size: int

    @classmethod
    def of(cls, run: RunSummary) -> CellKey:
        return cls(compile=run.options.model.compile, batch_size=run.options.inputs.batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRun:
    """A finished run and the folder of its files."""

    folder: Path
    summary: RunSummary


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingRun:
    """An attempt of a sweep that ended without a summary: it crashed, or was stopped at its time limit."""

    planned: PlannedRun
    error: str


def load_runs(path: Path) -> list[RunSummary]:
    """Read a run's folder, or every finished run below a folder of sweeps or runs, in a fixed order.

    Raises OutputError where the folder holds none, or one of another version.
    """
    return [found.summary for found in find_runs(path)]


def find_runs(path: Path) -> list[FoundRun]:
    """Do as `load_runs`, and say where each run lies."""
    if (path / FILE_NAME).is_file():
        return [FoundRun(folder=path, summary=load_summary(path))]
    folders = sorted(summary.parent for summary in path.rglob(FILE_NAME))
    if not folders:
        raise OutputError(
            f"{path}: no finished run there; name the folder of a run (it holds {FILE_NAME}) or of a sweep"
        )
    found = [FoundRun(folder=folder, summary=load_summary(folder)) for folder in folders]
    return sorted(found, key=lambda run: _order(run.summary))


def _order(run: RunSummary) -> tuple[CellKey, tuple[int, int, str], str]:
    return CellKey.of(run), experiment_rank(run.experiment), run.started_at


def missing_runs(path: Path) -> tuple[MissingRun, ...]:
    """Return a sweep's attempts that left an error and no summary; none for a folder of another kind."""
    planned = load_plan(path)
    found = []
    for run in planned.runs if planned else ():
        note = error_file(path, run)
        if note.is_file() and not (path / RUNS / run.name / FILE_NAME).is_file():
            found.append(MissingRun(planned=run, error=note.read_text(encoding="utf-8").strip()))
    return tuple(found)


def error_file(sweep_dir: Path, run: PlannedRun) -> Path:
    return sweep_dir / RUNS / (run.name + ERROR_SUFFIX)


def counts(run: RunSummary) -> bool:
    """Return whether a run's numbers may be used: it ended well and every answer was right."""
    complete = run.metrics.errors == 0 and run.metrics.unanswered == 0
    answered_right = complete and not has_wrong_answers(run)
    return run.error is None and answered_right and run.metrics.throughput_samples_per_s is not None


def has_wrong_answers(run: RunSummary) -> bool:
    return run.metrics.wrong > 0 or (run.answers is not None and run.answers.wrong_rows > 0)


def experiment_rank(experiment: str) -> tuple[int, int, str]:
    """Sort experiments as the published tables do: baseline first, then several workers; our lanes come last."""
    design = experiment.partition("-")[0]
    if design in PUBLISHED_DESIGNS:
        return (0, PUBLISHED_DESIGNS.index(design), experiment)
    workers, _, kind = design.partition("_")
    return (2 if kind == "lanes" else 1, int(workers) if workers.isdigit() else 0, experiment)


def experiments(runs: Iterable[RunSummary]) -> list[str]:
    return sorted({run.experiment for run in runs}, key=experiment_rank)


def unlike(
    runs: Sequence[RunSummary],
    differences: Differences = environment_differences,
    may_differ: tuple[str, ...] = _MAY_DIFFER,
) -> tuple[str, ...]:
    """Return a line per option or fact of the environment that differs among the runs, at least 1.

    Each is a reason for a difference in the numbers other than the design or the server, and makes a comparison
    say nothing.
    `may_differ` are beginnings of the names of options that are left out.
    """
    lines: dict[str, None] = {}
    first = _fullest(runs)
    for run in runs:
        lines |= dict.fromkeys(_differing_options(first, run, may_differ))
        lines |= dict.fromkeys(differences(first.environment, run.environment))
        lines |= dict.fromkeys(_differing_torch(first, run))
    return tuple(lines)


def several_targets(runs: Iterable[RunSummary]) -> tuple[str, ...]:
    """Return a line per experiment whose runs were made against different servers, and so are no repeats."""
    targets: dict[str, dict[str, None]] = {}
    for run in runs:
        if run.options.target is not None:
            targets.setdefault(run.experiment, {})[_target(run.options.target)] = None
    return tuple(f"{name} stands for {' and '.join(urls)}" for name, urls in targets.items() if len(urls) > 1)


def machine(runs: Sequence[RunSummary]) -> str:
    """Describe where and with what the runs were made, in one line. Callers have refused unlike runs."""
    first = _fullest(runs)
    where, options = first.environment, first.options
    if first.target is not None:
        return "; ".join(
            (
                f"client on {where.cpu_model}, {where.cpu_count} CPUs",
                f"model {options.model.name}",
                f"input {', '.join(_payload(first.target))}",
                options.load.words,
                "headrace " + ", ".join(revisions(runs)),
            )
        )
    device = where.gpu_name if where.gpu_name and options.device != "cpu" else where.cpu_model
    parts = [
        device + (f" (driver {where.gpu_driver})" if where.gpu_driver else ""),
        f"torch {first.torch.torch}" if first.torch else "torch version not recorded",
        f"CUDA {first.torch.cuda}" if first.torch and first.torch.cuda else "",
        f"model {options.model.name}, precision {options.precision}",
        f"input {'files' if options.inputs.files else options.inputs.kind}, float32 [batch, 3,"
        f" {options.inputs.image_size}, {options.inputs.image_size}]",
        options.load.words,
        "headrace " + ", ".join(revisions(runs)),
    ]
    return "; ".join(part for part in parts if part)


def revisions(runs: Iterable[RunSummary]) -> list[str]:
    """Return the distinct versions of the code that made the runs."""
    return sorted({_revision(run.environment) for run in runs})


def changed_options(base: Sequence[RunSummary], candidate: Sequence[RunSummary]) -> tuple[str, ...]:
    """Return `name: values -> values` for each option that the two sides do not have alike."""
    ours, theirs = _option_values(base), _option_values(candidate)
    return tuple(
        f"{name}: {', '.join(sorted(values))} -> {', '.join(sorted(theirs.get(name, {'none'})))}"
        for name, values in ours.items()
        if values != theirs.get(name)
    )


def _fullest(runs: Sequence[RunSummary]) -> RunSummary:
    """Return a run that got far enough to record torch's facts, if there is one. Callers guarantee a run."""
    return next((run for run in runs if run.torch), runs[0])


def _revision(environment: Environment) -> str:
    revision = f" {environment.git_revision[:10]}" if environment.git_revision else ""
    return environment.headrace + revision + (" with local changes" if environment.git_dirty else "")


def _differing_options(first: RunSummary, other: RunSummary, may_differ: tuple[str, ...]) -> list[str]:
    """Return the options that differ and may not. A server's own are those of its requests: it may listen elsewhere."""
    if (first.options.target is None) != (other.options.target is None):
        kinds = ("a server by its URL" if run.options.target else "a design" for run in (first, other))
        return [f"measured: {' and '.join(kinds)}"]
    ours, theirs = _flat_options(first), _flat_options(other)
    names = [name for name in ours | theirs if not name.startswith(may_differ)]
    pairs = [(name, ours.get(name, "none"), theirs.get(name, "none")) for name in names]
    if first.target is not None and other.target is not None:
        pairs.append(("payload", ", ".join(_payload(first.target)), ", ".join(_payload(other.target))))
    return [f"{name}: {one} and {another}" for name, one, another in pairs if one != another]


def _payload(facts: TargetFacts) -> list[str]:
    """Return what a request carried, without the inputs' names, which servers choose."""
    return sorted(facts.inputs.values())


def _target(target: TargetConfig) -> str:
    return target.url + (f" (version {target.version})" if target.version else "")


def _option_values(runs: Iterable[RunSummary]) -> dict[str, set[str]]:
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in _flat_options(run).items():
            values.setdefault(name, set()).add(value)
    return values


def _flat_options(run: RunSummary) -> dict[str, str]:
    """Return options as `section.name` -> text, the device without its number: GPUs are told by name."""
    options: dict[str, object] = msgspec.to_builtins(run.options, enc_hook=str)
    return dict(_flatten("", options)) | {"device": run.options.device_kind}


def _flatten(prefix: str, value: object) -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in _flatten(f"{prefix}.{key}".lstrip("."), item)]
    return [(prefix, str(value))]


def _differing_torch(first: RunSummary, other: RunSummary) -> list[str]:
    if first.torch is None or other.torch is None:  # a run that failed early does not say
        return []
    pairs = ((name, getattr(first.torch, name), getattr(other.torch, name)) for name in _TORCH_FACTS)
    return [f"{name}: {ours} and {theirs}" for name, ours, theirs in pairs if ours != theirs]
