"""`headrace limits` on a real GPU: every limit is there and the smallest binds. Skipped where there is none."""

import pytest
import torch

from headrace.bench.limits import STREAMS
from tests.bench.test_limits import read_report
from tests.commands import model_file, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_every_limit_of_a_gpu_is_measured(tmp_path):
    options = ("--device", "cuda", "--image-size", "48", "--precision", "bf16", "--output-dir", "out")
    ended = run("limits", *options, "--model", model_file(tmp_path), cwd=tmp_path)
    assert ended.code == 0, ended.err
    report = read_report(tmp_path / "out")
    assert report.form == "CUDA graphs"
    assert [batch.measured.bucket for batch in report.batches] == [1, 32, 256]
    for batch in report.batches:
        assert tuple(batch.measured.forward_samples_per_s) == STREAMS
        assert set(batch.samples_per_s) == {"compute", "copy in", "copy out", "host memory", "ring messages"}
        assert batch.binding.samples_per_s == min(batch.samples_per_s.values()) > 0
    assert "Copies between pinned memory and the device" in ended.out
