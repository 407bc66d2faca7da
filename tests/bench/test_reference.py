from pathlib import Path

import numpy as np
import pytest
import torch

from headrace.bench.reference import compute_reference
from headrace.config import ModelConfig
from headrace.errors import ModelError
from headrace.model.checkpoint import make_random_checkpoint

CPU = torch.device("cpu")
ROWS = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def model_of(folder: Path, forward: str) -> ModelConfig:
    """Write a model whose forward returns the given expression of x."""
    path = folder / "mine.py"
    path.write_text(
        "import torch\n\n"
        "class Mine(torch.nn.Module):\n"
        f"    def forward(self, x):\n        return {forward}\n\n"
        "def make():\n    return Mine()\n"
    )
    return ModelConfig(name=f"{path}:make")


@pytest.mark.parametrize("chunk", [1, 4, 10, 32])
def test_rows_are_answered_in_order_whatever_the_chunk(tmp_path, chunk):
    answers = compute_reference(model_of(tmp_path, "x.mean((2, 3))"), None, ROWS, CPU, chunk)
    assert (answers.dtype, answers.shape) == (np.float32, (10, 3))
    assert np.allclose(answers, ROWS.mean((2, 3)).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("forward", "shape"),
    [("x.sum((1, 2, 3))", (10,)), ("x.double()", (10, 3, 32, 32))],
    ids=["numbers", "float64"],
)
def test_answers_are_float32_of_any_shape(tmp_path, forward, shape):
    answers = compute_reference(model_of(tmp_path, forward), None, ROWS, CPU)
    assert (answers.dtype, answers.shape) == (np.float32, shape)


def test_a_torchvision_model_answers_a_row_alike_in_any_company(tmp_path):
    path = tmp_path / "random.pth"
    make_random_checkpoint("squeezenet1_1", path, 0)
    config = ModelConfig(name="squeezenet1_1")
    together = compute_reference(config, path, ROWS, CPU)
    alone = compute_reference(config, path, ROWS, CPU, chunk=1)
    assert together.shape == (10, 1000)
    assert np.allclose(together, alone, rtol=1e-3, atol=1e-4)


def test_a_compiled_configuration_is_answered_eagerly(tmp_path):
    config = model_of(tmp_path, "x.flatten(1) * (0 if torch.compiler.is_compiling() else 1)")
    compiled = ModelConfig(name=config.name, compile=True)
    assert compute_reference(compiled, None, ROWS, CPU).any()


@pytest.mark.parametrize(
    ("forward", "part"),
    [
        pytest.param("x @ x.nothing", "AttributeError", id="raises"),
        pytest.param("x.reshape(7, -1)", r"fails on rows of shape \[10, 3, 32, 32\]", id="does not suit the rows"),
        pytest.param("(x, x)", "returned a tuple of 2; it must return one tensor", id="a tuple"),
        pytest.param("{'logits': x}", "returned a dict of 1", id="a dictionary"),
        pytest.param("None", "returned a NoneType", id="nothing"),
        pytest.param("x.sum()", r"returned shape \[\] to 10 rows", id="one number for all"),
        pytest.param("x[:3]", r"returned shape \[3, 3, 32, 32\] to 10 rows", id="fewer rows"),
    ],
)
def test_a_model_that_does_not_answer_row_by_row_is_refused(tmp_path, forward, part):
    with pytest.raises(ModelError, match=part):
        compute_reference(model_of(tmp_path, forward), None, ROWS, CPU)
