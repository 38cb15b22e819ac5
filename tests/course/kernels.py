"""A real kernel for the tests, as a notebook has it."""

import io
import os
from pathlib import Path

SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import example_chapter
from dataclasses import replace
example_chapter.EXERCISES = tuple(replace(e, seconds={{seconds}}) for e in example_chapter.EXERCISES)
example_chapter.install()
from moe_lab.course import exercise, show_progress
"""


class Kernel:
    """A kernel that knows the example chapter.

    Args:
        seconds: the time limit of its exercises.
        session: what Jupyter's server would call the notebook; without one no learner is at work.
    """

    def __init__(self, seconds: float, session: str | None = None, cwd: Path | None = None):
        from jupyter_client.manager import start_new_kernel

        env = {name: value for name, value in os.environ.items() if name not in ("PYTEST_VERSION", "JPY_SESSION_NAME")}
        env |= {"JPY_SESSION_NAME": session} if session else {}
        self.manager, self.client = start_new_kernel(kernel_name="python3", env=env, cwd=str(cwd or Path.cwd()))
        said = self.run(SETUP.format(seconds=seconds))
        assert said == "", said

    def run(self, code: str) -> str:
        """Runs a cell and returns all that it prints, shows or raises, as text."""
        said = io.StringIO()

        def hear(message: dict) -> None:
            content = message["content"]
            said.write(content.get("text") or content.get("data", {}).get("text/plain") or content.get("ename") or "")

        self.client.execute_interactive(code, timeout=60, output_hook=hear, allow_stdin=False)
        return said.getvalue()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
