"""A lane on the host: rows from anywhere in, each one's answer back in its own row."""

import threading
from mmap import mmap
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ModelError
from headrace.request import Batch, Ticket
from headrace.runtime.host_lane import HostLane
from headrace.tensors import TensorSpec
from headrace.transport.layout import Layout
from headrace.transport.table import RowTable

ROWS = 10  # of a table
LARGEST = 8
BUCKETS = (1, 4, LARGEST)
UNTOUCHED = -7
LAYOUT = Layout(
    rows=ROWS,
    inputs=(
        TensorSpec(name="image", dtype="float32", features=(3,)),
        TensorSpec(name="ids", dtype="int64", features=(2, 2)),
        TensorSpec(name="flag", dtype="bool", features=()),
    ),
    outputs=(
        TensorSpec(name="scores", dtype="float16", features=(3,)),
        TensorSpec(name="best", dtype="int32", features=()),
    ),
)
BOTH_FORMS = pytest.mark.parametrize("padded", [False, True], ids=["as many rows as there are", "padded"])


class Model:
    """Computes every row by itself, from all inputs; remembers the shapes and places that it was given."""

    def __init__(self):
        self.rows = []
        self.addresses = []
        self.saw_gradients = []

    def __call__(self, image, ids, flag):
        self.rows.append({len(image), len(ids), len(flag)})
        self.addresses.append([image.data_ptr(), ids.data_ptr(), flag.data_ptr()])
        self.saw_gradients.append(torch.is_grad_enabled())
        return self.scores(image, flag), self.best(ids)

    @staticmethod
    def scores(image, flag):
        return (image * torch.where(flag, 2.0, 1.0).unsqueeze(1)).half()

    @staticmethod
    def best(ids):
        return ids.sum((1, 2)).int()


def source_of(seed):
    """A source with a table full of requests, no two rows alike, and no answers yet."""
    table = RowTable(LAYOUT, mmap(-1, LAYOUT.total_bytes))
    generator = torch.Generator().manual_seed(seed)
    table.inputs[0].copy_(torch.randn(ROWS, 3, generator=generator))
    table.inputs[1].copy_(torch.randint(0, 1000, (ROWS, 2, 2), generator=generator))
    table.inputs[2].copy_(torch.arange(ROWS) % 2 == seed % 2)
    for output in table.outputs:
        output.fill_(UNTOUCHED)
    return SimpleNamespace(table=table)


def batch_of(*places):
    """A batch of requests, each at (source, first row, rows), in the smallest bucket that holds them."""
    batch = Batch.of([Ticket(source, index, first, rows, 0) for index, (source, first, rows) in enumerate(places)])
    batch.bucket = min(bucket for bucket in BUCKETS if bucket >= batch.rows)
    return batch


def lane_of(model, *, padded):
    """A lane whose own buffers hold what must never be read: rows of batches long gone."""
    stale = (torch.full((LARGEST, 3), float("nan")), torch.full((LARGEST, 2, 2), 10**9), torch.ones(LARGEST) > 0)
    return HostLane(model, stale, padded=padded)


def run(lane, *batches):
    for batch in batches:
        lane.launch(batch)
    for batch in batches:
        lane.wait(batch)


def check_answers(sources, places):
    """Every row of these requests has its own answer, and no other row any."""
    for source in sources:
        table, answered = source.table, torch.zeros(ROWS, dtype=torch.bool)
        for owner, first, rows in places:
            if owner is source:
                answered[first : first + rows] = True
        scores, best = Model.scores(table.inputs[0], table.inputs[2]), Model.best(table.inputs[1])
        assert table.outputs[0].equal(torch.where(answered.unsqueeze(1), scores, UNTOUCHED))
        assert table.outputs[1].equal(torch.where(answered, best, torch.tensor(UNTOUCHED, dtype=torch.int32)))


PLACES = {
    "one row": [(0, 3, 1)],
    "a full bucket in one place": [(0, 2, 4)],
    "side by side": [(0, 2, 1), (0, 3, 2), (0, 5, 1)],
    "less than a bucket in one place": [(0, 4, 3)],
    "apart": [(0, 0, 1), (0, 5, 2)],
    "in the wrong order": [(0, 6, 2), (0, 4, 2)],
    "from two tables": [(0, 1, 1), (1, 2, 3), (0, 2, 2)],
    "a full largest bucket from two tables": [(1, 2, 6), (0, 0, 2)],
}


@BOTH_FORMS
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES.keys())
def test_each_row_gets_its_own_answer_and_no_other_row_is_touched(places, padded):
    sources, model = [source_of(0), source_of(1)], Model()
    placed = [(sources[number], first, rows) for number, first, rows in places]
    batch = batch_of(*placed)
    lane = lane_of(model, padded=padded)
    run(lane, batch)
    lane.close()
    check_answers(sources, placed)
    assert model.rows == [{batch.bucket if padded else batch.rows}]
    assert model.saw_gradients == [False]


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, ROWS - 1), st.integers(1, LARGEST)), max_size=12),
    st.booleans(),
)
def test_rows_in_are_rows_out_whatever_batches_follow_each_other(places, padded):
    sources = [source_of(0), source_of(1)]
    placed = [(sources[number], first, rows) for number, first, rows in places if first + rows <= ROWS]
    batches, waiting = [], []
    for place in placed:
        if sum(rows for _, _, rows in waiting) + place[2] > LARGEST:
            batches.append(batch_of(*waiting))
            waiting = []
        waiting.append(place)
    lane = lane_of(Model(), padded=padded)
    run(lane, *batches, *([batch_of(*waiting)] if waiting else []))
    lane.close()
    check_answers(sources, placed)


@BOTH_FORMS
def test_rows_that_lie_together_and_fill_a_bucket_are_read_where_they_are(padded):
    source, model = source_of(0), Model()
    lane = lane_of(model, padded=padded)
    run(lane, batch_of((source, 2, 3), (source, 5, 1)))
    lane.close()
    assert model.addresses == [source.table.input_addresses(2)]


def test_padding_is_never_read_from_the_rows_of_others():
    source, model = source_of(0), Model()
    lane = lane_of(model, padded=True)
    run(lane, batch_of((source, 2, 3)))
    lane.close()
    assert model.addresses != [source.table.input_addresses(2)]


def test_batches_run_in_order_one_at_a_time_and_launching_does_not_wait():
    source, begun, go = source_of(0), [], threading.Semaphore(0)

    def model(image, ids, flag):
        begun.append(len(image))
        assert go.acquire(timeout=60)
        return Model()(image, ids, flag)

    batches = [batch_of((source, 0, rows)) for rows in (1, 2, 3)]
    lane = lane_of(model, padded=False)
    for batch in batches:
        lane.launch(batch)
    assert not any(lane.done(batch) for batch in batches)
    for number, batch in enumerate(batches):
        go.release()
        lane.wait(batch)
        assert [lane.done(each) for each in batches] == [other <= number for other in range(3)]
    lane.close()
    assert begun == [1, 2, 3]


@BOTH_FORMS
def test_a_failed_batch_is_told_by_wait_and_the_lane_goes_on(padded):
    source = source_of(0)

    def model(image, ids, flag):
        if (image == 99).any():
            raise ValueError("row is bad")
        return Model()(image, ids, flag)

    source.table.inputs[0][4] = 99
    bad, good = (source, 3, 4), (source, 7, 3)
    lane = lane_of(model, padded=padded)
    batches = batch_of(bad), batch_of(good)
    for batch in batches:
        lane.launch(batch)
    with pytest.raises(ValueError, match="row is bad"):
        lane.wait(batches[0])
    assert lane.done(batches[0]), "ended, though not well"
    lane.wait(batches[1])
    lane.close()
    check_answers([source], [good])


@pytest.mark.parametrize(
    "outputs",
    [
        lambda scores, best: (scores,),
        lambda scores, best: (scores[:, :2], best),
        lambda scores, best: (scores[:2], best),
    ],
    ids=["too few outputs", "other features", "too few rows"],
)
def test_a_model_that_returns_something_else_fails_its_batch(outputs):
    source = source_of(0)
    lane = lane_of(lambda *inputs: outputs(*Model()(*inputs)), padded=False)
    with pytest.raises((ValueError, RuntimeError, ModelError)):
        run(lane, batch_of((source, 0, 4)))
    lane.close()


def test_a_model_that_returns_one_row_for_several_fails_its_batch():
    source = source_of(0)
    lane = lane_of(lambda *inputs: tuple(each[:1] for each in Model()(*inputs)), padded=False)
    try:
        with pytest.raises((ValueError, RuntimeError, ModelError)):
            run(lane, batch_of((source, 0, 4)))
    finally:
        lane.close()


def test_the_model_can_be_run_alone_on_what_the_buffers_hold():
    model = Model()
    lane = lane_of(model, padded=True)
    lane.replay(4)
    lane.synchronize()
    lane.close()
    assert model.rows == [{4}]
