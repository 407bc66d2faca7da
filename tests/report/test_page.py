"""The page as a browser has it: well formed, alone, readable on a phone and a desk, in the light and in the dark."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from playwright.sync_api import sync_playwright

from headrace.config import LoadConfig
from headrace.report import page
from headrace.report.model import build
from tests.commands import call
from tests.report import made
from tests.study.summaries import GPU

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDS_BROWSER = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian: apt-get install chromium)")
EVIL = "<img src=x onerror=alert(1)>"
VOID = {"meta", "link", "img", "br"}
VIEWS = {"desktop": (1280, "light"), "phone": (375, "light"), "dark": (1280, "dark"), "narrow": (320, "dark")}


class Balance(HTMLParser):
    """Notes every tag that is not closed where it must be, and what elements refer to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.troubles, self.tags, self.refers, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        self.troubles += self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.refers += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]
        self.ids += [value for name, value in attrs if name == "id"]
        self.troubles += [f"{tag} {name}" for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.troubles.append(f"</{tag}>")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Several batch sizes, loads and machines, a run that failed, one that cannot be read, and an evil name."""
    folder = tmp_path_factory.mktemp("runs")
    for batch in (1, 4, 16):
        for seed in (0, 1):
            load = LoadConfig(num_iters=200)
            made.run(folder / f"burst-b{batch}.{seed}", seed=seed, config=made.options(batch, load))
        made.run(folder / f"fp16-b{batch}", config=made.options(batch, LoadConfig(num_iters=200), "fp16"))
    for rate in (200.0, 400.0, 800.0):
        load = LoadConfig(kind="poisson", rate=rate, num_iters=2000, bound_s=0.01)
        made.run(folder / f"open-{rate:g}", config=made.options(4, load))
    made.run(folder / "failed", config=made.options(), error=EVIL)
    made.run(folder / "other", environment=replace(GPU, gpu_name=EVIL))
    (made.run(folder / "spoiled") / "requests.parquet").write_bytes(b"no")
    return folder


@pytest.fixture(scope="module")
def text(runs):
    return page.render(build([runs], title=EVIL))


def test_every_element_is_closed_where_it_must_be(text):
    assert text.startswith("<!DOCTYPE html>")
    parsed = Balance(text)
    assert parsed.troubles == []
    assert len(set(parsed.ids)) == len(parsed.ids)


def test_it_asks_nothing_of_anybody_else(text):
    parsed = Balance(text)
    assert all(each.startswith(("#", "data:")) for each in parsed.refers)
    assert not {"script", "iframe", "object", "img", "base"} & set(parsed.tags)
    assert not re.search(r"url\(|@import|https?://", text)


def test_names_that_are_markup_stay_text(text):
    assert EVIL not in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") >= 3


def test_every_figure_that_the_runs_allow_is_there(text):
    titles = re.findall(r"<h4>(.*?)</h4>", text)
    for expected in (
        "Throughput against batch size, samples/s",
        "Response time against batch size: p50, p99",
        "Response time against offered load: p50, p99",
        "Service time by percentile, batch size 4",
        "Throughput of every cell, samples/s",
        "Where a request&#x27;s time goes: mean of each stage",
        "Warm-up latency in parts, s",
        "Response and service time over the run",
        "Batches that ran, by rows",
        "GPU and CPU activity over the run, %",
        "What ran when: lanes as rows",
    ):
        assert expected in titles, titles


def test_no_figure_holds_a_number_that_is_none(text):
    assert not re.search(r'(?:[xyd]|cx|cy|width|height)="[^"]*(?:nan|inf)', text)


def test_what_is_drawn_in_columns_says_so(text):
    assert "2,000 requests in columns of" in text


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Within a container the tests are root, whom the sandbox refuses; only our own file is opened.
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@NEEDS_BROWSER
@pytest.mark.parametrize("view", VIEWS)
def test_it_fits_the_screen_and_the_browser_has_nothing_to_say(browser, runs, tmp_path, view):
    path = tmp_path / "report.html"
    path.write_text(page.render(build([runs])), encoding="utf-8")
    width, scheme = VIEWS[view]
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened, troubles = context.new_page(), []
    opened.on("console", lambda message: troubles.append(message.text))
    opened.on("pageerror", lambda error: troubles.append(str(error)))
    opened.on("request", lambda request: request.url == path.as_uri() or troubles.append(request.url))
    opened.goto(path.as_uri())
    opened.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    cut = opened.evaluate(
        """() => [...document.querySelectorAll('svg text')].filter(text => {
            const box = text.getBBox(), view = text.ownerSVGElement.viewBox.baseVal;
            return box.x < -1 || box.x + box.width > view.width + 1 || box.y + box.height > view.height + 1;
        }).map(text => text.textContent)"""
    )
    assert cut == []
    assert [url for url in troubles if not url.startswith("data:")] == []
    context.close()


def test_the_command_writes_what_it_is_asked_for(runs, tmp_path):
    ended = call("report", runs, cwd=tmp_path)
    assert ended.code == 0
    assert (tmp_path / "report.html").is_file()
    assert "left out: spoiled" in ended.err
    ended = call("report", runs, "--markdown", "tables.md", "--bound", "20ms", "--title", "Mine", cwd=tmp_path)
    assert (tmp_path / "tables.md").read_text(encoding="utf-8").startswith("# Report: Mine")
    assert "tables.md" in ended.out


def test_the_command_refuses_a_folder_without_runs(tmp_path):
    ended = call("report", tmp_path, "--output", tmp_path / "report.html", cwd=tmp_path)
    assert ended.code == 1
    assert "no finished run there" in ended.message
    assert not (tmp_path / "report.html").exists()
