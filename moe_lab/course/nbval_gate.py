"""A pytest plugin beside nbval: one more test per notebook, `gate`, that judges what running its cells showed.

nbval passes a notebook that was never executed, and compares nothing where a cell shows only a figure. The gate
fails a notebook that ran no cell, that really compared too little, whose outputs are not fit to publish, or that
took longer than its time badge allows. It needs all cells of a notebook in one process: `--dist loadfile`.
"""

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import nbval.kernel
import pytest
from jupyter_client.manager import KernelManager
from nbformat import NotebookNode
from nbval.plugin import IPyNbCell

from moe_lab.course.form import cell_output_faults
from moe_lab.course.kernels import kernel_sockets

MIN_COMPARED = 0.5
# nbval does not compare these; the text that stands in for a figure says nothing about it either.
NOT_COMPARED = ("image/", "application/vnd.jupyter.widget-view+json")
STAND_IN = re.compile(r"Figure: |<Figure size |<\S+ at 0x")


@dataclass
class Record:
    """What the cells of one notebook did."""

    ran: int = 0
    seconds: float = 0.0
    with_output: int = 0
    compared: int = 0
    never_executed: list[int] = field(default_factory=list)
    faults: dict[str, None] = field(default_factory=dict)  # a dict keeps the order and drops repetitions

    def note(self, cell: IPyNbCell, call: pytest.CallInfo) -> None:
        """Add what one phase of one cell did; setting up the first cell is the kernel's start."""
        if call.when == "teardown":
            return
        self.seconds += call.duration
        if call.when != "call" or (call.excinfo and call.excinfo.errisinstance(pytest.skip.Exception)):
            return
        self.ran += 1
        stored = cell.cell.outputs
        if cell.cell.execution_count is None:
            self.never_executed.append(cell.cell_num)
        elif stored:
            self.with_output += 1
            self.compared += bool(cell.options["check"]) and any(map(is_comparable, stored))
        for fault in cell_output_faults([*stored, *(cell.test_outputs or [])]):
            self.faults[f"code cell {cell.cell_num}: {fault}"] = None


RECORDS = pytest.StashKey[dict[Path, Record]]()


def is_comparable(output: NotebookNode) -> bool:
    """Whether nbval compares something of this output that can differ: text or data, not the stand-in of a figure."""
    if output.output_type == "stream":
        return bool(output.text.strip())
    data = output.get("data", {})
    if any(mime.startswith("image/") for mime in data):
        return False
    return any(
        not mime.startswith(NOT_COMPARED) and not STAND_IN.match("".join(content)) for mime, content in data.items()
    )


class GateFailure(Exception):
    """What the gate found, one line each."""


class Gate(pytest.Item):
    """The test that comes after a notebook's cells."""

    def runtest(self) -> None:
        """Fail with all that is wrong with the notebook."""
        record = self.config.stash[RECORDS].get(self.path, Record())
        badge = nbformat.read(self.path, as_version=4).metadata.get("moe_lab", {}).get("seconds")
        self.user_properties += [
            ("notebook", self.path.stem),
            ("seconds", f"{record.seconds:.1f}"),
            ("badge", str(badge)),
            ("compared", f"{record.compared} of {record.with_output}"),
        ]
        if faults := [*self._faults(record, badge), *record.faults]:
            raise GateFailure("\n".join(faults))

    def _faults(self, record: Record, badge: int | None) -> Iterator[str]:
        strict = not self.config.option.nbval_lax
        factor = self.config.option.badge_factor
        if not record.ran:
            yield "no cell was run"
        if strict and record.never_executed:
            cells = ", ".join(map(str, record.never_executed))
            yield f"code cells {cells} hold no execution count: nothing to compare with, `moe-lab build` stores it"
        if strict and record.compared < MIN_COMPARED * max(record.with_output, 1):
            yield (
                f"compared {record.compared} of {record.with_output} cells with output, at least "
                f"{MIN_COMPARED:.0%} must hold text or data that is compared (figures and ignored cells are not)"
            )
        if badge is None:
            yield "no time badge (moe_lab.seconds in its metadata)"
        elif record.seconds > badge * factor:
            yield f"took {record.seconds:.0f} s, its time badge allows {badge} s × {factor:g}"

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
        """Only the findings: a traceback of the gate would help nobody."""
        if isinstance(excinfo.value, GateFailure):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, int, str]:
        """Where and what, for pytest's headings."""
        return self.path, 0, f"{self.path.name}::gate"


class GateFile(pytest.File):
    """Collects the gate of one notebook, beside nbval's own collector of the cells."""

    def collect(self) -> Iterator[Gate]:
        """The one gate."""
        yield Gate.from_parent(self, name="gate")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The factor by which another machine may be slower than the time badges."""
    parser.getgroup("nbval").addoption("--badge-factor", type=float, default=2.0, help="factor on time badges")


def pytest_configure(config: pytest.Config) -> None:
    """Start without records, and have nbval start kernels as the builder does."""
    config.stash[RECORDS] = {}
    nbval.kernel.KernelManager = lambda **options: KernelManager(**options, **kernel_sockets())


@pytest.hookimpl(trylast=True)  # after the cells
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> GateFile | None:
    """A gate for every notebook that nbval runs."""
    option = parent.config.option
    if file_path.suffix == ".ipynb" and (option.nbval or option.nbval_lax):
        return GateFile.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note what a cell did, whether it passed or not."""
    report = yield
    if isinstance(item, IPyNbCell):
        item.config.stash[RECORDS].setdefault(item.path, Record()).note(item, call)
    return report
