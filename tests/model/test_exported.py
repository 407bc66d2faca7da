import pytest
import torch
from torch import nn

from headrace.config import ModelConfig
from headrace.errors import ModelError
from headrace.model.load import load_model
from headrace.model.optimise import OptimiseConfig, measure_error, optimise
from headrace.model.source import resolve


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, image, scale):
        return {"means": self.norm(self.convolution(image)).mean((2, 3)) * scale}


def exported(path, model, example, dynamic_shapes):
    torch.export.save(torch.export.export(model.eval(), example, dynamic_shapes=dynamic_shapes), path)
    return str(path)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory):
    rows = torch.export.Dim("rows", min=1, max=64)
    path = tmp_path_factory.mktemp("exported") / "scaled.pt2"
    model = Scaled()
    example = (torch.randn(2, 3, 8, 8), torch.ones(2, 1))
    return model, exported(path, model, example, {"image": {0: rows}, "scale": {0: rows}})


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_program_answers_as_the_model_did_whatever_the_rows(scaled, rows):
    model, path = scaled
    loaded = load_model(ModelConfig(name=path), None, torch.device("cpu"), lambda _: None)
    inputs = {"image": torch.randn(rows, 3, 8, 8), "scale": torch.rand(rows, 1)}
    torch.testing.assert_close(loaded(**inputs)["means"], model(**inputs)["means"])
    assert torch.equal(loaded(*inputs.values())["means"], loaded(**inputs)["means"])


def test_its_example_inputs_have_the_names_of_the_models_own(scaled):
    example = resolve(scaled[1]).example_inputs(224)
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == {"image": (2, 3, 8, 8), "scale": (2, 1)}


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-5), ("bf16", 5e-2)])
def test_it_is_made_ready_for_the_lanes_as_any_other(scaled, precision, limit):
    source = resolve(scaled[1])
    model = source.build().eval()
    module = optimise(model, OptimiseConfig(precision=precision)).module
    assert measure_error(module, model, source.example_inputs(224)).max_relative_error < limit


def test_a_program_of_a_fixed_number_of_rows_is_refused_with_what_to_do(tmp_path):
    path = exported(tmp_path / "fixed.pt2", nn.Linear(3, 2), (torch.zeros(2, 3),), None)
    with pytest.raises(ModelError, match=r"input input has a fixed number of rows; export with dynamic_shapes"):
        resolve(path)


@pytest.mark.parametrize("content", [None, b"no archive"], ids=["missing", "another file"])
def test_a_file_that_is_no_program_is_refused(tmp_path, content):
    path = tmp_path / "damaged.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"damaged\.pt2: (there is no such file|no exported program)"):
        resolve(str(path))
