"""One JupyterLab for all browser tests; a test that fails leaves a screenshot and the server's words."""

import pytest
from driving import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A fresh copy of the course, opened in the browser at notebook 00."""
    with Lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    running = item.funcargs.get("lab") if hasattr(item, "funcargs") else None
    if report.when == "call" and report.failed and isinstance(running, Lab):
        picture = running.log.with_name(f"{item.name}.png")
        try:
            running.page.screenshot(path=picture, timeout=5000)
            report.sections.append(("screenshot", str(picture)))
        except Exception as error:  # whatever broke the test may have broken the browser
            report.sections.append(("screenshot", f"could not be taken: {error}"))
        report.sections.append(("what the server said", running.said()))
    return report
