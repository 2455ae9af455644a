"""This browser opens MLflow's web pages and tells what somebody would see there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    StaleElementReferenceException,
    TimeoutException,
)
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.recipe import ROOT

SCREENSHOTS = Path(os.environ.get("CI_ARTIFACTS") or ROOT / "build" / "screenshots")
WAIT_SECONDS = 60

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",  # containers have little of it
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1343",  # a page of 1600 × 1200
    # There is no world outside this machine.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    # A mouse, or charts always show their tools.
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,"
    "primaryPointerType=4,availablePointerTypes=4",
)
HARMLESS = (
    "/mlflow/users/current - ",  # MLflow asks who is logged in where nobody can log in
    "ResizeObserver loop",
)

CELLS_OF_COLUMN = """
const cells = document.querySelectorAll(`[role=gridcell][col-id="metrics.\\`${arguments[0]}\\`"]`);
const shown = [...cells].filter(cell => cell.textContent.trim());
return Object.fromEntries(shown.map(
    cell => [cell.closest('[role=row]').getAttribute('row-id'), cell.textContent.trim()]));
"""
METRIC_VALUE = """
const links = [...document.querySelectorAll('[role=row] a')];
const row = links.find(link => link.textContent === arguments[0])?.closest('[role=row]');
return row?.querySelectorAll('[role=cell]')[1]?.textContent;
"""
CURVE = """
const cards = [...document.querySelectorAll('[data-testid=experiment-view-compare-runs-card]')];
const card = cards.find(card => card.querySelector('h4')?.textContent === arguments[0]);
const plot = card?.querySelector('.js-plotly-plot');
const line = plot?.querySelector('path.js-line');
const corners = line?.getAttribute('d')?.split('L') ?? [];
const box = line?.getBoundingClientRect();
if (corners.length < 2 || box.width < 50 || box.height < 50) return null;
return Array.from(plot.data[0].x, (step, i) => [step, plot.data[0].y[i]]);
"""
SECTIONS = """
const headers = document.querySelectorAll(
    '[data-testid=experiment-view-compare-runs-section-header]');
return [...headers].map(header => header.textContent.split('(')[0]);
"""
NOTE = """
const note = document.querySelector('[data-testid=note-editor-preview-content]');
const pictures = [...(note?.querySelectorAll('img') ?? [])];
if (!note?.textContent || pictures.some(picture => !picture.naturalWidth)) return null;
const rows = [...note.querySelectorAll('tr')].map(
    row => [...row.cells].map(cell => cell.textContent.trim()));
const links = [...note.querySelectorAll('a')].map(link => [link.textContent, link.href]);
return [note.innerText, rows, pictures.length, Object.fromEntries(links)];
"""
FOUND = """
return [...document.querySelector('tbody').rows].filter(row => row.checkVisibility()).map(
    row => [...row.cells].map(cell => cell.textContent));
"""
FOLDER = """
return document.querySelector(`[data-testid=artifact-tree-node][artifact-name="${arguments[0]}"]`);
"""
FILE_IN_FOLDER = """
const folder = document.querySelector(
    `[data-testid=artifact-tree-node][artifact-name="${arguments[0]}"]`);
const nodes = [...(folder?.closest('li').querySelectorAll('[artifact-name]') ?? [])];
return nodes.find(node => node.getAttribute('artifact-name').endsWith('.json'));
"""
TABLE = """
const rows = [...document.querySelectorAll('[role=row]')].map(
    row => [...row.querySelectorAll('[role=columnheader], [role=cell]')].map(
        cell => cell.textContent));
return rows.length > 1 && rows;
"""
# Names and values are two grids that draw the rows in view only; the names lag one event behind.
COMPARED = """
const links = [...document.querySelectorAll('[role=grid] a[href*="#/metric?"]')];
const panel = links[0]?.closest('[class*=collapse-content-box]');
if (!panel) return null;
panel.scrollIntoView();
const [names, values] = panel.querySelectorAll('[role=grid]');
const atEnd = values.scrollTop + values.clientHeight > values.scrollHeight - 2;
const middle = element => {
    const box = element.getBoundingClientRect();
    return box.top + box.height / 2;
};
const view = names.getBoundingClientRect();
const link = links.find(link => link.textContent === arguments[0]);
const name = link?.closest('[style*="top:"]');
if (!name || middle(name) < view.top || middle(name) > view.bottom) {
    values.scrollTop = atEnd ? 0 : values.scrollTop + 100;
    return null;
}
if (Math.abs(names.scrollTop - values.scrollTop) > 2) {
    values.scrollTop += atEnd ? -1 : 1;
    return null;
}
const cells = [...values.querySelectorAll('[style*="top:"]')].filter(
    cell => Math.abs(middle(cell) - middle(name)) < 3);
cells.sort((a, b) => a.getBoundingClientRect().x - b.getBoundingClientRect().x);
return cells.map(cell => cell.textContent);
"""

needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs a browser: apt install chromium chromium-driver",
)


def chromium(profile: Path) -> Chrome:
    """Start a headless Chromium.

    :param profile: an empty folder for what it remembers.
    """
    options = ChromeOptions()
    options.binary_location = _program("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return Chrome(options=options, service=Service(_program("chromedriver")))


class Note(NamedTuple):
    """Markdown, as MLflow shows it."""

    text: str
    rows: list[list[str]]  # of its tables
    pictures: int
    links: dict[str, str]


class MlflowUi:
    """Drives a headless Chromium; each method opens a page and returns what it shows."""

    def __init__(self, runs_page: str, profile: Path) -> None:
        """Open the list of runs.

        :param runs_page: the address of that list.
        :param profile: an empty folder for what the browser remembers.
        """
        self._base, _, path = runs_page.partition("/#/")
        self._experiment = path.partition("?")[0].removesuffix("/runs")
        self.runs_page = runs_page
        self._browser = chromium(profile)
        self._browser.get(runs_page)
        # MLflow's assistant opens by itself the first time, over a quarter of the page.
        self._click("the assistant", "[data-component-id='mlflow.assistant.chat_panel.close']")

    def close(self) -> None:
        self._browser.quit()

    def errors(self) -> list[str]:
        """Return what went wrong on the pages since the last call."""
        entries = self._browser.get_log("browser")  # type: ignore[no-untyped-call]
        severe = [entry["message"] for entry in entries if entry["level"] == "SEVERE"]
        return [text for text in severe if not any(known in text for known in HARMLESS)]

    def save(self, name: str) -> Path:
        """Keep a picture of the page."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"dashboard-{name}.png"
        self._browser.save_screenshot(str(path))
        return path

    def listed(self, metric: str, runs: int) -> dict[str, str]:
        """Return the values of a metric by run id, as a column in the list of runs shows them."""
        self._open(f"{self._experiment}/runs", "compareRunsMode=TABLE&")
        self._click("the menu of columns", "[data-testid='column-selection-dropdown']")
        self._type("Search columns", metric)
        self._wait(f"the column {metric}", lambda browser: self._choose(metric))
        self._browser.switch_to.active_element.send_keys(Keys.ESCAPE)
        what = f"{metric} of {runs} runs"
        shown = self._until(what, CELLS_OF_COLUMN, metric, enough=lambda cells: len(cells) >= runs)
        return dict(shown)

    def overview(self, run_id: str, metric: str) -> str:
        """Return the value of a metric on a run's page."""
        self._open(f"{self._experiment}/runs/{run_id}")
        self._type("Search metrics", metric)
        return str(self._until(metric, METRIC_VALUE, metric))

    def curve(self, run_id: str, metric: str, charts: str) -> list[tuple[int, float]]:
        """Return the points of a run's drawn curve: (step, value).

        :param charts: a regular expression; other charts are hidden.
        """
        self._open(f"{self._experiment}/runs/{run_id}/model-metrics")
        self._type("Search metric charts", charts)
        points = self._until(f"a curve of {metric}", CURVE, metric)
        return [(int(step), float(value)) for step, value in points]

    def sections(self, run_id: str) -> list[str]:
        """The sections of a run's charts, from the top."""
        self._open(f"{self._experiment}/runs/{run_id}/model-metrics")
        return list(self._until("charts", SECTIONS))

    def note(self, run_id: str) -> Note:
        """Return what a run's page begins with, all of it."""
        self._open(f"{self._experiment}/runs/{run_id}")
        self._click("the rest of the note", "//*[text()='Show more']")
        return Note(*self._until("a note with its pictures", NOTE))

    def card(self, model: str, version: str) -> Note:
        """Return the description of a version of a registered model."""
        self._open(f"models/{model}/versions/{version}")
        return Note(*self._until("a description", NOTE))

    def answers(self, address: str, words: str, column: str) -> list[list[str]]:
        """Return the rows that a page of answers has for a search, once sorted by a column."""
        self._browser.get("about:blank")
        self._browser.get(address)
        frame = (By.CSS_SELECTOR, "iframe.mlflow-html-iframe")
        (page,) = self._wait("a page of answers", lambda browser: browser.find_elements(*frame))
        self._browser.switch_to.frame(page)
        self._type("words, in any column", words)
        self._click(column, f"//th[normalize-space()='{column}']/button")
        found = list(self._browser.execute_script(FOUND))
        self._browser.switch_to.default_content()
        return found

    def table(self, run_id: str, folder: str) -> list[list[str]]:
        """Return the first table in a folder of a run's artifacts, header first."""
        self._open(f"{self._experiment}/runs/{run_id}/artifacts")
        self._until(f"the folder {folder}", FOLDER, folder).click()
        self._until("a table in it", FILE_IN_FOLDER, folder).click()
        return list(self._until("the rows of a table", TABLE))

    def compared(self, run_ids: list[str], metric: str) -> list[str]:
        """Return the values of a metric where runs are compared, from left to right."""
        runs = "%5B" + ",".join(f"%22{run_id}%22" for run_id in run_ids) + "%5D"
        experiment = self._experiment.rpartition("/")[2]
        self._open("compare-runs", f"runs={runs}&experiments=%5B%22{experiment}%22%5D&")
        what = f"{metric} of {len(run_ids)} runs"

        def enough(values: list[str] | None) -> bool:
            return len(values or ()) == len(run_ids)

        return list(self._until(what, COMPARED, metric, enough=enough))

    def _open(self, path: str, query: str = "") -> None:
        self._browser.get("about:blank")  # another fragment alone would not load the page anew
        self._browser.get(f"{self._base}/#/{path}?{query}workflowType=machine_learning")

    def _click(self, what: str, selector: str) -> None:
        by = By.XPATH if selector.startswith("/") else By.CSS_SELECTOR

        def clicked(browser: Chrome) -> bool:
            found = browser.find_elements(by, selector)
            if found:
                found[0].click()
            return bool(found)

        self._wait(what, clicked)

    def _choose(self, column: str) -> bool:
        """Tick a column of the menu, whose group may be closed, or close while it is searched."""
        box = (
            f"//*[contains(@class, 'treenode')][normalize-space()='{column}']"
            "//*[contains(@class, 'tree-checkbox')]"
        )
        if boxes := self._browser.find_elements(By.XPATH, box):
            boxes[0].click()
        elif closed := self._browser.find_elements(
            By.CSS_SELECTOR, "[class*='tree-switcher_close']"
        ):
            closed[0].click()
        return bool(boxes)

    def _type(self, placeholder: str, text: str) -> None:
        selector = f"input[placeholder='{placeholder}']"
        self._click(placeholder, selector)
        self._browser.find_element(By.CSS_SELECTOR, selector).send_keys(text)

    def _until(
        self, what: str, script: str, *arguments: str, enough: Any = lambda found: found
    ) -> Any:
        """Return what a script finds on the page, as soon as it finds enough."""

        def found(browser: Chrome) -> Any:
            value = browser.execute_script(script, *arguments)
            return value if enough(value) else None

        return self._wait(what, found)

    def _wait(self, what: str, condition: Any) -> Any:
        busy = (
            StaleElementReferenceException,
            ElementClickInterceptedException,
            ElementNotInteractableException,
        )
        try:
            wait = WebDriverWait(self._browser, WAIT_SECONDS, 0.2, ignored_exceptions=busy)
            return wait.until(condition)
        except TimeoutException:
            picture = self.save("missing")
            address = self._browser.current_url
            raise AssertionError(f"{address} does not show {what}: see {picture}") from None


def _program(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is not on PATH"
    return path
