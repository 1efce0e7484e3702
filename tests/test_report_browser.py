"""The report page as a reader meets it: in a real browser, by day and by night, on a desk and on a phone.

Pictures of what was seen are left in ``out/screens``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_chromium
from conftest import ROOT, Artifact
from test_report import a_report

from bshub.release.evidence import Evidence, Layer
from bshub.release.report import report_page
from bshub.scoring.selection import Threshold

CHROMIUM = find_chromium()
SCREENS = ROOT / "out" / "screens"
DRAWN = "document.querySelectorAll('.chart svg').length === document.querySelectorAll('.chart').length"
LOOKS = {
    "light": (1280, 900, False, False),
    "dark": (1280, 900, True, False),
    "phone": (390, 844, False, True),
    "phone-dark": (390, 844, True, True),
}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def page(complete: Artifact) -> Path:
    return complete.folder / "report.html"


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as browser:
        yield browser


def shown(browser: Browser, page: Path, look: str) -> None:
    browser.errors.clear()
    browser.requests.clear()
    browser.look(*LOOKS[look])
    browser.open(page)
    browser.wait(DRAWN)


@pytest.mark.parametrize("look", LOOKS)
def test_it_draws_everything_without_an_error_or_a_request(browser: Browser, page: Path, look: str) -> None:
    shown(browser, page, look)
    SCREENS.mkdir(parents=True, exist_ok=True)
    browser.picture(SCREENS / f"report-{look}.png")
    assert browser.run("document.querySelectorAll('.chart').length") >= 4
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the window"
    assert browser.run("[...document.images].every(image => image.naturalWidth > 0)")
    assert browser.errors == []
    assert browser.requests == [page.resolve().as_uri()]


def test_pointing_at_a_removed_filter_tells_which_it_is(browser: Browser, page: Path, complete: Artifact) -> None:
    shown(browser, page, "light")
    where = """(() => {
      const marks = [...document.querySelectorAll('.chart svg path')].filter(
        mark => (mark.getAttribute('aria-label') || '').includes('fate: removed'));
      const box = marks.at(-1).getBoundingClientRect();
      scrollTo(0, scrollY + box.top - 300);
      const now = marks.at(-1).getBoundingClientRect();
      return [now.left + now.width / 2, now.top + now.height / 2];
    })()"""
    assert not browser.run("document.querySelector('#vg-tooltip-element.visible') !== null")
    browser.point_at(*browser.run(where))
    browser.wait("document.querySelector('#vg-tooltip-element.visible')")
    cells = "[...document.querySelectorAll('#vg-tooltip-element tr')].map(row => [...row.cells].map(c => c.innerText))"
    rows = browser.run(f"Object.fromEntries({cells})")
    told = {key.rstrip(":"): value for key, value in rows.items()}
    assert told["fate"] == "removed"
    assert int(told["filter"]) in complete.report["removed"][told["layer"]]
    assert float(told["score (deviations)"]) > complete.report["diagnosis"]["threshold"]["mu"]
    assert {"spectral norm", "correlation"} <= told.keys()
    browser.picture(SCREENS / "report-hover.png", whole=False)


def test_text_can_be_read_by_day_and_by_night(browser: Browser, page: Path) -> None:
    """The contrast of body text, of quiet text and of an axis label with what lies behind: at least 4.5 to 1."""
    contrast = """(() => {
      const light = text => {
        const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(
          v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const back = light(getComputedStyle(document.querySelector('section')).backgroundColor);
      const label = document.querySelector('.role-axis-label text');
      const quiet = document.querySelector('section p');
      const colours = [
        getComputedStyle(document.body).color, getComputedStyle(quiet).color, getComputedStyle(label).fill];
      return [back, ...colours.map(light).map(v => (Math.max(v, back) + 0.05) / (Math.min(v, back) + 0.05))];
    })()"""
    behind = {}
    for look in ("light", "dark"):
        shown(browser, page, look)
        behind[look], *found = browser.run(contrast)
        assert min(found) >= 4.5, (look, found)
    assert behind["light"] > 0.8 and behind["dark"] < 0.1


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of the size of DenseNet-201's: 200 layers of 32 to 960 filters, a thousand classes, eight thresholds."""
    random, layers = np.random.default_rng(0), []
    for number in range(200):
        scores = random.standard_normal(int(random.integers(32, 960)))
        fates = ["removed" if score > 2 else "kept" for score in scores]
        statistics = {name: np.abs(scores).tolist() for name in ("spectral", "saliency", "activation", "correlation")}
        name = f"features.denseblock{number // 50}.denselayer{number}.conv{number % 2}"
        layers.append(Layer(name, list(range(len(scores))), scores.tolist(), fates, statistics))
    tried = tuple((mu, int(10 ** (5.2 - mu / 2)), 0.9 - 0.1 / mu) for mu in (6.0, 5.0, 4.0, 3.0, 2.5, 2.25, 2.0, 1.0))
    labels = random.integers(0, 1000, 2000)
    before, after = (np.where(random.random(2000) < 0.3, labels[::-1], labels) for _ in range(2))
    answers = [array.tolist() for array in (labels, before, after)]
    evidence = Evidence(layers, Threshold(2.0, "the lowest", tried, 0.8), *answers, [])
    path = tmp_path_factory.mktemp("large") / "report.html"
    names = [f"a rather long name of class {number}" for number in range(1000)]
    path.write_text(report_page(evidence, a_report(), names, "bshub sanitize timm/densenet201"), encoding="utf-8")
    return path


@pytest.mark.parametrize("look", ["light", "phone"])
def test_a_page_of_two_hundred_layers_and_a_thousand_classes_can_be_used(
    browser: Browser, large: Path, look: str
) -> None:
    shown(browser, large, look)
    browser.picture(SCREENS / f"large-{look}.png")
    assert large.stat().st_size < 5e6
    assert browser.errors == [] and browser.requests == [large.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "wider than the window"
    assert browser.run("document.documentElement.scrollHeight") < 7000, "long charts and tables scroll by themselves"
    assert browser.run("[...document.querySelectorAll('.tall')].every(box => box.clientHeight < 800)")
    assert browser.run("document.querySelectorAll('.chart svg .mark-symbol path').length") < 30_000


@pytest.mark.parametrize("look", ["light", "phone"])
def test_the_numbers_over_the_curve_do_not_meet(browser: Browser, large: Path, look: str) -> None:
    shown(browser, large, look)
    boxes = browser.run("""(() => {
      const [, curve] = document.querySelectorAll('.chart');
      return [...curve.querySelectorAll('.mark-text.role-mark text')].map(text => text.getBoundingClientRect()).map(
        box => [box.left, box.right]);
    })()""")
    assert len(boxes) == 8
    assert all(left[1] < right[0] for left, right in itertools.pairwise(sorted(boxes))), boxes
