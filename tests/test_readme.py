"""What the README tells a new user to type, typed."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def python_blocks():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_engine_in_ones_own_program_runs_as_shown(capsys):
    block, *more = (each for each in python_blocks() if "Client" not in each)  # those are tried in tests/client
    # Smaller images, and nothing compiled: a CPU takes minutes for what is shown.
    quick = block.replace("250, 250", "64, 64").replace("compile=True", 'compile=False, device="cpu"')
    assert quick.count("64, 64") == block.count("250, 250") == 3
    names = {}
    exec(compile(quick, README.name, "exec"), names)  # noqa: S102
    assert names["answers"].shape == (8, 1000)
    assert "torch.Size([100, 1000])" in capsys.readouterr().out
    for each in more:
        exec(compile(each, README.name, "exec"), {})  # noqa: S102
    assert names["model"](torch.randn(1, 3, 64, 64)).dtype == torch.float32, "the model is left as it was"
