import subprocess
import sys

import pytest
import torch
from torch import nn

from headrace import Engine
from headrace.errors import DeviceUnavailable, ModelError
from headrace.model.compiled import kept_programs
from headrace.model.optimise import OptimiseConfig, measure_error, optimise, require_accuracy, tolerance
from headrace.model.quantise import Int8Linear, quantise_linears, require_fp8
from headrace.model.signature import FlatModel

INT8 = OptimiseConfig(precision="int8")
WAIT_S = 60


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(requires_grad=False)


def perceptron() -> nn.Module:
    """Two layers that are large enough, and one that is not."""
    torch.manual_seed(0)
    return frozen(nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 4, 1024, batch_first=True)
    return frozen(nn.TransformerEncoder(layer, 2))


def clear_rows(model: nn.Module, rows: int) -> torch.Tensor:
    """Return the rows of much noise whose best class is the furthest ahead of the second."""
    noise = torch.randn(16 * rows, 512, generator=torch.Generator().manual_seed(1))
    best = model(noise).topk(2, dim=1).values
    return noise[(best[:, 0] - best[:, 1]).topk(rows).indices]


def relative(answer: torch.Tensor, expected: torch.Tensor) -> float:
    return float((answer - expected).norm() / expected.norm())


def test_large_linear_layers_are_quantised_and_the_rest_is_bf16():
    optimised = optimise(perceptron(), INT8)
    assert optimised.applied == ("2 linear layers in int8, the rest in bf16",)
    kinds = [type(part) for part in optimised.module.modules() if isinstance(part, nn.Linear)]
    assert kinds == [Int8Linear, Int8Linear, nn.Linear]
    assert optimised.module.model[4].weight.dtype == torch.bfloat16
    assert optimised.module.model[0].weight.qdata.dtype == torch.int8


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(512, 496), nn.Linear(496, 512), nn.Linear(512, 1000), nn.Bilinear(512, 512, 512)],
    ids=["small outputs", "small inputs", "no multiple of 16", "another kind"],
)
def test_a_model_without_a_large_linear_layer_is_bf16_and_says_so(layer):
    optimised = optimise(frozen(layer), INT8)
    assert optimised.applied == ("computed in bf16",)
    assert optimised.skipped[-1] == (
        "nothing computed in int8: no nn.Linear has both sizes at least 512 and multiples of 16"
    )


def test_a_model_that_is_one_linear_layer_is_quantised():
    assert optimise(frozen(nn.Linear(512, 512)), INT8).applied == ("1 linear layer in int8, the rest in bf16",)


def test_a_layer_that_is_used_twice_is_quantised_once():
    layer = nn.Linear(512, 512)
    model = frozen(nn.Sequential(layer, nn.Tanh(), layer))
    optimised = optimise(model, INT8)
    assert optimised.applied == ("1 linear layer in int8, the rest in bf16",)
    rows = torch.randn(4, 512)
    assert relative(optimised.module(rows), model(rows)) < 0.05


def test_layers_that_share_a_weight_are_both_quantised():
    first, second = nn.Linear(512, 512), nn.Linear(512, 512)
    second.weight = first.weight
    optimised = optimise(frozen(nn.Sequential(first, second)), INT8)
    assert optimised.applied == ("2 linear layers in int8, the rest in bf16",)


def test_a_class_of_its_own_stays_as_it_is():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.abs().amax()

    assert quantise_linears(frozen(Scaled(512, 512).to(torch.bfloat16)), "int8") == 0


def test_the_model_itself_is_not_changed():
    model = perceptron()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimise(model, INT8)
    assert all(type(part) is not Int8Linear for part in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_answers_are_float32s_up_to_what_8_bits_round():
    model = perceptron()
    report = measure_error(optimise(model, INT8).module, model, [clear_rows(model, 128)])
    require_accuracy(report, "int8")
    assert (report.rows, report.top1_agreement) == (128, 1.0)
    assert 2**-8 < report.max_relative_error < 8 * 2**-7


def test_a_transformer_encoder_is_quantised_but_for_its_attentions_projections():
    model = encoder()
    optimised = optimise(model, INT8)
    assert optimised.applied == ("4 linear layers in int8, the rest in bf16",)
    report = measure_error(optimised.module, model, [torch.randn(8, 5, 512)])
    require_accuracy(report, "int8")
    assert report.max_relative_error < 8 * 2**-7


@pytest.mark.parametrize("shape", [(1, 512), (31, 512), (32, 512), (3, 5, 512), (512,)], ids=str)
def test_filling_rows_up_changes_no_answer(shape):
    layer = frozen(nn.Linear(512, 1024).to(torch.bfloat16))
    quantise_linears(layer, "int8")
    given = torch.randn(shape, dtype=torch.bfloat16)
    expected = layer(given)
    layer.least_rows = 32
    assert torch.equal(layer(given), expected)
    assert expected.shape == (*shape[:-1], 1024)


def test_compiled_as_one_graph_it_answers_alike():
    module = optimise(perceptron(), INT8).module
    rows = torch.randn(4, 512)
    expected = module(rows)
    assert relative(torch.compile(module, fullgraph=True, dynamic=False)(rows), expected) < 0.02


@pytest.mark.parametrize("compiled", [False, True], ids=["uncompiled", "compiled"])
def test_a_transformer_encoder_with_a_mask_answers_alike(compiled):
    model = encoder()
    module = optimise(model, INT8).module
    rows = torch.randn(2, 3, 512)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    expected = model(rows, src_key_padding_mask=padding)
    run = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
    answer = run(rows, src_key_padding_mask=padding)
    assert answer.shape == expected.shape
    assert relative(answer[~padding], expected[~padding]) < 8 * 2**-7


def test_compiled_programs_are_kept_and_found_again(tmp_path):
    inputs = {rows: [torch.randn(rows, 512)] for rows in (1, 4)}
    first = FlatModel(optimise(perceptron(), INT8).module, None)
    assert kept_programs(first, inputs, tmp_path, tolerance("int8"))[1] == 2
    again = FlatModel(optimise(perceptron(), INT8).module, None)
    programs, made = kept_programs(again, inputs, tmp_path, tolerance("int8"))
    assert made == 0
    for given in inputs.values():
        assert relative(programs(*given)[0], again(*given)[0]) < 0.02


@pytest.mark.parametrize("options", [{}, {"compile": True}], ids=["uncompiled", "compiled"])
def test_an_engine_of_several_lanes_serves_it(options):
    model = perceptron()
    rows = clear_rows(model, 128)
    with Engine(
        model, rows, device="cpu", precision="int8", num_lanes=2, max_batch_size=8, buckets=(1, 8), **options
    ) as running:
        futures = [running.submit(rows[at : at + size]) for at, size in ((0, 1), (3, 8), (20, 30), (60, 2))]
        answers = torch.cat([future.result(WAIT_S) for future in futures])
        report, recompiles = running.report, running.recompiles
    expected = model(torch.cat([rows[:1], rows[3:11], rows[20:50], rows[60:62]]))
    assert relative(answers, expected) < 8 * 2**-7
    assert recompiles == 0
    assert report.applied == ("2 linear layers in int8, the rest in bf16",)
    assert report.notes[1:] == ()  # the first: no batch norm was folded
    assert report.accuracy.rows == 128


def test_an_engine_keeps_its_programs(tmp_path):
    model = perceptron()
    rows = clear_rows(model, 128)
    options = {"device": "cpu", "precision": "int8", "buckets": (2,), "num_lanes": 2}
    with Engine(model, rows, compile=True, compile_cache=tmp_path, **options) as running:
        assert relative(running.infer(rows), model(rows)) < 8 * 2**-7
        assert running.report.notes[1:] == ()
    assert len(list(tmp_path.glob("*.program"))) == 1


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_gpus_that_multiply_fp8_are_let_through(capability):
    require_fp8(capability)


@pytest.mark.parametrize(
    ("capability", "words"), [(None, "this is a CPU"), ((8, 0), r"this GPU has 8\.0"), ((7, 5), r"this GPU has 7\.5")]
)
def test_other_devices_are_refused_with_the_remedy(capability, words):
    with pytest.raises(DeviceUnavailable, match=rf"fp8 needs .* 8\.9 or more.*{words}; use --precision int8 or bf16"):
        require_fp8(capability)


def test_fp8_on_a_cpu_is_refused():
    with pytest.raises(DeviceUnavailable, match="this is a CPU"):
        optimise(perceptron(), OptimiseConfig(precision="fp8"))
    with pytest.raises(DeviceUnavailable, match="this is a CPU"):
        Engine(perceptron(), torch.randn(1, 512), device="cpu", precision="fp8").start()


def test_without_torchao_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
    with pytest.raises(ModelError, match=r"int8 needs the package torchao .*pip install 'headrace\[quantised\]'"):
        optimise(perceptron(), INT8)


def test_torchao_is_imported_only_when_it_is_asked_for():
    code = """if True:
        import sys, torch
        from headrace.model.optimise import OptimiseConfig, optimise
        optimise(torch.nn.Linear(512, 512).eval(), OptimiseConfig(precision="bf16"))
        assert "torchao" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
