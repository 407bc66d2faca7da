"""Precisions int8 and fp8 on a real GPU, compiled and captured. Skipped where there is none, or one without FP8."""

import pytest
import torch
from torch import nn

from headrace import Engine

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(CAPABILITY < (8, 9), reason="needs an NVIDIA GPU with FP8"),
]
BUCKETS = (1, 8, 32)
ALLOWED = {"int8": 0.06, "fp8": 0.2}  # 4 layers, two roundings each of 2^-7 or 2^-5: 2.2e-2 or 8.8e-2


def frozen(model: nn.Module) -> nn.Module:
    return model.cuda().eval().requires_grad_(requires_grad=False)


def perceptron() -> nn.Module:
    """Returns [rows, 1, 1024], which are no classes."""
    torch.manual_seed(0)
    return frozen(nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024), nn.Unflatten(1, (1, 1024))))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return frozen(nn.TransformerEncoder(nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True), 2))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize(
    ("make", "features", "layers"),
    [(perceptron, (1024,), 2), (encoder, (5, 1024), 4)],
    ids=["perceptron", "transformer encoder"],
)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "uncompiled"])
def test_it_is_captured_and_answers_near_float32(precision, make, features, layers, compiled):
    model, rows = make(), torch.randn(128, *features)
    options = {"device": "cuda", "precision": precision, "compile": compiled, "buckets": BUCKETS}
    with Engine(model, rows, num_lanes=2, **options) as running:
        answers = {size: running.infer(rows[:size]) for size in (1, 5, 17, 32, 128)}
        report, recompiles = running.report, running.recompiles
    assert report.form == "CUDA graphs"
    assert f"{layers} linear layers in {precision}, the rest in bf16" in report.applied
    assert report.accuracy.rows == 128
    assert recompiles == 0
    expected = model(rows.cuda()).cpu()
    for size, answer in answers.items():
        assert (answer - expected[:size]).norm() < ALLOWED[precision] * expected[:size].norm(), size


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_its_compiled_programs_are_kept(precision, tmp_path):
    model, rows = perceptron(), torch.randn(128, 1024)
    options = {"device": "cuda", "precision": precision, "compile": True, "buckets": (1, 32)}
    expected = model(rows.cuda()).cpu()
    for _ in range(2):
        with Engine(model, rows, num_lanes=2, compile_cache=tmp_path, **options) as running:
            assert not any("cannot be kept" in note for note in running.report.notes)
            assert (running.infer(rows) - expected).norm() < ALLOWED[precision] * expected.norm()
    assert len(list(tmp_path.glob("*.program"))) == 2


def test_a_model_on_the_host_is_quantised_on_the_gpu():
    model, rows = perceptron().cpu(), torch.randn(128, 1024)
    with Engine(model, rows, device="cuda", precision="fp8", buckets=(32,)) as running:
        assert (running.infer(rows) - model(rows)).norm() < ALLOWED["fp8"] * model(rows).norm()
    assert model[0].weight.device.type == "cpu"
