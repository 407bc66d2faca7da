"""Compiled programs that are kept: made once, right with any weights, and never believed when they are stale."""

import shutil

import pytest
import torch
from torch import nn

from headrace.errors import InvalidOption
from headrace.model.compiled import NotKept, identity, kept_programs, place_of
from headrace.model.signature import FlatModel

TOLERANCE = 2e-4


class Model(nn.Module):
    """Two inputs, one of them indexes; a nested output; a buffer; a plain attribute that its code reads."""

    def __init__(self, factor=2.0):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(3), persistent=False)
        self.factor = factor

    def forward(self, ids, values):
        summed = self.table(ids).sum(1) + values
        return {"scores": self.linear(summed) * self.factor + self.shift, "best": [summed.argmax(1)]}


def flat(factor=2.0, seed=0):
    torch.manual_seed(seed)
    return FlatModel(Model(factor).eval().requires_grad_(requires_grad=False), None)


def example(rows):
    generator = torch.Generator().manual_seed(rows)
    return [torch.randint(0, 7, (rows, 5), generator=generator), torch.randn(rows, 4, generator=generator)]


INPUTS = {rows: example(rows) for rows in (1, 4)}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with the model's programs."""
    folder = tmp_path_factory.mktemp("kept") / "programs"
    _, made = kept_programs(flat(), INPUTS, folder, TOLERANCE)
    assert made == 2
    return folder


@pytest.fixture
def folder(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "programs")


def assert_answers(programs, model):
    for rows in INPUTS:
        for answer, expected in zip(programs(*example(rows)), model(*example(rows)), strict=True):
            torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize("seed", [0, 1], ids=["the same weights", "other weights"])
def test_a_kept_program_is_made_once_and_takes_the_weights_that_the_model_has(folder, seed):
    programs, made = kept_programs(flat(seed=seed), INPUTS, folder, TOLERANCE)
    assert made == 0
    assert_answers(programs, flat(seed=seed))


def test_another_batch_size_is_made_beside_those_that_are_there(folder):
    _, made = kept_programs(flat(), INPUTS | {2: example(2)}, folder, TOLERANCE)
    assert made == 1


def test_a_number_that_the_models_code_reads_is_part_of_its_identity():
    assert identity(flat()) == identity(flat(seed=1))
    assert identity(flat()) != identity(flat(factor=3.0))


def test_a_program_belongs_to_a_kind_of_gpu_and_its_number():
    def name(device):
        return "A" if device.index < 2 else "B"

    places = [place_of(torch.device("cuda", number), name) for number in (0, 1, 2, 0)]
    assert len(set(places)) == 3
    assert places[0] == places[3]
    assert "A" in places[0]


def test_a_program_for_the_cpu_belongs_to_its_instructions():
    assert place_of(torch.device("cpu")) == torch.backends.cpu.get_cpu_capability()


def test_a_damaged_program_is_made_anew(folder):
    damaged = next(folder.glob("*.program"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    programs, made = kept_programs(flat(), INPUTS, folder, TOLERANCE)
    assert made == 1
    assert_answers(programs, flat())


def test_a_program_that_answers_otherwise_than_the_model_is_made_anew(folder, tmp_path):
    other = tmp_path / "other"
    kept_programs(flat(factor=3.0), INPUTS, other, TOLERANCE)
    sources = sorted(other.glob("*.program"), key=lambda path: path.stat().st_size)
    for stale, path in zip(
        sources, sorted(folder.glob("*.program"), key=lambda path: path.stat().st_size), strict=True
    ):
        shutil.copy(stale, path)
    programs, made = kept_programs(flat(), INPUTS, folder, TOLERANCE)
    assert made == 2
    assert_answers(programs, flat())


def test_a_model_that_cannot_be_exported_says_why(tmp_path):
    class Branches(nn.Module):
        def forward(self, values):
            return (values if values.sum() > 0 else -values,)

    with pytest.raises(NotKept, match="data-dependent"):
        kept_programs(Branches(), {2: [torch.randn(2, 3)]}, tmp_path / "programs", TOLERANCE)


def test_a_folder_that_others_may_write_to_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(InvalidOption, match="others may write"):
        kept_programs(flat(), INPUTS, tmp_path, TOLERANCE)
