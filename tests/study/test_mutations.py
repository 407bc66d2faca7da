"""Tests of the measurement code can fail: each fault that is put into it is found by a test that is there for it."""

import importlib
import inspect
import types
from dataclasses import dataclass

import pytest

from headrace.bench import correlation, stats, steady
from headrace.study import intervals, plan, power, samples, verdict, welch
from tests.believe import test_faults_elsewhere, test_published_faults
from tests.bench import test_correlation, test_stats, test_steady
from tests.study import test_compare, test_intervals, test_power, test_samples


@dataclass(frozen=True)
class Mutation:
    """One fault: a piece of a module's source, what it becomes, and the test that must find it."""

    what: str
    module: types.ModuleType
    old: str
    new: str
    test: types.FunctionType


MUTATIONS = (
    Mutation(
        "response time from the issue",
        stats,
        "response_time=Distribution.of(completed - scheduled)",
        "response_time=Distribution.of(completed - issued)",
        test_stats.test_published_definitions_by_hand,
    ),
    Mutation(
        "service time from the plan",
        stats,
        "service_time=Distribution.of(completed - issued)",
        "service_time=Distribution.of(completed - scheduled)",
        test_stats.test_published_definitions_by_hand,
    ),
    Mutation(
        "the sign of the issue delay",
        stats,
        "Distribution.of(issued - scheduled)",
        "Distribution.of(scheduled - issued)",
        test_stats.test_published_definitions_by_hand,
    ),
    Mutation(
        "a window that ends with the first answer",
        stats,
        'answered["completed_ns"].max()',
        'answered["completed_ns"].min()',
        test_stats.test_published_definitions_by_hand,
    ),
    Mutation(
        "warm-up requests counted in",
        stats,
        "counted = measured(records)",
        "counted = records",
        test_stats.test_published_definitions_by_hand,
    ),
    Mutation(
        "the first measured request dropped",
        stats,
        "counted = measured(records)",
        "counted = measured(records)[1:]",
        test_stats.test_published_definitions_by_hand,
    ),
    Mutation(
        "requests per second for samples per second",
        stats,
        "throughput_samples_per_s=rows / window_s",
        "throughput_samples_per_s=len(counted) / window_s",
        test_stats.test_published_definitions_by_hand,
    ),
    Mutation(
        "warm-up latency from the plan's zero",
        stats,
        'float(first["completed_ns"][0] - first["issued_ns"][0])',
        'float(first["completed_ns"][0])',
        test_stats.test_published_definitions_by_hand,
    ),
    Mutation(
        "percentiles off by one",
        stats,
        "[50, 90, 95, 99]",
        "[50, 90, 95, 98]",
        test_stats.test_percentiles_interpolate_between_order_statistics,
    ),
    Mutation(
        "percentiles without interpolation",
        stats,
        "np.percentile(values, [50, 90, 95, 99])",
        "np.percentile(values, [50, 90, 95, 99], method='higher')",
        test_stats.test_percentiles_interpolate_between_order_statistics,
    ),
    Mutation(
        "requests out of the plan's order",
        samples,
        'counted = counted[np.argsort(counted["scheduled_ns"], kind="stable")]',
        "counted = counted[:]",
        test_samples.test_a_runs_numbers_are_computed_from_its_requests,
    ),
    Mutation(
        "a sample of service times",
        samples,
        'counted["completed_ns"] - counted["scheduled_ns"]',
        'counted["completed_ns"] - counted["scheduled_ns"].min()',
        test_samples.test_a_runs_numbers_are_computed_from_its_requests,
    ),
    Mutation(
        "goodput of what is late",
        samples,
        "self.response_s <= bound_s",
        "self.response_s > bound_s",
        test_samples.test_goodput_counts_rows_within_the_bound,
    ),
    Mutation(
        "a mean of percentiles",
        samples,
        "float(np.percentile(np.concatenate([sample.response_s for sample in samples]), percentile))",
        "float(np.mean([np.percentile(sample.response_s, percentile) for sample in samples]))",
        test_samples.test_percentiles_are_of_all_requests_together,
    ),
    Mutation("n for n - 1", welch, "ddof=1", "ddof=0", test_compare.test_the_interval_is_welchs_on_the_logarithms),
    Mutation(
        "one degree of freedom too many",
        welch,
        "(spread.std**2 / spread.n, spread.n - 1)",
        "(spread.std**2 / spread.n, spread.n)",
        test_compare.test_the_interval_is_welchs_on_the_logarithms,
    ),
    Mutation(
        "base over candidate",
        welch,
        "logs_candidate.mean - logs_base.mean",
        "logs_base.mean - logs_candidate.mean",
        test_compare.test_the_interval_is_welchs_on_the_logarithms,
    ),
    Mutation(
        "an interval of 90 %",
        welch,
        "0.5 + CONFIDENCE / 2",
        "CONFIDENCE",
        test_compare.test_the_interval_is_welchs_on_the_logarithms,
    ),
    Mutation(
        "pairs by place",
        intervals,
        "by_repeat[repeat] for repeat in self.repeats",
        "value for value in other.values",
        test_intervals.test_pairs_are_found_by_block_and_not_by_place,
    ),
    Mutation(
        "the sign of the pairs' differences",
        intervals,
        "np.log(matched.values) - logs_base",
        "logs_base - np.log(matched.values)",
        test_intervals.test_runs_of_the_same_blocks_are_paired_where_that_narrows_the_interval,
    ),
    Mutation(
        "halves that follow each other",
        intervals,
        "order[::2], order[1::2]",
        "order[: (len(order) + 1) // 2], order[(len(order) + 1) // 2 :]",
        test_intervals.test_halves_alternate_by_block_or_else_by_order,
    ),
    Mutation(
        "one batch of values",
        intervals,
        "float(batches.var(ddof=1)) / BATCHES",
        "float(batches.var(ddof=1))",
        test_intervals.test_a_percentile_of_independent_values_has_nearly_the_binomial_interval,
    ),
    Mutation(
        "batches of shuffled requests",
        intervals,
        "batches = (values <= value)",
        "batches = np.random.default_rng(0).permutation(values <= value)",
        test_intervals.test_values_that_follow_from_each_other_widen_a_percentiles_interval,
    ),
    Mutation(
        "an error for a variance",
        intervals,
        "float(math.log(high / low) / 2) ** 2",
        "float(math.log(high / low) / 2)",
        test_intervals.test_a_runs_own_variance_is_that_of_its_mean_and_percentile,
    ),
    Mutation(
        "one run too few",
        power,
        "range(MOST + 1)",
        "range(-1, MOST + 1)",
        test_intervals.test_advice_in_words,
    ),
    Mutation(
        "more runs on one side of two",
        power,
        "half_width(grown) <=",
        "half_width([*grown[:1], *spreads[1:]]) <=",
        test_intervals.test_as_many_more_runs_as_it_takes_and_no_more,
    ),
    Mutation(
        "the lower limit of the spread",
        power,
        "chdtri(spread.n - 1, CAUTION)",
        "chdtri(spread.n - 1, 1 - CAUTION)",
        test_intervals.test_the_cautious_number_takes_the_spread_at_its_upper_limit,
    ),
    Mutation(
        "a shrinking line for a growing one",
        steady,
        "(values[i + 1 :] > value)",
        "(values[i + 1 :] < value)",
        test_steady.test_a_growing_backlog_is_not_steady,
    ),
    Mutation(
        "ties of order left out of the chance",
        steady,
        "ways[rises:].sum()",
        "ways[rises + 1 :].sum()",
        test_steady.test_the_chance_of_an_order_is_counted_out,
    ),
    Mutation(
        "growth per block for growth over the run",
        steady,
        "slope * float(times[-1]) /",
        "slope * float(times[-1]) / BLOCKS /",
        test_steady.test_growth_is_relative_to_the_mean_response_time,
    ),
    Mutation(
        "requests in the order of the file",
        steady,
        'np.argsort(scheduled_ns, kind="stable")',
        "np.arange(len(scheduled_ns))",
        test_steady.test_requests_are_judged_in_the_order_of_the_plan,
    ),
    Mutation(
        "correlations that wrap round",
        correlation,
        "1 << (2 * len(series) - 1).bit_length()",
        "len(series)",
        test_correlation.test_autocovariances_are_those_of_the_definition,
    ),
    Mutation(
        "one side of the correlations",
        correlation,
        "1 + 2 * float(",
        "1 + float(",
        test_correlation.test_the_correlation_time_is_that_of_an_autoregression,
    ),
    Mutation(
        "the blocks of 2004, before the correction",
        correlation,
        "1.5 * weighted**2",
        "0.5 * weighted**2",
        test_correlation.test_the_block_length_is_near_the_best_one_of_an_autoregression,
    ),
    Mutation(
        "a variance of blocks for one of the mean",
        correlation,
        "return length * squares / ",
        "return squares / ",
        test_correlation.test_the_variance_of_a_mean_is_that_of_an_autoregression,
    ),
    Mutation(
        "slower for faster",
        verdict,
        'return "faster" if higher == quantity.higher_is_better',
        'return "faster" if higher != quantity.higher_is_better',
        test_samples.test_a_comparison_pools_percentiles_and_compares_goodput,
    ),
    Mutation(
        "a base that may differ from itself",
        verdict,
        "if itself and void:",
        "if False:",
        test_compare.test_a_base_that_differs_from_itself_voids_the_comparison,
    ),
    Mutation(
        "a mean by a sum of nanoseconds",
        stats,
        "mean=float(values.mean())",
        "mean=float(nanoseconds.sum()) / len(values) / NS_PER_S",
        test_faults_elsewhere.test_a_mean_does_not_overflow_where_the_sum_of_nanoseconds_would,
    ),
    Mutation(
        "all repeats of a cell back to back",
        plan,
        "return [run for repeat in range(config.repeats) for run in _block(cells, repeat, config.seed)]",
        "return [each for cell in cells for each in [cell] * config.repeats]",
        test_published_faults.test_a_drift_over_a_sweep_does_not_look_like_a_difference,
    ),
    Mutation(
        "the share of trials that miss a difference for that of those that find it",
        power,
        "detectable(logs, power)",
        "detectable(logs, 1 - power)",
        test_power.test_more_runs_less_spread_and_less_power_tell_smaller_ratios,
    ),
    Mutation(
        "a spread in the unit of the values for one of their logarithms",
        power,
        "std=math.sqrt(math.log1p((side.std / side.mean) ** 2))",
        "std=side.std / 100",
        test_power.test_more_runs_less_spread_and_less_power_tell_smaller_ratios,
    ),
)


def mutated(mutation):
    """Return the module with the fault, made anew beside the right one."""
    source = inspect.getsource(mutation.module)
    assert source.count(mutation.old) == 1, f"{mutation.old!r} must stand once in {mutation.module.__name__}"
    made = types.ModuleType(mutation.module.__name__)
    made.__file__ = mutation.module.__file__
    exec(compile(source.replace(mutation.old, mutation.new), made.__file__, "exec"), vars(made))  # noqa: S102
    return made


def put_in_place(monkeypatch, where, mutation, made):
    """Let a module use the one with the fault, for the module itself and for what it took from it by name."""
    for name, value in list(vars(where).items()):
        if value is mutation.module:
            monkeypatch.setattr(where, name, made)
        elif getattr(value, "__module__", None) == mutation.module.__name__ and name in vars(made):
            monkeypatch.setattr(where, name, vars(made)[name])


def run_test(test, tmp_path):
    test(**({"tmp_path": tmp_path} if "tmp_path" in inspect.signature(test).parameters else {}))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.what for mutation in MUTATIONS])
def test_a_fault_in_the_measurement_code_is_found(mutation, monkeypatch, tmp_path):
    """The tests pass as the code is, which the suite shows by running them."""
    made = mutated(mutation)
    test_module = importlib.import_module(mutation.test.__module__)
    users = [test_module, *(module for module in vars(test_module).values() if isinstance(module, types.ModuleType))]
    for where in {
        id(module): module for module in [*users, importlib.import_module("headrace.study.compare")]
    }.values():
        if where.__name__.startswith(("tests.", "headrace.")):
            put_in_place(monkeypatch, where, mutation, made)
    with pytest.raises(AssertionError):
        run_test(mutation.test, tmp_path)
