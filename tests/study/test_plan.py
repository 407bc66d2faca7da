from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.summary import encode
from headrace.config import PUBLISHED_DESIGNS
from headrace.errors import InvalidOption, OutputError
from headrace.study.plan import FILE_NAME, Plan, SweepConfig, differing_options, left_out, load_plan, plan

SMALL = SweepConfig(designs=("original", "h2d_d2h_threads"), workers=(1, 2), batch_sizes=(1, 32), repeats=3)


def subset(values):
    return st.lists(st.sampled_from(values), min_size=1, unique=True).map(tuple)


configs = st.builds(
    SweepConfig,
    designs=subset(PUBLISHED_DESIGNS),
    workers=subset((1, 2, 3, 4)).map(lambda workers: tuple({1, *workers})),
    batch_sizes=subset((1, 32, 64, 128, 256)),
    compile=subset((False, True)),
    repeats=st.integers(1, 4),
    seed=st.integers(0, 1000),
)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_each_block_holds_every_valid_cell_once(config):
    runs = plan(config)
    cells = [(run.design, run.num_workers, run.batch_size, run.compile) for run in runs]
    per_block = len(runs) // config.repeats
    blocks = [cells[i : i + per_block] for i in range(0, len(cells), per_block)]
    assert [run.repeat for run in runs] == [repeat for repeat in range(config.repeats) for _ in range(per_block)]
    assert all(Counter(block) == Counter(blocks[0]) for block in blocks)
    assert len(set(blocks[0])) == per_block
    assert len({run.name for run in runs}) == len(runs)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_every_combination_is_planned_or_left_out_with_a_reason(config):
    planned = {(run.design, run.num_workers, run.compile) for run in plan(config)}
    refused = {(cell.design, cell.num_workers, cell.compile) for cell in left_out(config)}
    total = len(config.designs) * len(config.workers) * len(config.compile)
    assert not planned & refused
    assert len(planned | refused) == total
    assert all(cell.reason.startswith(("--num-workers", "--compile")) for cell in left_out(config))


def test_the_order_follows_from_the_seed_and_differs_between_blocks():
    runs = plan(SMALL)
    names = [[run.name.partition("-")[2] for run in runs if run.repeat == repeat] for repeat in range(3)]
    assert plan(SMALL) == runs
    assert plan(replace(SMALL, seed=1)) != runs
    assert names[0] != names[1] or names[1] != names[2]


def test_more_repeats_keep_the_order_of_the_first_blocks():
    assert plan(replace(SMALL, repeats=5))[: len(plan(SMALL))] == plan(SMALL)


def test_names_are_readable():
    config = SweepConfig(designs=("h2d_d2h_threads",), workers=(2,), batch_sizes=(32,), compile=(False,), repeats=1)
    assert [run.name for run in plan(config)] == ["r0-b032-eager-h2d_d2h_threads-w2"]
    assert plan(config)[0].experiment == "2_predict_workers"


def test_the_default_sweep_is_the_published_one():
    runs = plan(SweepConfig())
    assert len(runs) == 10 * (5 * 6 + 5 * 3)  # 35 published tables' rows and the executor's 10
    assert {run.experiment for run in runs if run.compile} == set(PUBLISHED_DESIGNS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"designs": ()}, "--designs: the list is empty", id="no design"),
        pytest.param({"designs": ("fast",)}, "--designs fast", id="unknown design"),
        pytest.param({"workers": (0,)}, "--workers 0", id="no worker"),
        pytest.param({"batch_sizes": (32, 0)}, "--batch-sizes 0", id="empty batch"),
        pytest.param({"batch_sizes": (32, 32)}, "--batch-sizes 32 32: .* stands twice", id="a batch size twice"),
        pytest.param({"compile": ()}, "--compile nothing: choose off, on or both", id="no compile mode"),
        pytest.param({"compile": (True, True)}, "--compile on on: choose off, on or both", id="a mode twice"),
        pytest.param({"repeats": 0}, "--repeats 0", id="no repeat"),
        pytest.param({"seed": -1}, "--order-seed -1", id="negative seed"),
        pytest.param({"num_iters": 0}, "--num-iters 0", id="no request"),
        pytest.param({"designs": ("original",), "workers": (2,)}, "no cell", id="every cell refused"),
    ],
)
def test_options_that_cannot_work_are_refused(change, message):
    with pytest.raises(InvalidOption, match=message):
        plan(replace(SMALL, **change))


def test_a_written_plan_is_read_back(tmp_path):
    written = Plan.of(SMALL)
    (tmp_path / FILE_NAME).write_bytes(encode(written))
    assert load_plan(tmp_path) == written


def test_a_folder_without_a_plan_has_none(tmp_path):
    assert load_plan(tmp_path) is None


def test_a_damaged_plan_is_refused(tmp_path):
    (tmp_path / FILE_NAME).write_text("{")
    with pytest.raises(OutputError, match="not a plan"):
        load_plan(tmp_path)


def test_differing_options_are_named_with_both_values():
    asked = replace(SMALL, repeats=5, child_options=("--precision", "float32"))
    assert differing_options(SMALL, asked) == [
        "repeats: 3, not 5",
        "child_options: (), not ('--precision', 'float32')",
    ]
