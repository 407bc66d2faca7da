from pathlib import Path

import pytest
import torch

from headrace.errors import CheckpointError, ModelError
from headrace.model import efficientnet_lite0
from headrace.model.efficientnet_lite0 import category_names, import_extra, match_by_order

PATH = Path("weights.pth")


def test_it_knows_a_cat(photographs):
    with torch.inference_mode():
        best = efficientnet_lite0.build().eval()(photographs(224)).argmax(dim=1)
    names = category_names()
    assert len(names) == 1000
    assert "cat" in names[best[0]]  # chelsea
    assert names[best[1]] in ("espresso", "cup")


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}


def test_names_are_matched_by_order():
    theirs = {"_a.weight": torch.ones(2), "_a.bias": torch.zeros(2)}
    matched = match_by_order(theirs, tensors(b__weight=(2,), b__bias=(2,)), PATH)
    assert list(matched) == ["b.weight", "b.bias"]
    assert torch.equal(matched["b.weight"], torch.ones(2))


@pytest.mark.parametrize(
    ("theirs", "part"),
    [
        pytest.param(tensors(a__weight=(2,)), "1 tensors where the model has 2", id="too few"),
        pytest.param(tensors(a__weight=(3,), a__bias=(2,)), r"a.weight \[3\] stands where b.weight \[2\]", id="shape"),
        pytest.param(tensors(a__bias=(2,), a__weight=(2,)), "a.bias .* stands where b.weight", id="order"),
    ],
)
def test_weights_that_do_not_match_are_refused(theirs, part):
    with pytest.raises(CheckpointError, match=part):
        match_by_order(theirs, tensors(b__weight=(2,), b__bias=(2,)), PATH)


def test_a_missing_package_is_named_with_the_remedy():
    with pytest.raises(ModelError, match=r"no_such_package.*pip install 'headrace\[photos\]'"):
        import_extra("no_such_package")
