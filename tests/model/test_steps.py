from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace
from torchvision.transforms import functional as transforms

from headrace.model.optimise import OptimiseConfig, measure_error, optimise, require_accuracy
from headrace.model.source import resolve
from headrace.model.steps import IMAGENET_MEAN, IMAGENET_STD, FromImages, TopLabels

EXAMPLE = Path(__file__).parents[2] / "examples" / "resnet18_labels.py"


def some_images(side=40):
    return torch.randint(0, 256, (3, side, side + 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_images_become_what_torchvisions_transforms_make_of_them():
    images = some_images()
    planes = images.permute(0, 3, 1, 2).float() / 255
    expected = transforms.normalize(
        transforms.resize(planes, [32, 32], antialias=True), list(IMAGENET_MEAN), list(IMAGENET_STD)
    )
    torch.testing.assert_close(FromImages(32)(images), expected, atol=1e-5, rtol=1e-5)


def test_a_module_in_16_bits_normalises_exactly_and_rounds_once():
    images = some_images()
    exact = FromImages(32)(images)
    assert torch.equal(FromImages(32).to(torch.bfloat16)(images), exact.to(torch.bfloat16))
    traced = symbolic_trace(FromImages(32)).to(torch.bfloat16)
    assert torch.equal(traced(images), exact.to(torch.bfloat16)), "also when it was traced before"


def test_the_likeliest_labels_come_first_with_their_probabilities():
    top = TopLabels(2)(torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]]))
    assert top["labels"][:, 0].tolist() == [1, 0]
    assert top["labels"].dtype == torch.int64
    torch.testing.assert_close(top["scores"][0], torch.tensor([0.0, 3.0, 1.0]).softmax(0)[[1, 2]])


def test_rows_do_not_depend_on_each_other():
    images = some_images()
    steps = nn.Sequential(FromImages(8), nn.Flatten(), TopLabels(5))
    together = steps(images)
    for row, image in enumerate(images):
        alone = steps(image[None])
        assert torch.equal(alone["labels"][0], together["labels"][row])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_example_is_served_as_any_model(precision):
    source = resolve(f"{EXAMPLE}:build")
    model = source.build().eval()
    example = source.example_inputs(224)
    optimised = optimise(model, OptimiseConfig(precision=precision))
    require_accuracy(measure_error(optimised.module, model, example), precision)
    answer = optimised.module(*example)
    assert {name: list(tensor.shape) for name, tensor in answer.items()} == {"labels": [2, 5], "scores": [2, 5]}


def test_images_of_the_right_size_are_not_resized_and_come_out_as_if_they_were():
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    resized = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2).float(), (8, 8), mode="bilinear", antialias=True
    )
    assert torch.equal(resized, images.permute(0, 3, 1, 2).float())
    steps = FromImages(8, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(steps(images), resized / 255)
