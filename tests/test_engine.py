"""The engine in one's own program: the eager model's answers, whatever the sizes, types and threads; clear refusals."""

import asyncio
import threading

import pytest
import torch

import headrace
from headrace import DynamicDim, Engine, EngineConfig
from headrace.errors import (
    DeadlineExceeded,
    DeviceUnavailable,
    EngineStopped,
    InvalidOption,
    InvalidRequest,
    ModelError,
)
from headrace.model.described import Bytes, Described

WAIT_S = 60


class Words(torch.nn.Module):
    """Token ids and a mask in; nested outputs of two types, of which `tokens` follows the length."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(100, 8)
        self.linear = torch.nn.Linear(8, 3)

    def forward(self, ids, mask):
        words = self.embedding(ids) * mask.unsqueeze(-1)
        scores = self.linear(words.sum(1))
        return {"scores": scores, "more": (scores.argmax(1), [self.linear(words)])}


def words(rows, length=7):
    return {"ids": torch.randint(0, 100, (rows, length)), "mask": torch.ones(rows, length, dtype=torch.bool)}


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 2).eval()


def engine(model=None, example=None, **options):
    options = {"device": "cpu", "max_batch_size": 8, **options}
    return Engine(model or linear(), torch.randn(2, 4) if example is None else example, **options)


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 50], ids=lambda rows: f"{rows} rows")
def test_answers_are_the_models_own_also_when_a_request_is_split(rows):
    model = linear()
    batch = torch.randn(rows, 4)
    with engine(model) as running:
        torch.testing.assert_close(running.infer(batch), model(batch).detach())


def test_named_inputs_of_several_types_and_nested_outputs():
    model, request = Words().eval(), words(5)
    with engine(model, words(2), num_lanes=2) as running:
        got, wanted = running.infer(request), model(**request)
    torch.testing.assert_close(got["scores"], wanted["scores"].detach())
    assert torch.equal(got["more"][0], wanted["more"][0])
    torch.testing.assert_close(got["more"][1][0], wanted["more"][1][0].detach())


def test_many_threads_get_each_their_own_answers():
    model, wrong = linear(), []

    def work(running, seed):
        generator = torch.Generator().manual_seed(seed)
        for rows in (1, 2, 5, 8, 11) * 6:
            batch = torch.randn(rows, 4, generator=generator)
            if not torch.allclose(running.infer(batch, WAIT_S), model(batch).detach(), atol=1e-6):
                wrong.append(rows)

    with engine(model, num_lanes=2) as running:
        threads = [threading.Thread(target=work, args=(running, seed)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)


def test_coroutines_may_wait_for_answers():
    model, batches = linear(), [torch.randn(3, 4) for _ in range(30)]

    async def gather(running):
        return await asyncio.gather(*(running.infer_async(batch) for batch in batches))

    with engine(model) as running:
        answers = asyncio.run(gather(running))
    for batch, answer in zip(batches, answers, strict=True):
        torch.testing.assert_close(answer, model(batch).detach())


def test_a_callback_of_an_answer_may_submit_again():
    done = threading.Event()
    with engine() as running:
        first = running.submit(torch.randn(1, 4))
        first.add_done_callback(lambda _: running.submit(torch.randn(1, 4)).add_done_callback(lambda _: done.set()))
        assert done.wait(WAIT_S)


def test_compiled_models_serve_without_compiling_again(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    cache = tmp_path / "compiled"
    with engine(model, compile=True, buckets=(1, 4), compile_cache=cache) as running:
        for rows in (1, 3, 4, 2):
            batch = torch.randn(rows, 4)
            torch.testing.assert_close(running.infer(batch), model(batch).detach(), rtol=1e-4, atol=1e-5)
        assert running.recompiles == 0
    assert any(cache.iterdir()), "compiled code was kept"


class TestDynamic:
    """A sequence's length that differs from request to request."""

    SIZES = DynamicDim(dims={"ids": 1, "mask": 1}, sizes=(4, 16))

    @pytest.mark.parametrize("length", [1, 3, 4, 5, 16])
    def test_padding_never_changes_an_answer(self, length):
        model, request = Words().eval(), words(3, length)
        with engine(model, words(2, 6), dynamic=self.SIZES) as running:
            got, wanted = running.infer(request), model(**request)
        torch.testing.assert_close(got["scores"], wanted["scores"].detach())
        assert got["more"][1][0].shape == (3, length, 3), "the padding is cut off"
        torch.testing.assert_close(got["more"][1][0], wanted["more"][1][0].detach())

    def test_a_model_that_minds_the_padding_is_refused(self):
        class Mean(torch.nn.Module):
            def forward(self, ids):
                return ids.float().mean(1, keepdim=True)

        dynamic = DynamicDim(dims={"input_0": 1}, sizes=(4, 16))
        with pytest.raises(ModelError, match="padding the example from 3 to 4 changes output 0"):
            engine(Mean(), torch.ones(1, 3, dtype=torch.int64), dynamic=dynamic).start()

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (words(1, 17), "a dynamic dimension of 17 is outside 1 to 16"),
            ({"ids": words(1, 3)["ids"], "mask": words(1, 4)["mask"]}, "the same in all"),
        ],
        ids=["too long", "of different lengths"],
    )
    def test_lengths_that_were_not_prepared_are_refused(self, request_, message):
        with (
            engine(Words().eval(), words(2, 6), dynamic=self.SIZES) as running,
            pytest.raises(InvalidRequest, match=message),
        ):
            running.infer(request_)

    @pytest.mark.parametrize(
        "dynamic",
        [
            DynamicDim(dims={"ids": 0}, sizes=(4,)),
            DynamicDim(dims={"ids": 1}, sizes=(8, 4)),
            DynamicDim(dims={"ids": 1}, sizes=(4,), padding={"mask": 1}),
        ],
        ids=["the rows", "descending sizes", "padding of a fixed input"],
    )
    def test_what_cannot_be_is_refused_at_start(self, dynamic):
        with pytest.raises(InvalidOption):
            engine(Words().eval(), words(2, 6), dynamic=dynamic).start()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            torch.randn(2, 5),
            r"input input_0 is float32 of shape \[2, 5\]; the model takes float32 of shape \[rows, 4\]",
        ),
        (torch.randn(2, 4).double(), "input input_0 is float64"),
        (torch.randn(0, 4), "have 0 rows"),
        (torch.tensor(1.0), "have 0 rows"),
        ([torch.randn(2, 4), torch.randn(2, 4)], "2 inputs were given; the model takes 1"),
        ({"other": torch.randn(2, 4)}, "inputs other were given; the model takes input_0"),
    ],
    ids=["features", "dtype", "no rows", "no dimension", "too many", "another name"],
)
def test_a_request_that_the_model_cannot_take_is_refused(inputs, message):
    with engine() as running, pytest.raises(InvalidRequest, match=message):
        running.infer(inputs)


def test_a_request_that_waited_beyond_its_time_is_not_computed():
    entered, go_on, seen = threading.Event(), threading.Event(), []

    class Slow(torch.nn.Module):
        def forward(self, inputs):
            seen.append(float(inputs[0, 0]))
            if inputs[0, 0] == 1:
                entered.set()
                assert go_on.wait(WAIT_S)
            return inputs

    with engine(Slow(), torch.zeros(1, 4), max_batch_size=1, check_accuracy=False) as running:
        blocking = running.submit(torch.ones(1, 4))
        assert entered.wait(WAIT_S)
        behind = running.submit(torch.full((1, 4), 2.0))  # takes the lane's second place
        late = running.submit(torch.full((1, 4), 3.0), timeout_s=1e-9)
        go_on.set()
        with pytest.raises(DeadlineExceeded, match="was not computed"):
            late.result(WAIT_S)
        assert blocking.result(WAIT_S).shape == behind.result(WAIT_S).shape == (1, 4)
    assert 3.0 not in seen


def test_a_model_that_raises_fails_its_own_request_only():
    class Picky(torch.nn.Module):
        def forward(self, inputs):
            if (inputs == 13).any():
                raise ValueError("thirteen")
            return inputs * 2

    with engine(Picky(), torch.zeros(1, 4), check_accuracy=False) as running:
        futures = [running.submit(torch.full((1, 4), float(value))) for value in range(20)]
        for value, future in enumerate(futures):
            if value == 13:
                with pytest.raises(ValueError, match="thirteen"):
                    future.result(WAIT_S)
            else:
                assert future.result(WAIT_S)[0, 0] == 2 * value


def test_before_and_after_it_runs_requests_are_refused_and_stopping_twice_is_fine():
    stopped = engine()
    with pytest.raises(EngineStopped, match="use `with Engine"):
        stopped.infer(torch.randn(1, 4))
    with stopped:
        assert stopped.infer(torch.randn(1, 4)).shape == (1, 2)
    stopped.stop()
    with pytest.raises(EngineStopped):
        stopped.report  # noqa: B018


def test_stopping_answers_what_was_taken():
    running = engine()
    running.start()
    futures = [running.submit(torch.randn(3, 4)) for _ in range(50)]
    running.stop()
    assert all(future.result(0).shape == (3, 2) for future in futures)


def test_the_callers_model_is_left_as_it_was():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with engine(model, torch.randn(1, 3, 8, 8), precision="bf16") as running:
        assert running.report.accuracy.max_relative_error > 0
        assert (
            "batch norm folded (1 times)" in running.report.applied or "batch norm folded (1)" in running.report.applied
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: engine(example=torch.randn(2, 5)), ModelError, "the model fails on the example inputs"),
        (lambda: engine(buckets=(4, 2)), InvalidOption, "ascending"),
        (
            lambda: engine(device="cuda") if not torch.cuda.is_available() else engine(device="cuda:99"),
            DeviceUnavailable,
            "--device",
        ),
    ],
    ids=["example", "buckets", "device"],
)
def test_what_cannot_start_says_why(make, error, message):
    with pytest.raises(error, match=message):
        make().start()


def test_a_model_whose_steps_it_would_leave_out_is_refused():
    described = Described(torch.nn.Linear(2, 1), example={"x": b"12"}, inputs={"x": Bytes(max_bytes=8)}, preprocess=len)
    with pytest.raises(InvalidOption, match="only headrace serve runs"):
        Engine(described, torch.randn(1, 2)).start()


def test_the_package_names_what_it_offers():
    assert headrace.Engine is Engine
    assert headrace.EngineConfig is EngineConfig
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        headrace.Motor  # noqa: B018
