"""What a description means: its tensors, found out by its example, and what is wrong with one, in a sentence."""

import pytest
import torch
from torch import nn

from headrace.errors import InvalidRequest, ModelError
from headrace.model.described import Bytes, Described
from headrace.model.signature import FlatModel, signature_of
from headrace.pipeline.host_steps import host_steps, network_example
from headrace.tensors import BYTES, TensorSpec
from headrace.wire.elements import cells, fill_cells


class Scaled(nn.Module):
    def forward(self, values, scale):
        return {"scaled": values * scale, "whole": values.sum(1).long()}


def numbers(words, scale):
    return {"values": torch.tensor([float(word) for word in words]), "scale": scale}


def words(scaled, whole):
    return {"words": [f"{number:g}" for number in scaled.tolist()], "whole": whole}


GIVEN = {
    "inputs": {"words": Bytes(max_bytes=8, shape=(2,))},
    "preprocess": numbers,
    "outputs": {"words": Bytes(max_bytes=8, shape=(2,))},
    "postprocess": words,
    "example": {"words": ["1", b"2"], "scale": torch.ones(1)},
}


def described(**changes):
    return Described(Scaled(), **{**GIVEN, **changes})


def steps_of(description):
    example = network_example(description)
    signature = signature_of(description.network, example)
    answers = FlatModel(description.network, signature.names)(*signature.flatten(example))
    return host_steps(description, signature, answers)


def test_tensors_are_those_of_the_example():
    steps = steps_of(described())
    assert steps.inputs == (
        TensorSpec(name="words", dtype=BYTES, features=(2,), max_bytes=8),
        TensorSpec(name="scale", dtype="float32", features=(1,)),
    )
    assert [(spec.name, spec.features) for spec in steps.signature.inputs] == [("values", (2,)), ("scale", (1,))]
    assert steps.outputs == (
        TensorSpec(name="words", dtype=BYTES, features=(2,), max_bytes=8),
        TensorSpec(name="whole", dtype="int64", features=()),
    )


def test_a_row_goes_through_in_the_order_of_its_elements():
    steps = steps_of(described())
    row = [torch.zeros(spec.row_bytes, dtype=torch.uint8) for spec in steps.inputs[:1]] + [torch.tensor([3.0])]
    fill_cells(row[0].numpy().data, [b"10", b"20"], steps.inputs[0])
    prepared = [torch.empty(2), torch.empty(1)]
    assert steps.prepare(0, row, prepared) is None
    assert [tensor.tolist() for tensor in prepared] == [[10.0, 20.0], [3.0]]
    finished = [torch.zeros(steps.outputs[0].row_bytes, dtype=torch.uint8), torch.tensor(0)]
    assert steps.finish([torch.tensor([30.0, 60.0]), torch.tensor(30)], finished) is None
    assert [bytes(each) for each in cells(finished[0].numpy().data, steps.outputs[0])] == [b"30", b"60"]
    assert finished[1].item() == 30


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (ValueError("no"), InvalidRequest),
        (RuntimeError("no"), InvalidRequest),
        (OSError("no"), InvalidRequest),
        (torch.OutOfMemoryError("no"), ModelError),
        (TypeError("no"), ModelError),
    ],
)
def test_what_decoders_raise_is_the_clients_fault_and_all_else_the_models(raised, error):
    good = described()
    steps = steps_of(good)

    def fails(**_):
        raise raised

    good.preprocess = fails
    row = [torch.zeros(spec.row_bytes, dtype=torch.uint8) for spec in steps.inputs[:1]] + [torch.tensor([3.0])]
    assert type(steps.prepare(0, row, [torch.empty(2), torch.empty(1)])) is error


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"example": {}}, "the example has nothing that are no tensors, and inputs declare words"),
        ({"inputs": {}}, "the example has words that are no tensors, and inputs declare nothing"),
        ({"preprocess": None}, "input words is BYTES, which no network takes; give a preprocess"),
        ({"postprocess": None}, "output words is BYTES, which no network gives; give a postprocess"),
        ({"max_batch_size": 0}, "max_batch_size is 0; it must be 1 to 65536"),
        ({"max_queue_delay_us": -1}, "max_queue_delay_us is -1; it cannot be negative"),
        ({"max_rows": 3}, "a description takes no max_rows"),
        ({"example": {"words": ["1"], "scale": torch.ones(1)}}, "the example of words has 1 elements of up to 1 bytes"),
        ({"example": {"words": ["1", "2" * 9], "scale": torch.ones(1)}}, "declared are 2 of up to 8"),
        (
            {"example": {"words": ["1", 2], "scale": torch.ones(1)}},
            "an element of BYTES is int; it must be bytes or str",
        ),
        (
            {"example": {"words": ["x", "y"], "scale": torch.ones(1)}},
            "preprocess fails on the description's example: Val",
        ),
        ({"preprocess": lambda words, scale: "x"}, "preprocess returned str; it must return a tensor or a mapping"),
        ({"postprocess": lambda scaled, whole: [1]}, "postprocess returned list; it must return a mapping, with words"),
        (
            {"postprocess": lambda scaled, whole: {"x": whole}},
            "postprocess returned x; it must return a mapping, with w",
        ),
        ({"postprocess": lambda scaled: {}}, "postprocess fails on the network's answer to the example: TypeError"),
        ({"outputs": {}}, "tensor words of the description is list; declare it as Bytes, or make it a tensor"),
        (
            {"outputs": {"words": Bytes(max_bytes=1)}},
            "the example of words has 2 elements of up to 1 bytes; declared are 1 of up to 1",
        ),
    ],
)
def test_what_is_wrong_with_a_description_is_said(changes, told):
    with pytest.raises(ModelError, match=told):
        steps_of(described(**changes))


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_bytes": 1 << 31}, {"max_bytes": 1, "shape": (0,)}])
def test_elements_need_a_size(options):
    with pytest.raises(ModelError, match="must be"):
        Bytes(**options)


def test_a_network_that_takes_what_clients_send_needs_no_preprocess():
    description = Described(
        nn.Linear(3, 2), example={"input_0": torch.zeros(3)}, postprocess=lambda output: {"best": output.argmax()}
    )
    assert description.has_steps
    with pytest.raises(ModelError, match="the model fails on the example inputs"):
        steps_of(description)  # the network calls it `input`
    description.example = {"input": torch.zeros(3)}
    steps = steps_of(description)
    assert steps.outputs == (TensorSpec(name="best", dtype="int64", features=()),)
