"""`headrace referee`, as typed."""

import pytest

from headrace.cli import build_parser
from headrace.errors import InvalidOption
from headrace.referee.cases import Settings, cases
from headrace.referee_options import asking
from tests import commands


def parsed(*words):
    return asking(build_parser().parse_args(["referee", *map(str, words)]))


def test_options_become_what_is_asked(monkeypatch):
    monkeypatch.setattr("headrace.referee_options.find_tools", lambda tools, binary: (tools, binary))
    made = parsed("--url", "http://h:1", "--model", "m", "--rate", 20, "--duration", "500ms", "--case", "server")
    assert made.only == ("Server",)
    assert (made.target.url, made.target.model) == ("http://h:1", "m")
    assert (made.settings.rate, made.settings.duration_s) == (20, 0.5)
    assert made.tools == (None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--case", "Serve"), "there is none; choose from SingleStream"),
        (("--rate", 0), "--rate 0: must be above 0"),
        (("--samples", 0), "--samples 0: at least 1"),
        (("--concurrency", 0), "--concurrency 0: at least 1"),
        (("--threshold", 0), "--threshold 0: must be above 0"),
        (("--duration", 0), "--duration 0: must be above 0 s"),
        (("--url", "http://h:1"), "which model"),
        (("--url", "https://h:1", "--model", "m"), "perf_analyzer is not told of certificates here"),
        (("--url", "null://fixed?transport=grpc"), "the null server of the referee speaks HTTP"),
        (("--url", "null://what"), "no law"),
    ],
)
def test_options_that_cannot_work_are_refused(words, message):
    with pytest.raises(InvalidOption, match=message):
        parsed(*words)


def test_a_page_and_tables_are_shown(tmp_path):
    pytest.importorskip("mlperf_loadgen")
    ended = commands.run(
        *("referee", "--tool", "loadgen", "--case", "SingleStream", "--duration", "300ms", "--output-dir", "out"),
        cwd=tmp_path,
    )
    assert ended.code == 0, ended.err
    assert "SingleStream: one request at a time" in ended.out
    assert "from schedule" in ended.out
    assert (tmp_path / "out/referee.md").read_text().startswith("# The same server under several load generators")


def test_every_case_has_a_folder_of_its_own():
    names = [case.folder for case in cases(Settings())]
    assert names == ["singlestream", "multistream", "server", "offline", "closed-loop"]
