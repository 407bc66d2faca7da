"""The commands as a user meets them: bad input, interruptions, and what each prints."""

import json
import os
import shutil
import signal
import time
from contextlib import contextmanager

import psutil
import pytest

from headrace import nvml
from headrace.bench.inputs import photograph_files
from headrace.bench.summary import load_summary
from headrace.cli import main_published
from tests.commands import QUICK, TINY, all_gone, call, model_file, run, start

LIMIT_S = 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return model_file(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--design", "fastest"], 2, "--design fastest: there is no such design"),
        (["--batch-size", "0"], 2, "--batch-size 0: a request has at least 1 row"),
        (["--num-iters", "0"], 2, "--num-iters 0: at least 1"),
        (["--num-workers", "0"], 2, "--num-workers 0: at least 1 worker"),
        (["--design", "original", "--num-workers", "2"], 2, "design original has one predict thread"),
        (["--compile", "--num-workers", "2"], 2, "torch.compile is not thread-safe"),
        (["--device", "tpu"], 2, "--device tpu: choose auto, cpu, cuda or cuda:N"),
        (["--output-file", "old.csv"], 1, "old.csv: has other columns (batch_size,old)"),
        (["--output-file", "/proc/o.csv"], 1, "/proc/o.csv: cannot be written"),
        (["--output-dir", "old.csv/run"], 1, "cannot be written"),
        (["--output-dir", "."], 1, "exists already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_cannot_work_are_refused_at_once(tmp_path, options, code, words):
    (tmp_path / "old.csv").write_text("batch_size,old\n1,2\n")
    ended = call("bench", "--device", "cpu", *options, cwd=tmp_path)
    assert ended.code == code
    assert words in ended.message
    assert [path.name for path in tmp_path.iterdir()] == ["old.csv"], "nothing was left behind"
    assert (tmp_path / "old.csv").read_text() == "batch_size,old\n1,2\n"


@pytest.mark.skipif(nvml.open_gpu(0) is not None, reason="there is a GPU")
def test_cuda_is_refused_where_there_is_none(tmp_path):
    ended = call("bench", "--device", "cuda", cwd=tmp_path)
    assert ended.code == 2
    assert "--device cuda: no such NVIDIA GPU" in ended.message


@pytest.mark.parametrize("words", [["bench", "--batch-size", "many"], ["fly"], []], ids=["no number", "none", "empty"])
def test_words_that_are_none_are_refused_with_the_usage(tmp_path, words):
    ended = call(*(words or [""]), cwd=tmp_path)
    assert ended.code == 2
    assert "usage: headrace" in ended.err


def broken(line):
    return f"import torch\n\ndef build():\n    {line}\n"


# One of each stage that may fail. What else is told of a model: tests/model/test_source.py, bench/test_reference.py.
BAD_MODELS = {
    "unknown name": ("resnet19", None, "resnet18"),
    "does not import": ("m.py:build", "import nonsense_that_is_not_there\n", "nonsense_that_is_not_there"),
    "raises while built": ("m.py:build", broken("raise ValueError('no weights today')"), "no weights today"),
    "raises in forward": ("m.py:build", broken("return torch.nn.Linear(7, 7)"), "fails on rows of shape"),
}


@pytest.mark.parametrize(("name", "source", "words"), BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_a_model_that_cannot_serve_is_told_in_one_line(tmp_path, name, source, words):
    if source is not None:
        (tmp_path / "m.py").write_text(source)
    ended = run("bench", *QUICK, "--model", name, "--output-dir", "out", cwd=tmp_path)
    assert ended.code == 1
    assert words in ended.message
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a real checkpoint of ResNet-18, with random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    ended = run("checkpoint", "--seed", "3", cwd=folder)
    assert ended.code == 0, ended.err
    assert "random weights (seed 3)" in ended.out
    assert [path.name for path in folder.iterdir()] == ["resnet18-random-seed3.pth"]
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[: 1 << 20])


def put_other_keys(path):
    import torch  # noqa: PLC0415  only here

    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "extra": torch.zeros(1)}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(truncate, "damaged or no checkpoint"), (put_other_keys, "not a checkpoint of resnet18: ")],
    ids=["truncated", "other keys"],
)
def test_a_checkpoint_that_does_not_fit_is_told_in_one_line(tmp_path, checkpoint, damage, words):
    path = tmp_path / "resnet18-f37072fd.pth"
    shutil.copy(checkpoint / "resnet18-random-seed3.pth", path)
    damage(path)
    ended = run("bench", *QUICK, "--output-dir", "out", cwd=tmp_path)
    assert ended.code == 1
    assert words in ended.message
    assert "headrace checkpoint" in ended.message
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("limit_bytes", [100, 4500], ids=["nothing fits", "not all fits"])
def test_a_full_disk_is_told_and_nothing_half_written_stays(tmp_path, tiny, limit_bytes):
    ended = run("bench", *QUICK, "--model", tiny, "--output-dir", "out", cwd=tmp_path, limit_bytes=limit_bytes)
    assert ended.code == 1
    assert "File too large" in ended.message
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_behind_the_csv_is_told(tmp_path, tiny):
    options = (*QUICK, "--model", tiny, "--output-dir", "out", "--output-file", "/dev/full")
    ended = run("bench", *options, cwd=tmp_path)
    assert ended.code == 1
    assert "/dev/full: the row could not be written (No space left on device)" in ended.message


SLOW = (
    TINY
    + """
import os, pathlib, time

class Slow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.calls = build_tiny(), 0

    def forward(self, inputs):
        self.calls += 1
        if self.calls > SLOW_AFTER:
            pathlib.Path(__file__).with_name("slow").write_text(str(os.getpid()))
            time.sleep(30)
        return self.model(inputs)

build_tiny, build = build, Slow
"""
)


@contextmanager
def slow_run(folder, *options, after=4):
    """Start a run whose model stops to sleep after some calls; give it, and its processes, once it sleeps."""
    source = SLOW.replace("SLOW_AFTER", str(after))
    files = ("--output-dir", "out", "--output-file", "o.csv")
    with start("bench", *QUICK, "--model", model_file(folder, source), *files, *options, cwd=folder) as process:
        wait_until(lambda: (folder / "slow").exists() and (folder / "slow").read_text(), process)
        yield process, psutil.Process(process.pid).children(recursive=True)


def wait_until(reached, process):
    """Return what `reached` returns, once it does; fail where the process ends before."""
    deadline = time.monotonic() + LIMIT_S
    while not (found := reached()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def left_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("slow", "tiny.py", "__pycache__"))


@pytest.mark.parametrize("design", ["original", "h2d_d2h_threads"])
@pytest.mark.parametrize(
    ("send", "number", "code"),
    [(os.killpg, signal.SIGINT, 130), (os.kill, signal.SIGTERM, 143)],
    ids=["Ctrl-C on a terminal, which every process hears", "SIGTERM"],
)
def test_an_interrupted_run_ends_every_process_and_leaves_no_result(tmp_path, design, send, number, code):
    with slow_run(tmp_path, "--design", design) as (process, children):
        assert len(children) >= 3 + (design == "original")
        send(process.pid, number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in err
    assert all_gone(children)
    assert left_in(tmp_path) == ["o.csv"]
    assert not (tmp_path / "o.csv").read_text()


@pytest.mark.parametrize("design", ["original", "h2d_d2h_threads"])
def test_a_killed_supervisor_takes_every_process_with_it(tmp_path, design):
    with slow_run(tmp_path, "--design", design) as (process, children):
        process.kill()
        process.communicate(timeout=20)
    assert all_gone(children)


@pytest.mark.parametrize("design", ["original", "executor"])
def test_a_killed_backend_ends_the_run_at_once_with_its_name(tmp_path, design):
    with slow_run(tmp_path, "--design", design) as (process, children):
        backend = int((tmp_path / "slow").read_text())
        assert backend in [child.pid for child in children]
        os.kill(backend, signal.SIGKILL)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "the backend process was killed by signal 9" in err
    assert all_gone(children)


def test_a_model_that_never_answers_ends_the_run_after_the_time_given(tmp_path, tiny):
    source = SLOW.replace("SLOW_AFTER", "4")
    options = (*QUICK, "--stall-timeout", "1", "--model", model_file(tmp_path, source), "--output-dir", "out")
    ended = run("bench", *options, cwd=tmp_path)
    assert ended.code == 1
    assert "no answer for 1 s" in ended.message
    assert left_in(tmp_path) == []


def test_the_published_command_line(tmp_path, checkpoint):
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(checkpoint / "resnet18-random-seed3.pth", models / "resnet18-f37072fd.pth")  # so none is fetched
    options = ("--num_iters", "3", "--batch_size", "2", "--model_dir", "models", "--no-compile", "--num_workers", "2")
    ended = run("server.py", *options, "--output_file", "x.csv", "--device", "cpu", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert [path.name for path in models.iterdir()] == ["resnet18-f37072fd.pth"]
    header, row = (tmp_path / "results" / "x.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert (values["batch_size"], values["compile"], values["experiment"]) == ("2", "False", "2_predict_workers")
    assert float(values["warmup_latency"]) > 0
    assert float(values["min_latency"]) <= float(values["average_latency"]) <= float(values["max_latency"])


def test_the_published_command_line_refuses_compile_with_workers(tmp_path):
    ended = call("--compile", "--num_workers", "4", "--device", "cpu", cwd=tmp_path, entry=main_published)
    assert ended.code == 2
    assert "torch.compile is not thread-safe" in ended.message


def test_photographs_get_their_labels(tmp_path):
    ended = run("classify", "--device", "cpu", cwd=tmp_path)
    assert ended.code == 0, ended.err
    labels = {line.split("│")[1].strip(): line.split("│")[2] for line in ended.out.splitlines() if "│" in line}
    for photograph, label in {
        "chelsea.png": "cat",
        "coffee.png": "espresso",
        "rocket.jpg": "missile",
        "motorcycle_left.png": "moped",
        "camera.png": "tripod",
    }.items():
        assert label in labels[photograph]
    assert list(tmp_path.iterdir()) == []


def test_an_own_photograph_gets_its_label(tmp_path):
    shutil.copy(photograph_files()["chelsea"], tmp_path / "mine.png")
    ended = run("classify", "--device", "cpu", "--design", "executor", "mine.png", cwd=tmp_path)
    assert ended.code == 0, ended.err
    labels = [line.split("│")[1:3] for line in ended.out.splitlines() if "│" in line]
    assert [(name.strip(), "cat" in found) for name, found in labels] == [("mine.png", True)]


def test_a_file_that_is_no_photograph_is_told(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    ended = run("classify", "--device", "cpu", "text.png", cwd=tmp_path)
    assert ended.code == 1
    assert "text.png" in ended.message


SWEEP = (
    *("sweep", "--device", "cpu", "--image-size", "48", "--distinct-images", "8", "--num-iters", "4", "--no-download"),
    *("--designs", "original", "executor", "--batch-sizes", "3", "--workers", "1", "--compile", "off"),
    *("--repeats", "1", "--output-dir", "s"),
)


def test_a_sweep_goes_on_where_it_was_interrupted(tmp_path, tiny):
    command = (*SWEEP, "--model", tiny)
    with start(*command, cwd=tmp_path) as process:
        finished = wait_until(lambda: list((tmp_path / "s").glob("runs/*/summary.json")), process)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "finished runs stay, and the same command goes on" in err
    assert all_gone(children)
    before = {path: path.read_bytes() for path in finished}

    ended = run(*command, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert len(list((tmp_path / "s").glob("runs/*/summary.json"))) == 2
    assert all(path.read_bytes() == content for path, content in before.items())
    table = (tmp_path / "s" / "tables" / "output_3_false.md").read_text()
    assert "| original |" in table
    assert "| executor |" in table

    refused = call(*command[:-2], "--model", "resnet18", cwd=tmp_path)
    assert refused.code == 1
    assert "another" in refused.message

    compared = run("compare", "s:original", "s:executor", cwd=tmp_path)
    assert compared.code == 0, compared.err
    assert "one run each" in compared.out
    told = call("compare", "s:original", "s:executor", "--json", "--bound", "10s", cwd=tmp_path)
    assert json.loads(told.out)["cells"][0]["quantities"][-1]["name"] == "goodput within 10 s"
    entry = call("compare", "s:original", "s:executor", "--changelog", cwd=tmp_path)
    assert entry.out.startswith("### Changed\n\n- `s:executor` against `s:original`: headrace ")
    page = run("findings", "s", cwd=tmp_path)
    assert page.code == 0, page.err
    assert "could not be told" in page.out
    tables = run("tables", "s", "--output-dir", "t", cwd=tmp_path)
    assert tables.code == 0, tables.err
    assert (tmp_path / "t" / "runs.csv").read_text().count("\n") == 3
    assert load_summary(next((tmp_path / "s").glob("runs/*-original-w1"))).experiment == "original"


def test_comparing_what_is_not_there_is_told(tmp_path):
    ended = call("compare", "a", "b", cwd=tmp_path)
    assert ended.code == 1
    assert "no finished run there" in ended.message


def test_help_names_every_command_and_default(tmp_path):
    ended = run("--help", cwd=tmp_path)
    for name in ("bench", "sweep", "tables", "compare", "findings", "classify", "limits", "checkpoint"):
        assert name in ended.out
    assert call("bench", "--help", cwd=tmp_path).out.count("default") > 10
