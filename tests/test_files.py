"""Files appear whole or not at all, and what cannot be written is told with its name, reason and remedy."""

import os
from contextlib import suppress

import numpy as np
import pytest

from headrace.errors import OutputError
from headrace.files import whole_file, write_whole, writing


@pytest.mark.parametrize("content", ["t\u00ebxt", "t\u00ebxt".encode()], ids=["text", "bytes"])
def test_a_file_is_replaced_in_folders_that_are_made(tmp_path, content):
    path = tmp_path / "a" / "b" / "name.json"
    for _ in range(2):
        write_whole(path, content)
    assert path.read_text(encoding="utf-8") == "t\u00ebxt"
    assert [each.name for each in path.parent.iterdir()] == ["name.json"]


def test_what_was_there_stays_until_the_end(tmp_path):
    path = tmp_path / "name.npy"
    path.write_text("before")
    with whole_file(path) as partial:
        np.save(partial, np.arange(3))
        assert path.read_text() == "before"
    assert np.load(path).tolist() == [0, 1, 2]


def test_a_block_that_raises_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "name"
    path.write_text("before")
    with suppress(KeyError), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert [each.name for each in tmp_path.iterdir()] == ["name"]
    assert path.read_text() == "before"


def test_two_processes_write_the_same_file_under_names_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "name"
    with whole_file(path) as ours:
        monkeypatch.setattr(os, "getpid", lambda: 0)
        with whole_file(path) as theirs:
            theirs.write_text("theirs")
        ours.write_text("ours")
    assert path.read_text() == "ours"


def test_a_file_that_cannot_be_replaced_is_told(tmp_path):
    (tmp_path / "name").mkdir()
    with pytest.raises(OutputError, match=r"name: cannot be written \(Is a directory\); try elsewhere"):
        write_whole(tmp_path / "name", "text", "try elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_an_error_is_about_its_own_file_where_it_names_one(tmp_path):
    told = r"/inner: cannot be written \(No such file or directory\); mend it"
    with pytest.raises(OutputError, match=told), writing(tmp_path, "mend it"):
        (tmp_path / "inner").rmdir()


def test_an_error_without_a_number_keeps_its_text(tmp_path):
    told = r"cannot be written \(4096 requested and 12 written\)"
    with pytest.raises(OutputError, match=told), writing(tmp_path):
        raise OSError("4096 requested and 12 written")
