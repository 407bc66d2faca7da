"""`headrace bench` with two engines on the CPU: one load for both, and what each did of it."""

import pytest

from headrace.bench.record import STATUSES, measured, read_records
from headrace.bench.summary import load_summary
from headrace.config import DesignConfig, LoadConfig, RunConfig, TransportConfig
from headrace.errors import InvalidOption
from tests.commands import QUICK, model_file, run

LANES = DesignConfig(name="lanes", num_workers=1)
RING = TransportConfig(name="ring")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = ("--design", "lanes", "--engines-per-device", "2", "--num-iters", "200", "--client", "zero-copy")
    ended = run("bench", *QUICK, *options, "--model", model_file(folder), "--output-dir", "both", "--json", cwd=folder)
    assert ended.code == 0, ended.err
    return folder / "both"


def test_both_engines_answer_and_the_summary_says_how_much(finished):
    summary, records = load_summary(finished), measured(read_records(finished / "requests.parquet"))
    assert summary.error is None
    assert (records["status"] == STATUSES.index("ok")).all()
    assert [each.place for each in summary.engines] == ["engine 0", "engine 1"]
    assert [each.requests for each in summary.engines] == [int((records["worker"] == lane).sum()) for lane in (0, 1)]
    assert sum(each.requests for each in summary.engines) == summary.metrics.requests == 200
    assert sum(each.share for each in summary.engines) == pytest.approx(1)
    total = sum(each.samples_per_s for each in summary.engines)
    assert total == pytest.approx(summary.metrics.throughput_samples_per_s)
    assert min(each.share for each in summary.engines) > 0


def test_every_engine_is_warmed_and_answers_as_the_eager_model_does(finished):
    summary = load_summary(finished)
    assert summary.workers_warmed == 2
    assert summary.answers.wrong_rows == 0
    assert {f"engine {number}: recompiles while serving: 0" for number in (0, 1)} <= set(summary.notes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (RunConfig(engines_per_device=2), "only --design lanes over --transport ring"),
        (RunConfig(engines_per_device=2, design=LANES), "only --design lanes over --transport ring"),
        (
            RunConfig(engines_per_device=3, design=LANES, transport=RING, load=LoadConfig(warmup_iters=1)),
            "each of 3 engines loads its model at its first request; send at least 2",
        ),
        (RunConfig(gpus=(0, 1), design=LANES, transport=RING, profile=True), "--profile: records one engine"),
        (RunConfig(gpus=(0, 1), design=LANES, transport=RING, limits=True), "--limits: measures one engine"),
        (RunConfig(engines_per_device=0), "--engines-per-device 0"),
    ],
)
def test_what_several_engines_cannot_do_is_refused(config, words):
    with pytest.raises(InvalidOption) as raised:
        config.validate()
    assert words in str(raised.value)
