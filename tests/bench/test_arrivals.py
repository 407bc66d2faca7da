"""The plan of arrivals: seeded, ascending, at the rate that was asked for, and never rescaled to a count."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats as laws

from headrace.bench.arrivals import planned, read_arrivals, share
from headrace.config import LoadConfig
from headrace.errors import InvalidOption


def offsets(**load):
    made = planned(LoadConfig(**load))
    assert made is not None
    return made


def test_a_burst_is_due_at_one_moment():
    assert offsets(num_iters=3).tolist() == [0, 0, 0]


def test_a_closed_loop_has_no_plan():
    assert planned(LoadConfig(kind="closed", concurrency=4)) is None


def test_constant_arrivals_do_not_drift():
    made = offsets(kind="constant", rate=3.0, num_iters=3_000_001)
    assert made[-1] == 1_000_000 * 10**9


def test_a_duration_at_a_constant_rate_holds_that_many_requests():
    made = offsets(kind="constant", rate=100.0, duration_s=2.0)
    assert len(made) == 200
    assert made[-1] < 2 * 10**9


@pytest.mark.parametrize("end", [{"num_iters": 20_000}, {"duration_s": 20.0}])
def test_poisson_intervals_are_exponential(end):
    made = offsets(kind="poisson", rate=1000.0, seed=3, **end)
    gaps = np.diff(made) / 1e9
    assert laws.kstest(gaps, laws.expon(scale=1e-3).cdf).pvalue > 0.001


def test_the_number_of_poisson_arrivals_in_a_duration_varies_with_the_seed():
    counts = [len(offsets(kind="poisson", rate=1000.0, duration_s=1.0, seed=seed)) for seed in range(200)]
    assert 0.7 < np.var(counts) / np.mean(counts) < 1.4  # a Poisson count's variance is its mean


def test_a_seed_gives_the_same_plan_again_and_another_another():
    one, again, other = (offsets(kind="poisson", rate=50.0, seed=seed) for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


def test_the_shares_of_generators_make_the_plan():
    made = offsets(kind="poisson", rate=50.0)
    parts = [share(made, index, 3) for index in range(3)]
    assert sorted(np.concatenate(parts).tolist()) == made.tolist()


def test_lines_of_seconds_are_replayed_from_zero(tmp_path):
    file = tmp_path / "arrivals.txt"
    file.write_text("10.5\n10.75\n12\n")
    assert read_arrivals(file).tolist() == [0, 250_000_000, 1_500_000_000]


def test_a_runs_own_records_are_replayed_without_its_warm_up(tmp_path):
    file = tmp_path / "requests.parquet"
    pq.write_table(pa.table({"scheduled_ns": [5, 70, 90], "phase": ["first", "measured", "measured"]}), file)
    assert read_arrivals(file).tolist() == [0, 20]


@pytest.mark.parametrize(
    ("text", "says"), [("", "no arrival"), ("2\n1\n", "arrival 2 is before"), ("soon\n", "seconds, one per line")]
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_a_file_that_is_no_schedule_is_refused(tmp_path, text, says):
    file = tmp_path / "arrivals.txt"
    file.write_text(text)
    with pytest.raises(InvalidOption, match=says):
        read_arrivals(file)


def test_parquet_without_the_column_is_refused(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"other": [1]}), file)
    with pytest.raises(InvalidOption, match="scheduled_ns"):
        read_arrivals(file)


def test_more_requests_than_a_run_can_hold_are_refused_before_memory_is_taken():
    with pytest.raises(InvalidOption, match="lower --rate or --duration"):
        offsets(kind="constant", rate=1e9, duration_s=1e6)


@pytest.mark.parametrize(
    ("load", "says"),
    [
        ({"kind": "poisson"}, "needs --rate"),
        ({"rate": 5.0}, "--rate 5.0: is for --load constant or poisson"),
        ({"kind": "closed"}, "needs --concurrency"),
        ({"kind": "closed", "concurrency": 0}, "--concurrency 0: at least 1"),
        ({"kind": "poisson", "rate": float("nan")}, "--rate nan: must be above 0"),
        ({"kind": "replay"}, "needs --arrivals"),
        ({"duration_s": 3.0}, "says itself how many"),
        ({"kind": "steady"}, "choose one of burst, closed"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(load, says):
    with pytest.raises(InvalidOption, match=says):
        LoadConfig(**load).validate()
