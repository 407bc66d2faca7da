import copy
import threading

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from headrace.errors import ModelError
from headrace.model.checkpoint import make_random_checkpoint
from headrace.model.fused import ConvAddRelu, ConvRelu
from headrace.model.optimise import (
    ErrorReport,
    Normalise,
    OptimiseConfig,
    accuracy_rows,
    measure_error,
    optimise,
    require_accuracy,
    tolerance,
)
from headrace.model.stem import SpaceToDepth

IMAGENET = Normalise(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
EVERYTHING = {"fuse_epilogues": True, "stem": "space-to-depth", "pointwise_as_matmul": True}
PRECISIONS = ("float32", "tf32", "bf16", "fp16")
QUANTISED = ("int8", "fp8")


def frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory) -> nn.Module:
    path = tmp_path_factory.mktemp("models") / "random.pth"
    make_random_checkpoint("resnet18", path, 0)
    model = get_model("resnet18")
    model.load_state_dict(torch.load(path, weights_only=True))
    return frozen(model)


def images(rows: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (rows, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_hand(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(IMAGENET.mean), torch.tensor(IMAGENET.std)
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 5)]
    return frozen(nn.Sequential(*layers))


class Encoder(nn.Module):
    """Token ids and a mask to a dictionary: the form of a transformer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids, weights, mask=None):
        states = self.layer(self.embedding(ids), src_key_padding_mask=mask) * weights[..., None]
        logits = self.head(states.mean(1))
        return {"logits": logits, "states": (states.transpose(1, 2),), "label": logits.argmax(1), "seen": ids}


class Branching(nn.Module):
    """Cannot be traced: what it does depends on values."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) if x.sum() > 0 else self.conv(-x).mean((2, 3))


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("normalise", [None, IMAGENET], ids=["float32 images", "uint8 images"])
def test_resnet18_with_everything_on_answers_as_the_eager_model(resnet18, precision, normalise):
    optimised = optimise(resnet18, OptimiseConfig(precision=precision, normalise=normalise, **EVERYTHING))
    pixels = images(4, 64)
    rows = pixels if normalise else by_hand(pixels)
    report = measure_error(optimised.module, resnet18, [rows], normalise=normalise)
    require_accuracy(report, precision)
    assert optimised.skipped == ()
    assert (report.rows, report.reference) == (4, "float64")
    assert report.top1_agreement == 1.0 or precision in ("bf16", "fp16")
    rounding = {"float32": 2**-24, "tf32": 2**-24, "bf16": 2**-8, "fp16": 2**-11}[precision]  # a CPU knows no TF32
    assert report.max_relative_error < 60 * rounding
    assert 0 < report.mean_relative_error <= report.max_relative_error


def test_what_was_done_to_resnet18_is_said_and_seen(resnet18):
    optimised = optimise(resnet18, OptimiseConfig(precision="bf16", normalise=IMAGENET, **EVERYTHING))
    assert optimised.applied == (
        "batch norm folded (20)",
        "space to depth (1)",
        "strided 1x1 convolutions as matrix products (3)",
        "epilogues fused (17)",
        "computed in bf16",
        "channels last",
        "uint8 images normalised on the device",
    )
    kinds = [type(module) for module in optimised.module.modules()]
    counts = {kind: kinds.count(kind) for kind in (SpaceToDepth, ConvRelu, ConvAddRelu, nn.BatchNorm2d, nn.ReLU)}
    assert counts == {SpaceToDepth: 1, ConvRelu: 9, ConvAddRelu: 8, nn.BatchNorm2d: 0, nn.ReLU: 0}
    parameters = list(optimised.module.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in parameters)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in parameters if p.ndim == 4)
    assert not any(module.training for module in optimised.module.modules())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_model_itself_is_not_changed(precision):
    model = small_cnn()
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    optimise(model, OptimiseConfig(precision=precision, normalise=IMAGENET, **EVERYTHING))
    assert [type(module) for module in model.modules()] == kinds
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert (value.dtype, value.stride()) == (before[name].dtype, before[name].stride())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_module_can_be_compiled_as_one_graph(precision):
    module = optimise(small_cnn(), OptimiseConfig(precision=precision, normalise=IMAGENET, **EVERYTHING)).module
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images(2, 16)), module(images(2, 16)))


def test_inputs_by_name_are_compiled_as_well():
    module = optimise(frozen(Encoder()), OptimiseConfig(precision="bf16")).module
    inputs = {"ids": torch.arange(6).reshape(2, 3), "weights": torch.rand(2, 3)}
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), module(**inputs))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_uint8_images_are_normalised_as_by_hand(precision, channels_last):
    pixels, first = images(3, 16), frozen(nn.Sequential(nn.Conv2d(3, 3, 1, bias=False)))
    nn.init.dirac_(first[0].weight)  # what goes in comes out
    config = OptimiseConfig(precision=precision, channels_last=channels_last, normalise=IMAGENET)
    normalised = optimise(first, config).module(pixels)
    expected = by_hand(pixels)
    expected = expected.half().float() if precision == "fp16" else expected
    torch.testing.assert_close(normalised, expected, rtol=2e-3 if precision == "fp16" else 1e-6, atol=1e-6)
    assert normalised.is_contiguous()


def test_zeros_around_uint8_images_are_zeros_after_normalising():
    model = small_cnn()
    config = OptimiseConfig(precision="float32", normalise=IMAGENET, **EVERYTHING)
    torch.testing.assert_close(optimise(model, config).module(images(2, 16)), model(by_hand(images(2, 16))))


def test_other_uint8_inputs_and_float_images_are_left_to_the_model():
    config = OptimiseConfig(precision="float32", normalise=IMAGENET)
    module = optimise(frozen(nn.Identity()), config).module
    for tensor in (images(2, 4)[..., 0], images(2, 4)[..., :1], torch.randn(2, 3, 4, 4)):
        assert torch.equal(module(tensor), tensor)


def test_convolutions_get_their_images_channels_last():
    optimised = optimise(small_cnn(), OptimiseConfig(precision="bf16"))
    seen = []
    optimised.module.get_submodule("model.0").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    optimised.module(torch.randn(2, 3, 16, 16))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert seen[0].dtype == torch.bfloat16


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", ["positional", "named"])
def test_a_transformer_of_several_inputs_and_outputs_keeps_its_form(precision, form):
    torch.manual_seed(0)
    model = frozen(Encoder())
    ids, weights, mask = torch.arange(6).reshape(2, 3), torch.rand(2, 3), torch.tensor([[False, False, True]] * 2)
    inputs = [ids, weights, mask] if form == "positional" else {"mask": mask, "weights": weights, "ids": ids}
    optimised = optimise(model, OptimiseConfig(precision=precision, **EVERYTHING))
    answers = optimised.module(*inputs) if form == "positional" else optimised.module(**inputs)
    assert list(answers) == ["logits", "states", "label", "seen"]
    assert answers["logits"].dtype == answers["states"][0].dtype == torch.float32
    assert answers["states"][0].is_contiguous()
    assert answers["label"].dtype == torch.int64
    assert torch.equal(answers["seen"], ids)
    require_accuracy(measure_error(optimised.module, model, inputs), precision)


def test_a_model_without_convolutions_is_only_cast():
    model = frozen(Encoder())
    optimised = optimise(model, OptimiseConfig(precision="bf16", **EVERYTHING))
    assert optimised.applied == ("computed in bf16",)
    assert [reason.split(": ") for reason in optimised.skipped] == [
        [
            "batch norm not folded, space to depth not applied, no strided 1x1 convolution made a matrix product,"
            " epilogues not fused",
            "the model has no convolution",
        ]
    ]
    assert [type(module) for module in optimised.module.modules()][1:] == [type(module) for module in model.modules()]


def test_a_model_that_cannot_be_traced_is_served_without_the_rewrites():
    model = frozen(Branching())
    optimised = optimise(model, OptimiseConfig(precision="float32", **EVERYTHING))
    (reason,) = optimised.skipped
    assert "torch.fx cannot trace the model (TraceError" in reason
    for rows in (torch.rand(2, 3, 8, 8), -torch.rand(2, 3, 8, 8)):
        torch.testing.assert_close(optimised.module(rows), model(rows))


def test_rewrites_that_find_nothing_say_what_they_looked_for():
    model = frozen(nn.Sequential(nn.Conv2d(8, 4, 3), nn.Sigmoid()))
    optimised = optimise(model, OptimiseConfig(precision="float32", **EVERYTHING))
    assert type(optimised.module.model) is nn.Sequential  # not a graph without a gain
    assert [reason.split(": ")[0] for reason in optimised.skipped] == [
        "batch norm not folded",
        "space to depth not applied",
        "no strided 1x1 convolution made a matrix product",
        "epilogues not fused",
    ]


def test_rewrites_that_are_off_are_neither_applied_nor_skipped():
    optimised = optimise(small_cnn(), OptimiseConfig(precision="float32", fold_batch_norm=False, channels_last=False))
    assert (optimised.applied, optimised.skipped) == (("computed in float32",), ())
    assert any(isinstance(module, nn.BatchNorm2d) for module in optimised.module.modules())


def with_weight(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
    nn.init.constant_(model[1].weight, value)
    return frozen(model)


@pytest.mark.parametrize("value", [65520.0, -70000.0])
def test_weights_beyond_fp16_are_refused_with_their_name_and_the_remedy(value):
    with pytest.raises(ModelError, match=rf"1\.weight holds values up to {abs(value):.0f}.*65504.*bf16"):
        optimise(with_weight(value), OptimiseConfig(precision="fp16"))
    optimise(with_weight(value), OptimiseConfig(precision="bf16"))


def test_weights_that_folding_makes_too_large_are_refused():
    model = frozen(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)))
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.constant_(model[1].running_var, 1e-12)
    with pytest.raises(ModelError, match=r"0\.weight holds values up to 1e\+06"):
        optimise(model, OptimiseConfig(precision="fp16"))


@pytest.mark.parametrize("value", [65504.0, float("inf")], ids=["the largest", "infinite on purpose"])
def test_weights_that_fp16_can_hold_are_not_refused(value):
    optimise(with_weight(value), OptimiseConfig(precision="fp16"))


def test_masks_may_become_infinite():
    model = frozen(nn.Linear(1, 1))
    model.register_buffer("mask", torch.tensor([-1e9]))
    assert optimise(model, OptimiseConfig(precision="fp16")).module.model.mask.item() == -float("inf")


def test_complex_parameters_are_not_cut_in_half():
    model = nn.Module()
    model.register_buffer("phases", torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ModelError, match="phases is complex"):
        optimise(model, OptimiseConfig(precision="bf16"))


def test_a_model_that_cannot_be_copied_is_refused():
    with pytest.raises(ModelError, match="cannot be copied"):
        optimise(Uncopyable(), OptimiseConfig(precision="float32"))


def test_a_convolution_of_three_dimensions_stays_beside_one_of_two():
    model = frozen(nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.Flatten(1, 2), nn.Conv2d(4, 1, 3)))
    rows = torch.randn(2, 1, 4, 8, 8)
    torch.testing.assert_close(optimise(model, OptimiseConfig(precision="float32")).module(rows), model(rows))


LINEAR = frozen(nn.Linear(3, 3, bias=False))
nn.init.eye_(LINEAR.weight)
UNIT_ROWS = torch.eye(3)[:2]


def test_the_error_is_relative_to_each_row_and_the_worst_counts():
    report = measure_error(lambda x: x * torch.tensor([[1.25], [1.75]]), LINEAR, [UNIT_ROWS * 1000])
    assert report == ErrorReport(
        max_relative_error=0.75, mean_relative_error=0.5, top1_agreement=1.0, rows=2, reference="float64"
    )


def test_the_worst_output_counts():
    class Two(nn.Module):
        def forward(self, x):
            return x, {"other": x.sum(1), "label": x.argmax(1)}

    report = measure_error(lambda x: (x, {"other": 1.5 * x.sum(1), "label": x.argmin(1)}), Two(), [UNIT_ROWS])
    assert (report.max_relative_error, report.top1_agreement) == (0.5, None)


def test_top1_agreement_is_a_share_of_the_rows():
    report = measure_error(lambda x: x[:1].expand(2, 3), LINEAR, [UNIT_ROWS])
    assert report.top1_agreement == 0.5


def test_zero_where_zero_is_due_is_no_error():
    assert measure_error(LINEAR, LINEAR, [torch.zeros(2, 3)]).max_relative_error == 0.0


def test_models_that_return_labels_only_are_compared_by_those():
    class Labels(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    assert measure_error(lambda x: x.argmax(1), Labels(), [UNIT_ROWS]).max_relative_error == 0.0
    assert measure_error(lambda x: x.argmax(1) + 1, Labels(), [UNIT_ROWS]).max_relative_error > 0.5


def test_a_model_that_cannot_compute_in_float64_is_its_own_reference():
    class Float32Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x.to(torch.float32))

    model = frozen(Float32Only())
    report = measure_error(model, model, [UNIT_ROWS])
    assert (report.max_relative_error, report.reference) == (0.0, "float32")
    optimised = optimise(model, OptimiseConfig(precision="bf16"))
    with pytest.raises(ModelError, match="cannot be run as optimised"):
        measure_error(optimised.module, model, [UNIT_ROWS])


@pytest.mark.parametrize(
    ("optimised", "message"),
    [
        (lambda x: x[:, :2], r"\[\[2, 2\]\] where the model's are \[\[2, 3\]\]"),
        (lambda x: (x, x), r"where the model's are \[\[2, 3\]\]"),
        (lambda x: None, "no tensor"),
    ],
    ids=["shape", "number", "nothing"],
)
def test_answers_of_another_form_are_refused(optimised, message):
    with pytest.raises(ModelError, match=message):
        measure_error(optimised, LINEAR, [UNIT_ROWS])


def test_outputs_without_a_row_for_each_row_are_refused():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(0)

    with pytest.raises(ModelError, match="a row for each"):
        measure_error(Mean(), Mean(), [UNIT_ROWS])


def report_of(error: float, agreement: float | None = None) -> ErrorReport:
    return ErrorReport(
        max_relative_error=error, mean_relative_error=error, top1_agreement=agreement, rows=128, reference="float64"
    )


@pytest.mark.parametrize("precision", [*PRECISIONS, *QUANTISED])
def test_errors_up_to_the_tolerance_pass_and_larger_ones_do_not(precision):
    limit = tolerance(precision)
    require_accuracy(report_of(limit), precision)
    for error in (limit * 1.001, float("nan"), float("inf")):
        with pytest.raises(ModelError, match=f"{limit:.2g} is allowed; "):
            require_accuracy(report_of(error), precision)


def test_coarser_precisions_are_allowed_more():
    assert tolerance("float32") < tolerance("tf32") == tolerance("fp16") < tolerance("bf16")
    assert tolerance("bf16") < tolerance("int8") < tolerance("fp8") < 0.5


@pytest.mark.parametrize("precision", QUANTISED)
def test_in_8_bits_the_best_class_must_be_float32s_in_99_of_100_rows(precision):
    for agreement in (None, 1.0, 127 / 128, 0.99):
        require_accuracy(report_of(0.01, agreement), precision)
    with pytest.raises(ModelError, match=rf"in {precision}, .* 98\.4% of 128 rows, and 99% is needed; use .* bf16"):
        require_accuracy(report_of(0.01, 126 / 128), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_more_bits_the_error_alone_decides(precision):
    require_accuracy(report_of(tolerance(precision), 0.5), precision)


def test_one_row_in_a_hundred_can_be_seen_where_it_matters():
    assert [accuracy_rows(precision) >= 100 for precision in (*PRECISIONS, *QUANTISED)] == [False] * 4 + [True] * 2


def test_activations_beyond_fp16_are_found():
    model = frozen(nn.Sequential(nn.Linear(1, 1, bias=False)))
    nn.init.constant_(model[0].weight, 60000.0)
    module = optimise(model, OptimiseConfig(precision="fp16")).module
    with pytest.raises(ModelError, match=r"wrong by (inf|nan)"):
        require_accuracy(measure_error(module, model, [torch.full((1, 1), 2.0)]), "fp16")
