"""Imports point one way, and `import moe_lab` is light: both are kept here."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moe_lab"

# Each module may import those before it; `course`, `viz` and `cli` may import everything.
ORDER = [
    *("paths", "config", "plain", "machine", "accounting", "presets", "roofline", "config_json"),
    *("records", "ops", "ffn", "routing", "dispatch", "experts", "moe", "attention", "data", "lm", "balance", "train"),
    *("checkpoints", "hugging_face", "experiments", "parallel", "claims"),
]
ON_TOP = ("viz", "bench", "gpu", "runs", "course", "commands", "cli", "__main__")


def imported_modules(path: Path) -> set[str]:
    """First-level modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moe_lab"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("moe_lab.")}
    return found


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {
        p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file()
    }
    assert modules - {"__init__"} == set(ORDER) | set(ON_TOP)


@pytest.mark.parametrize("module", ORDER)
def test_imports_point_one_way(module):
    allowed = set(ORDER[: ORDER.index(module)])
    folder = PACKAGE / module
    files = folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{module}.py"]
    for path in files:
        assert imported_modules(path) <= allowed | {module}


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()} | set(done.stdout.split())


HEAVY = {"torch", "triton", "matplotlib", "ipywidgets", "IPython", "numpy", "jupytext"}


@pytest.mark.parametrize(
    ("statement", "must_not_load"),
    [
        ("import moe_lab", HEAVY),
        ("import moe_lab.accounting, moe_lab.presets, moe_lab.roofline, moe_lab.config_json", HEAVY),
        ("import moe_lab.claims, moe_lab.commands.count, moe_lab.commands.claims", HEAVY),
        ("import moe_lab.cli", HEAVY),
        ("import moe_lab.parallel.cost", HEAVY),
        ("import moe_lab.train, moe_lab.lm, moe_lab.moe", {"triton", "matplotlib", "ipywidgets", "IPython"}),
    ],
)
def test_imports_are_light(statement, must_not_load):
    assert not loaded_after(statement) & must_not_load


def test_course_loads_only_the_chapter_asked_for():
    loaded = loaded_after("from moe_lab.course.bank import find; find('1.1')")
    chapters = {name for name in loaded if name.startswith("moe_lab.course.chapters.ch")}
    assert chapters == {"moe_lab.course.chapters.ch01"}


def test_names_are_loaded_when_used():
    import moe_lab

    for name in moe_lab.__all__:
        assert getattr(moe_lab, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        moe_lab.nonsense  # noqa: B018


def test_names_of_expert_parallelism_are_what_they_were_after_any_import():
    """A submodule of a function's name would take its place as soon as it is imported."""
    from moe_lab import parallel

    submodules = {path.stem for path in (PACKAGE / "parallel").glob("*.py")}
    assert not submodules & set(parallel.__all__)
    homes = {name: getattr(parallel, name).__module__ for name in parallel.__all__ if name != "FORMS"}
    assert {name: home.rpartition(".")[0] for name, home in homes.items()} == dict.fromkeys(homes, "moe_lab.parallel")
    assert set(parallel.__all__) <= set(dir(parallel))
    with pytest.raises(AttributeError, match="nonsense"):
        parallel.nonsense  # noqa: B018


@pytest.mark.parametrize("package", ["course", "viz"])
def test_no_circle_inside_a_package(package):
    graph = {}
    for path in (PACKAGE / package).rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
        targets = {node.module for node in froms} | {f"{node.module}.{a.name}" for node in froms for a in node.names}
        graph[name] = targets - {name}
    inside = {name: targets & graph.keys() - {f"moe_lab.{package}"} for name, targets in graph.items()}
    graphlib.TopologicalSorter(inside).prepare()  # raises CycleError, which names the circle
