"""A real headless Chromium for tests of the report: Debian's, by its chromedriver; skipped with a reason elsewhere."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--window-size=1366,800",
)  # fmt: skip
DRIVER = "/usr/bin/chromedriver"


def missing() -> str | None:
    """Why there is no browser to test with; None if there is one."""
    if not Path(DRIVER).exists() or not shutil.which("chromium"):
        return "no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    return None


def require() -> None:
    reason = missing()
    if reason and os.environ.get("ARES_REQUIRE_SHARED") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def open_browser(profile: Path) -> Iterator:
    """A browser with a fresh profile, its console logged; yields it and ends it."""
    require()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        driver.set_script_timeout(30)
        yield driver
    finally:
        driver.quit()
