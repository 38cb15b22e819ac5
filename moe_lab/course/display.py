"""How the course shows a status: an icon and a word, never colour alone; in the notebook and as plain text."""

import re
import sys
from html import escape
from typing import Any

# Blue, orange and grey of a palette that colour-blind readers tell apart (Okabe and Ito, 2008); text keeps the
# theme's own colour.
_LOOKS = {
    "passed": ("✔", "passed", "#0072b2"),
    "not started": ("○", "not started", "#808080"),
    "wrong": ("✘", "not right yet", "#d55e00"),
    "failed": ("■", "did not finish", "#d55e00"),
    "not checked": ("–", "not checked", "#808080"),
}
MUTED = "color: var(--jp-ui-font-color2, inherit)"


def word(status: str) -> str:
    """A status in the words that a learner reads."""
    return _LOOKS[status][1]


def colour(status: str) -> str:
    """A status's colour, readable on light and on dark."""
    return _LOOKS[status][2]


def prose(text: str) -> str:
    """A sentence as HTML, what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def badge(status: str) -> str:
    """A status as HTML: icon and word."""
    icon, text, colour = _LOOKS[status]
    return f"<span aria-hidden='true' style='color:{colour}'>{icon}</span> <strong>{escape(text)}</strong>"


def present(shown: Any) -> None:
    """Displays an object in a notebook, prints it elsewhere."""
    if "IPython" in sys.modules and sys.modules["IPython"].get_ipython():
        from IPython.display import display

        display(shown)
        return
    text, encoding = str(shown), getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))  # some consoles cannot say "×"
