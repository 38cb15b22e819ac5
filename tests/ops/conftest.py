"""What tests of kernels share: memory that does not come clean, and a list of what was launched."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor


@dataclass
class Poison:
    """The shapes of all tensors that were asked for uninitialised."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(self, tensor: Tensor) -> Tensor:
        self.shapes.append(tuple(tensor.shape))
        if not tensor.is_meta:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1)  # 1 is a group, a row and a number of rows
        return tensor


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Memory that nobody has written to holds NaN, or 1 where it is whole numbers: whoever forgets to write is seen."""
    poisoned = Poison()
    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, real=real, **kwargs: poisoned(real(*args, **kwargs)))
    return poisoned


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """The names of the kernels that `moe_lab.ops.launches` starts, in order."""
    from moe_lab.ops import launches

    names = []
    with launches.observed(lambda name, *_: nullcontext(names.append(name))):
        yield names
