"""Finds the course's folders from any working directory, or says what to do."""

from pathlib import Path


class CourseError(Exception):
    """A failure that is told to the user in one sentence, with its remedy, and without a traceback."""


class CourseNotFound(CourseError, FileNotFoundError):
    """The folder that holds the course could not be found."""


def course_root() -> Path:
    """The nearest folder at or above the working directory that holds the course, else the one the package is in.

    Raises:
        CourseNotFound: neither holds `data/corpus.json` and `notebooks/`.
    """
    here = Path.cwd().resolve()
    package_parent = Path(__file__).resolve().parent.parent
    for folder in (here, *here.parents, package_parent):
        if (folder / "data" / "corpus.json").is_file() and (folder / "notebooks").is_dir():
            return folder
    raise CourseNotFound(
        f"No MoE Lab course here: neither {here} nor a folder above it holds data/corpus.json and notebooks/. "
        "Change into the folder that you cloned and try again."
    )


def data_dir() -> Path:
    """The folder of corpora."""
    return course_root() / "data"


def lessons_dir() -> Path:
    """The folder of lessons, the one source of notebooks and solutions."""
    return course_root() / "lessons"


def notebooks_dir() -> Path:
    """The folder of notebooks with stubs, which a learner opens."""
    return course_root() / "notebooks"


def solutions_dir() -> Path:
    """The folder of solved notebooks with stored outputs."""
    return course_root() / "solutions"


def results_dir() -> Path:
    """The folder of recorded measurements and experiments."""
    return course_root() / "benchmarks" / "results"


def progress_file() -> Path:
    """The learner's own record of exercises tried and passed."""
    return course_root() / "progress" / "progress.jsonl"
