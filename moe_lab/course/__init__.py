"""What a notebook needs of the course: exercises that check themselves, and the learner's progress."""

import importlib

_HOME = {
    "exercise": "moe_lab.course.exercises",
    "show_progress": "moe_lab.course.progress",
}

__all__ = ["exercise", "show_progress"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
