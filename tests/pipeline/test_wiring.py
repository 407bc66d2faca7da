"""From a model to lanes on the host: prepared for every bucket before they serve, and watched for what comes later."""

import pytest
import torch

from headrace.config import LanesConfig
from headrace.errors import ModelError
from headrace.pipeline.wiring import LaneBuilder

BUCKETS = (1, 4)


class Remembers(torch.nn.Module):
    """Doubles its input; `sizes` are the rows that it was called with."""

    def __init__(self, error=None):
        super().__init__()
        self.sizes = []
        self.error = error

    def forward(self, inputs):
        self.sizes.append(len(inputs))
        if self.error:
            raise self.error
        return (inputs * 2,)


def builder(model, *, compile=False, lanes=2, marks=None):  # noqa: A002  as its field
    return LaneBuilder(
        model=model,
        example=[torch.ones(3, 5)],
        device=torch.device("cpu"),
        num_lanes=lanes,
        compile=compile,
        config=LanesConfig(buckets=BUCKETS),
        mark=(marks if marks is not None else []).append,
    )


def test_lanes_on_the_host_are_warm_for_every_bucket_before_they_serve():
    model, marks = Remembers(), []
    lanes = builder(model, marks=marks).build()
    assert set(model.sizes) == set(BUCKETS)
    assert (len(lanes.lanes), lanes.form, lanes.notes) == (2, "host", ())
    assert marks == ["warm-up", "lanes"]
    lanes.close()


def test_a_compilation_after_the_lanes_were_ready_is_noticed():
    lanes = builder(Remembers()).build()
    assert lanes.recompiles() == 0
    torch.compile(lambda inputs: inputs + 1, backend="eager")(torch.ones(2))
    assert lanes.recompiles() == 1
    lanes.close()


def test_a_model_that_cannot_be_compiled_runs_uncompiled_and_says_why():
    class LooksAtData(torch.nn.Module):
        def forward(self, inputs):
            return (inputs * 2,) if inputs.sum().item() > 0 else (inputs,)

    marks = []
    lanes = builder(LooksAtData(), compile=True, marks=marks).build()
    assert lanes.form == "host"
    (note,) = lanes.notes
    assert note.startswith("the model cannot be compiled, so it runs uncompiled (")
    assert marks == ["compile", "lanes"]
    lanes.close()


def test_a_model_that_fails_on_the_example_is_told_as_such():
    with pytest.raises(ModelError, match="bad weights"):
        builder(Remembers(error=ValueError("bad weights"))).build()
