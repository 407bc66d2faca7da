"""Result files appear whole or not at all."""

import os
from pathlib import Path

import pytest

from headrace.bench.output import CsvLog, output_folder
from headrace.errors import OutputError


def test_a_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "run"
    with output_folder(target, overwrite=False) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_when_the_block_raises(tmp_path, error):
    def write_and_raise():
        with output_folder(tmp_path / "run", overwrite=False) as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(error):
        write_and_raise()
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_is_refused_or_replaced_whole(tmp_path):
    target = tmp_path / "run"
    target.mkdir()
    (target / "old").write_text("1")
    with pytest.raises(OutputError, match="add --overwrite"), output_folder(target, overwrite=False):
        pass
    with output_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("2")
        assert (target / "old").exists(), "the old one stays until the new one is whole"
    assert [path.name for path in target.iterdir()] == ["new"]


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match="cannot be written"),
        output_folder(tmp_path / "file" / "run", overwrite=False),
    ):
        pass


def log(path, columns=("a", "b")):
    return CsvLog(path, columns)


def test_rows_grow_under_one_header_and_none_is_empty(tmp_path):
    path = tmp_path / "new" / "out.csv"
    log(path).prepare()
    log(path).append({"a": 1, "b": None})
    log(path).append({"a": "x,y", "b": 2.5})
    assert path.read_text() == 'a,b\n1,\n"x,y",2.5\n'


def test_a_file_with_other_columns_is_refused_before_the_work(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("batch_size,compile,old\n1,2,3\n")
    with pytest.raises(OutputError, match=r"has other columns \(batch_size,compile,old\)"):
        log(path).prepare()
    assert path.read_text() == "batch_size,compile,old\n1,2,3\n"


def test_a_full_disk_is_told():
    full = Path("/dev/full")
    log(full).prepare()
    with pytest.raises(OutputError, match="No space left on device"):
        log(full).append({"a": 1})


def test_a_half_written_row_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "out.csv"
    log(path).append({"a": 1, "b": 2})
    write = os.write

    def half_then_full(descriptor, data):
        if len(data) < 3:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:-2])

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(OutputError, match="nothing was added"):
        log(path).append({"a": 3, "b": 4})
    assert path.read_text() == "a,b\n1,2\n"


def test_an_unwritable_file_is_told(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        log(tmp_path).prepare()
