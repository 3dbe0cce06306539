"""Real headless Chromium, driven by Selenium, as the tests of the page need it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="the page is tested with the extra 'test' (Selenium)")

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

__all__ = ["Browser", "find_chromium"]

SECONDS = 600  # on a busy machine

# Force an answer: the page's next requests ask for one of these texts.
_FORCE = """
const fetched = window.fetch;
window.fetch = (path, options) => {
  if (options && options.body) {
    const body = JSON.parse(options.body);
    body.structured_outputs = {choice: [TEXT]};
    options = {...options, body: JSON.stringify(body)};
  }
  return fetched(path, options);
};
"""


def find_chromium() -> tuple[str, str]:
    """The paths of Chromium and of its driver. Skips the test where they are not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("the page's tests need Debian's packages chromium and chromium-driver")
    return chromium, driver


class Browser:
    """One window on the page, and what its user does."""

    def __init__(self, profile: Path) -> None:
        chromium, driver = find_chromium()
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        options.add_argument("--headless=new")
        options.add_argument("--disable-dev-shm-usage")
        options.add_argument(f"--user-data-dir={profile}")
        if os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # Chromium's sandbox refuses root
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self.resize(1280, 860)

    def close(self) -> None:
        """End Chromium and its driver."""
        self.driver.quit()

    def resize(self, width: int, height: int) -> None:
        """Give the page a size in CSS pixels, also one that is smaller than a window can be."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def use_scheme(self, scheme: str) -> None:
        """Prefer "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, url: str) -> None:
        """Load the page, and wait until it shows what the engine does, or asks for a key."""
        self.driver.get(url)
        asks = self.find("#key-dialog").is_displayed
        self.wait(lambda: asks() or self.text("#state") != "connecting")

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements(By.CSS_SELECTOR, selector))

    def text(self, selector: str) -> str:
        """The whole text of the last element that fits, hidden parts too."""
        found = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return str(self.driver.execute_script("return arguments[0].textContent", found[-1]))

    def script(self, source: str) -> object:
        return self.driver.execute_script(source)

    def wait(self, is_done: Callable[[], bool]) -> None:
        """Wait until it is done; fails after SECONDS."""
        WebDriverWait(self.driver, SECONDS, poll_frequency=0.05).until(lambda _: is_done())

    def press(self, *keys: str) -> None:
        """Type into the element that has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def ask(self, text: str) -> None:
        """Type a message and send it."""
        self.find("#prompt").send_keys(text, Keys.ENTER)

    def wait_for_answer(self) -> str:
        """The text of the last answer, once it is whole."""
        self.wait(lambda: self.count(".answer") > 0 and self.count("[aria-busy=true]") == 0)
        return self.text(".answer > .text")

    def set_field(self, name: str, value: str) -> None:
        """Fill a field of the sampling controls."""
        field = self.find(f"#sampling [name={name}]")
        field.clear()
        field.send_keys(value)

    def force_answer(self, text: str) -> None:
        """Make the model answer with this text, until the page is loaded again."""
        self.script(_FORCE.replace("TEXT", json.dumps(text)))

    def errors(self) -> list[str]:
        """What the console told since the last call."""
        return [entry["message"] for entry in self._log("browser")]

    def requested(self) -> set[str]:
        """The URLs that the page requested since the last call."""
        urls = set()
        for entry in self._log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                urls.add(message["params"]["request"]["url"])
        return urls

    def _log(self, name: str) -> list[dict[str, str]]:
        log: list[dict[str, str]] = self.driver.get_log(name)  # type: ignore[no-untyped-call]
        return log
