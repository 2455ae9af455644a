"""This browser opens the pages of `./run.sh serve`, and tells what is there for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from tests.mlflow_ui import SCREENSHOTS, chromium

CONTRAST = 4.5  # WCAG 2.2, level AA
NARROW = {"width": 360, "height": 1200, "deviceScaleFactor": 1, "mobile": False}

# What WCAG calls contrast, of all that is written on a page. A pixel is painted as the page is, so
# that what shines through counts; marks lie behind the letters of the text's box.
CONTRASTS = """
const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const paint = element => {
    if (element.parentElement) paint(element.parentElement);
    canvas.fillStyle = getComputedStyle(element).backgroundColor;
    canvas.fillRect(0, 0, 1, 1);
};
const luminance = () => {
    const [red, green, blue] = [...canvas.getImageData(0, 0, 1, 1).data].map(
        value => (value /= 255) <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4);
    return .2126 * red + .7152 * green + .0722 * blue;
};
const says = element => element.value || [...element.childNodes].some(
    node => node.nodeType === Node.TEXT_NODE && node.textContent.trim());
return [...document.body.querySelectorAll(':not(script, [aria-hidden])')].filter(
    element => says(element) && element.checkVisibility()).map(element => {
    paint(element);
    const ground = luminance();
    canvas.fillStyle = getComputedStyle(
        element.matches('mark') ? document.querySelector('textarea') : element).color;
    canvas.fillRect(0, 0, 1, 1);
    const [dark, light] = [luminance(), ground].sort((a, b) => a - b);
    return [element.tagName, (light + .05) / (dark + .05)];
});
"""
OVERFLOW = """
const {scrollWidth, clientWidth} = document.documentElement;
return scrollWidth - clientWidth;
"""
FOCUS = """
const {outlineStyle, outlineWidth} = getComputedStyle(document.activeElement);
return outlineStyle !== 'none' && parseFloat(outlineWidth) >= 2;
"""
ADDRESSES = "return performance.getEntriesByType('resource').map(entry => entry.name);"


class ServedPage:
    """Drives a headless Chromium by its keyboard."""

    def __init__(self, address: str, profile: Path) -> None:
        """Start the browser.

        :param address: of the server.
        :param profile: an empty folder for what the browser remembers.
        """
        self.address = address
        self.browser = chromium(profile)

    def open(self, path: str = "") -> None:
        """Open a page of the server."""
        self.browser.get(self.address + path)

    def press(self, *keys: str) -> None:
        """Press keys, one after the other."""
        ActionChains(self.browser).send_keys(*keys).perform()

    def press_with(self, held: str, *keys: str) -> None:
        """Press keys while another is held."""
        ActionChains(self.browser).key_down(held).send_keys(*keys).key_up(held).perform()

    def replace(self, text: str) -> None:
        """Paste a text over that in the box, which has the focus."""
        self.press_with(Keys.CONTROL, "a")
        self._devtools("Input.insertText", text=text)

    def texts(self, selector: str) -> list[str]:
        """Return the texts of elements."""
        found = self.browser.find_elements(By.CSS_SELECTOR, selector)
        return [str(element.get_property("textContent")) for element in found]

    def wait(self, expected: list[str], selector: str) -> None:
        """Wait until elements have these texts."""

        def there(_: Any) -> bool:
            return self.texts(selector) == expected

        WebDriverWait(self.browser, 60).until(there, f"{selector} do not say {expected}")

    def can_be_read(self, expected: set[str], name: str) -> None:
        """Check that what is written is clear in either colour scheme, and that a narrow screen has
        room for it; and keep pictures.

        :param expected: names of elements that are written on, with others.
        :param name: of the pictures.
        """
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            self._devtools("Emulation.setEmulatedMedia", features=features)
            self._devtools("Emulation.setDeviceMetricsOverride", **NARROW)
            SCREENSHOTS.mkdir(parents=True, exist_ok=True)
            self.browser.save_screenshot(str(SCREENSHOTS / f"serve-{name}-{scheme}.png"))
            contrasts = self.run(CONTRASTS)
            assert expected <= {element for element, _ in contrasts}
            assert [each for each in contrasts if each[1] < CONTRAST] == [], scheme
            assert self.run(OVERFLOW) == 0
        self._devtools("Emulation.clearDeviceMetricsOverride")

    def offline(self, yes: bool) -> None:
        """Part the browser from the server, or bring them together again."""
        self.browser.set_network_conditions(
            offline=yes, latency=0, download_throughput=-1, upload_throughput=-1
        )

    def run(self, script: str) -> Any:
        """Return what one of the scripts above finds."""
        return self.browser.execute_script(script)

    def heard(self) -> list[tuple[str, str]]:
        """Return the roles and names of what one can go to, as a screen reader hears them."""
        nodes = self._devtools("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node["name"]["value"].strip())
            for node in nodes
            if any(each["name"] == "focusable" for each in node.get("properties", []))
        ]

    def log(self) -> list[str]:
        """Return what went wrong on the pages since the last call."""
        entries = self.browser.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries]

    def _devtools(self, command: str, **parameters: Any) -> Any:
        return self.browser.execute_cdp_cmd(command, parameters)
