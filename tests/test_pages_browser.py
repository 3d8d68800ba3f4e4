"""Pages in a real browser: all is drawn, tables sort, on phones and on paper."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import evaluation, landscape, make, measurements

from robustflat.files import write_json
from robustflat.report import palette
from robustflat.report.page import write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser, driven; in CI there has to be one."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if path is None or driver is None:
        assert not os.environ.get("CI"), "CI installs chromium and chromium-driver"
        pytest.skip("pages are looked at in Chromium: install chromium and chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = path
    for argument in ("--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader",
                     "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
                     "--disable-component-update"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two runs, one of them with a plane."""
    root = tmp_path_factory.mktemp("pages")
    one, two = make(root / "a"), make(root / "a-run-of-a-rather-long-name-b", seed=1)
    landscape(planar=True).save(one.landscapes / "plane.json")
    write_json(two.evaluation, measurements(evaluation(0.3)))
    write_page([one, two], root / "report.html")
    return root / "report.html"


def opened(browser: Any, page: Path, width: int = 1400, *, dark: bool = False) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(page.as_uri())
    deadline = time.monotonic() + 60
    while not browser.execute_script("return document.documentElement.dataset.drawn"):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.1)


def run(browser: Any, script: str) -> Any:
    return browser.execute_script(
        f"const all = kind => [...document.querySelectorAll(kind)];{script}"
    )


def problems(browser: Any) -> list[str]:
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "ERROR")]


@pytest.mark.parametrize(("width", "dark"), [(320, True), (1400, False)])
def test_everything_is_drawn_and_nothing_sticks_out(
    browser: Any, page: Path, width: int, dark: bool
) -> None:
    opened(browser, page, width, dark=dark)
    assert problems(browser) == []
    expected = page.read_text("utf-8").count("<figure")
    assert int(run(browser, "return document.documentElement.dataset.drawn")) == expected > 10
    found = run(browser, """
        const plots = all(".plot").filter(p => !p.closest("details:not([open])"));
        return {
          wide: document.documentElement.scrollWidth - innerWidth,
          drawn: plots.filter(p => p.querySelector(".scatterlayer .trace, .contour")).length,
          outside: plots.filter(p => p.getBoundingClientRect().right > innerWidth + 1).length,
          curves: all(".js-line").length,
          page: getComputedStyle(document.body).backgroundColor,
          bg: getComputedStyle(all(".main-svg")[0]).backgroundColor,
          lines: all(".js-line").slice(0, 2).map(p => getComputedStyle(p).stroke),
        };""")  # fmt: skip
    assert found["wide"] <= 0, "the page scrolls sideways"
    assert found["drawn"] == expected
    assert found["outside"] == 0
    assert found["curves"] >= 2 * (4 * 2 + 2 + 1)

    def rgb(colour: str) -> str:
        return "rgb(" + ", ".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5)) + ")"

    theme = palette.themes()["dark" if dark else "light"]
    assert found["page"] == found["bg"] == rgb(theme["page"])
    assert rgb(theme["0"]) in found["lines"]


def test_runs_are_hidden_and_shown_in_tables_and_figures(browser: Any, page: Path) -> None:
    opened(browser, page)
    count = """const shown = run => [
        all(`.run-${run}`).filter(e => e.getClientRects().length).length,
        all(".plot").flatMap(p => p.data || [])
          .filter(t => t.meta.run === run && t.visible).length];
        return [shown(0), shown(1)];"""
    (cells, curves), (others, more) = run(browser, count)
    assert min(cells, curves, others, more) > 0
    run(browser, "all('nav input')[0].click()")
    assert run(browser, count) == [[0, 0], [others, more]]
    run(browser, "all('nav input')[0].click()")
    assert run(browser, count) == [[cells, curves], [others, more]]


def test_tables_sort_by_number_both_ways_and_by_text(browser: Any, page: Path) -> None:
    opened(browser, page)
    column = """const table = all("table.sorts")
          .find(t => t.caption.textContent === "Each attack in numbers");
        const heads = [...table.querySelectorAll("button")];
        const press = name => heads.find(b => b.textContent === name).click();
        const values = name => {
          const at = heads.findIndex(b => b.textContent === name);
          return [...table.tBodies[0].rows].map(r => r.cells[at])
            .map(c => c.querySelector("data")?.value ?? c.textContent);
        };"""
    script = (
        column
        + """
        press("still correct"); const down = values("still correct");
        press("still correct"); const up = values("still correct");
        press("attack"); const text = values("attack");
        press("attack"); return [down, up, text, values("attack"),
          [...table.querySelectorAll("[aria-sort]")].map(h => h.textContent + h.ariaSort)];"""
    )
    down, up, words, back, sorted_by = run(browser, script)
    values = [0.543, 0.5, 0.343, 0.3]
    assert [float(v) for v in down] == pytest.approx(values)
    assert [float(v) for v in up] == pytest.approx(values[::-1])
    assert words == ["square", "square", "pgd-20", "pgd-20"]
    assert back == words[::-1]
    assert sorted_by == ["attackascending"]
    # By the keyboard as well: the headings are buttons.
    assert run(browser, "return all('.sorts thead th').every(h => h.querySelector('button'))")


def test_surfaces_are_drawn_when_they_are_unfolded(browser: Any, page: Path) -> None:
    opened(browser, page)
    assert run(browser, "return all('details.surface .main-svg').length") == 0
    run(browser, "all('details.surface')[0].open = true")
    deadline = time.monotonic() + 30
    while not run(browser, "return all('details.surface canvas').length"):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.1)
    data = run(browser, "return all('details.surface .plot')[0].data[0].z")
    grid = landscape(planar=True).losses["robust"][0]
    assert data[0] == [grid[0, 0], grid[1, 0], grid[2, 0]]
    assert problems(browser) == []


def test_on_paper_the_page_is_light_and_whole(browser: Any, page: Path) -> None:
    opened(browser, page, dark=True)
    run(browser, "dispatchEvent(new Event('beforeprint'))")
    printed = run(browser, "return all('.plot')[0].layout.paper_bgcolor")
    assert printed == palette.themes()["light"]["page"]
    # Two stand side by side, but for what has rows with names.
    widths = run(
        browser,
        """return all('.plot').filter(p => p.data)
        .map(p => [p.layout.width, !!p.closest('.one, .wide')])""",
    )
    assert {tuple(found) for found in widths} == {(700, True), (345, False)}
    run(browser, "dispatchEvent(new Event('afterprint'))")
    assert (
        run(browser, "return all('.plot')[0].layout.paper_bgcolor")
        == (palette.themes()["dark"]["page"])
    )
    paper = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.7})
    content = base64.b64decode(paper["data"])
    assert content.startswith(b"%PDF")
    assert len(content) > 50_000


def test_without_a_script_the_numbers_are_there(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "<noscript>" in text
    figures = text.split("<figure")[1:]
    lines = [f for f in figures if "As a surface" not in f]
    assert all("<table" in figure for figure in lines)
    (robust,) = [f for f in lines if "<figcaption>Robust accuracy</figcaption>" in f][1:2]
    spec = json.loads(robust.split('application/json">')[1].split("</script>")[0])
    first = spec["data"][0]
    assert f'<data value="{first["y"][0] / 100}"' in robust
