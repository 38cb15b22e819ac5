"""Compares what an answer computes with what it should compute, and says in a sentence or two what differs."""

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

STUB = "your turn"
"""A stub is the line `raise NotImplementedError("your turn")`."""


class Refused(Exception):
    """Raised by a chapter's `run` to refuse an answer with a sentence of its own."""


def load_weights(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copies weights into a module by parameter name, so that two implementations can be compared.

    Raises:
        Refused: the module lacks a parameter, has one too many, or one of another shape.
    """
    own = dict(module.named_parameters())
    if set(own) != set(weights):
        has, needs = (", ".join(f"`{name}`" for name in names) or "none" for names in (own, weights))
        raise Refused(f"The parameters should be {needs}; your class has {has}.")
    for name, weight in weights.items():
        if own[name].shape != weight.shape:
            shapes = tuple(own[name].shape), tuple(weight.shape)
            raise Refused(f"The parameter `{name}` has shape {shapes[0]} where {shapes[1]} is expected.")
        own[name].data.copy_(weight)


# --- What is compared -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foreign:
    """Stands for a value that cannot be compared: only what it is is kept, so that none of its code ever runs."""

    kind: str


@dataclass(frozen=True)
class Fields:
    """The named parts of a dataclass or of a module's state."""

    kind: str
    parts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Raised:
    """An exception as text; `line` is where in the learner's own code it came from, if there."""

    kind: str
    message: str
    line: str = ""
    is_stub: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one call did: what it returned or raised, and what it left in its inputs."""

    value: Any = None
    raised: Raised | None = None
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)


@contextmanager
def fresh_state(seed: int = 0) -> Iterator[None]:
    """The same random numbers, dtype and grad mode for every run; afterwards the learner's own, as they were."""
    dtype = torch.get_default_dtype()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        torch.set_default_dtype(torch.float32)
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` also keeps a list for devices not yet in use
        if cuda is not None:
            torch.cuda.manual_seed_all(seed)
        random.seed(seed)
        np.random.seed(seed)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def snapshot(value: Any, depth: int = 0) -> Any:
    """A copy of a tree that nothing can change any more, made of plain types, tensors, `Fields` and `Foreign`."""
    if value is None or type(value) in (bool, int, float, complex, str):
        return value
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            return Foreign("sparse tensor")
        return value.detach().clone().cpu().requires_grad_(value.requires_grad)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.dtype | torch.device):
        return Foreign(str(value))
    if depth < 20:
        if isinstance(value, list | tuple):
            return tuple(snapshot(part, depth + 1) for part in value)
        if isinstance(value, set | frozenset):
            return frozenset(snapshot(part, depth + 1) for part in value)
        if isinstance(value, dict):
            return {snapshot(key, depth + 1): snapshot(part, depth + 1) for key, part in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            parts = {name: snapshot(getattr(value, name, None), depth + 1) for name in names}
            return Fields(type(value).__name__, parts)
        if isinstance(value, torch.nn.Module):
            return Fields(type(value).__name__, snapshot(dict(value.state_dict()), depth + 1))
    return Foreign({"ndarray": "NumPy array"}.get(type(value).__name__, type(value).__name__))


# --- Showing a value --------------------------------------------------------------------------------------------


def show(tree: Any, digits: int = 4) -> str:
    """A tree as short text: small tensors in full, large ones as their shape."""
    match tree:
        case torch.Tensor():
            if tree.numel() > 24:
                return f"{_dtype(tree)} tensor of shape {tuple(tree.shape)}"
            plain = tree.dtype in (torch.float32, torch.int64, torch.bool)
            return f"tensor({_nested(tree.tolist(), digits)}{'' if plain else f', dtype={_dtype(tree)}'})"
        case str():
            return repr(tree if len(tree) <= 200 else tree[:200] + "…")
        case list() | tuple():
            return _nested(tree, digits)
        case frozenset():
            return "{" + ", ".join(sorted(map(show, tree))) + "}"
        case dict():
            return "{" + ", ".join(f"{show(key)}: {show(part, digits)}" for key, part in tree.items()) + "}"
        case Fields():
            return f"{tree.kind}({', '.join(f'{k}={show(part, digits)}' for k, part in tree.parts.items())})"
        case Foreign():
            return f"a value of type {tree.kind}"
        case float():
            text = f"{tree:.{digits}g}"
            return text + ".0" if text.lstrip("-").isdigit() else text
        case _:
            return str(tree)


def _nested(parts: Any, digits: int) -> str:
    if not isinstance(parts, list | tuple):
        return show(parts, digits)
    texts = [_nested(part, digits) for part in parts[:24]] + ["…"] * (len(parts) > 24)
    return f"[{', '.join(texts)}]"


def show_pair(expected: Any, got: Any) -> tuple[str, str]:
    """Both values as text, with enough digits to see the difference; of large tensors the worst element."""
    if _both_tensors(expected, got) and expected.shape == got.shape and expected.numel() > 24:
        one, other = _plain(expected), _plain(got)
        gap = (one - other).abs().nan_to_num(math.inf)
        gap = gap.masked_fill((one == other) | (one.isnan() & other.isnan()), 0)  # also of equal infinities
        worst = [int(i) for i in np.unravel_index(int(gap.argmax()), tuple(gap.shape))]
        at = f"element {worst} of the {_dtype(expected)} tensor of shape {tuple(expected.shape)}: "
        texts = show_pair(expected[tuple(worst)].item(), got[tuple(worst)].item())
        return at + texts[0], at + texts[1]
    short = show(expected), show(got)
    return short if short[0] != short[1] else (show(expected, 8), show(got, 8))


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _both_tensors(a: Any, b: Any) -> bool:
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.complex128) if tensor.is_complex() else tensor.double()


# --- Comparing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One difference; `where` names the part of the result ("" for the whole)."""

    kind: str
    headline: str
    says: str
    where: str = ""
    expected: Any = None
    got: Any = None


GENTLE = ("no gradient", "inputs", "other error")
"""Differences that do not keep a mistake of the bank from being recognised by its values."""


def compare(expected: Run, got: Run, rtol: float, atol: float) -> Difference | None:
    """The difference that matters most between two runs, or None."""
    if got.raised:
        if expected.raised is None:
            return _raises(got.raised)
        if expected.raised.kind != got.raised.kind:
            return Difference(
                kind="other error",
                headline=f"It raises {got.raised.kind}",
                says=f"{_article(expected.raised.kind)} is expected here, not {_article(got.raised.kind)}.",
                expected=Foreign(expected.raised.kind),
                got=Foreign(got.raised.kind),
            )
    elif expected.raised:
        return Difference(
            kind="no error",
            headline=f"It should raise {expected.raised.kind}",
            says=f"This input is not valid: {_article(expected.raised.kind)} is expected, not a result.",
            expected=Foreign(expected.raised.kind),
            got=got.value,
        )
    found = list(differences(expected.value, got.value, rtol, atol))
    for difference in differences(expected.inputs, got.inputs, rtol, atol):
        found.append(
            dataclasses.replace(
                difference,
                kind="inputs",
                headline="It changes its input",
                says=f"After the call `{difference.where}` is not what it should be: your code changes it in place. "
                "The caller still needs it; work on a copy (`.clone()`), or use an operation without a trailing `_`.",
            )
        )
    return min(found, key=lambda difference: difference.kind in GENTLE, default=None)


def matches(expected: list[Run], mistake: list[Run], got: list[Run], rtol: float, atol: float) -> bool:
    """Whether a learner's runs are those of a mistake: equal on every case, and wrong on at least one.

    Where the mistake raises, its result is undefined: there the learner's need only be wrong too, as long as another
    case shows the mistake in its values. If it only ever raises, the learner's code must raise the same, word by word.
    """
    wrongs = [compare(e, m, rtol, atol) for e, m in zip(expected, mistake, strict=True)]
    by_value = any(w and w.kind not in GENTLE and not m.raised for w, m in zip(wrongs, mistake, strict=True))

    def fits(e: Run, m: Run, g: Run) -> bool:
        if m.raised and by_value:
            return compare(e, g, rtol, atol) is not None
        if m.raised:
            return g.raised is not None and (g.raised.kind, g.raised.message) == (m.raised.kind, m.raised.message)
        difference = compare(m, g, rtol, atol)
        return difference is None or (by_value and difference.kind in GENTLE)

    return any(wrongs) and all(map(fits, expected, mistake, got))


def rules_out(mistake: Run, got: Run, rtol: float, atol: float) -> bool:
    """Whether this one case already tells that a learner's runs do not match the mistake."""
    difference = None if mistake.raised else compare(mistake, got, rtol, atol)
    return difference is not None and difference.kind not in GENTLE


def differences(expected: Any, got: Any, rtol: float, atol: float, where: str = "") -> Iterator[Difference]:
    """All differences between two snapshots, in order."""

    def differ(kind: str, headline: str, says: str) -> Difference:
        subject = f"“{where}”" if where else "Your result"
        return Difference(
            kind=kind, headline=headline, says=f"{subject} {says}", where=where, expected=expected, got=got
        )

    if got is None and expected is not None:
        hint = "" if where else ": is the `return` missing?"
        yield differ("none", "None came back", f"is None where {_what(expected)} is expected{hint}")
        return
    if isinstance(got, torch.Tensor) and got.ndim == 0 and type(expected) in (bool, int, float):
        got = got.item()  # a fair teacher takes a 0-d tensor for a number
    if not _same_kind(expected, got):
        yield differ("type", "The type is wrong", _type_hint(expected, got))
        return

    match expected:
        case torch.Tensor():
            yield from _tensor_differences(expected, got, rtol, atol, differ)
        case tuple():
            if len(expected) != len(got):
                yield differ("structure", "The length is wrong", f"has {len(got)} parts, not {len(expected)}.")
            elif _is_reordered(expected, got):
                yield differ("value", "The order is wrong", "holds the right values in another order.")
            else:
                for i, (one, other) in enumerate(zip(expected, got, strict=True)):
                    yield from differences(one, other, rtol, atol, f"{where or 'result'}[{i}]")
        case dict():
            missing, extra = [k for k in expected if k not in got], [k for k in got if k not in expected]
            if missing or extra:
                says = [f"lacks {', '.join(map(show, missing))}"] if missing else []
                says += [f"has {', '.join(map(show, extra))}, which is not expected"] if extra else []
                yield differ("structure", "The keys are wrong", f"{' and '.join(says)}.")
            for key in (k for k in expected if k in got):
                inner = f"{where}[{show(key)}]" if where else str(key)
                yield from differences(expected[key], got[key], rtol, atol, inner)
        case Fields():
            for name, part in expected.parts.items():
                yield from differences(part, got.parts.get(name), rtol, atol, f"{where}.{name}".lstrip("."))
        case float() | complex():
            if not _close(expected, got, rtol, atol):
                nan = not math.isfinite(abs(got)) and math.isfinite(abs(expected))
                kind, headline = ("nan", "NaN or infinity") if nan else ("value", "The value is wrong")
                yield differ(kind, headline, _number_hint(expected, got))
        case int() if not isinstance(expected, bool):
            if expected != got:
                yield differ("value", "The value is wrong", _number_hint(expected, got))
        case _:
            if expected != got:
                yield differ("value", "The value is wrong", "is not the expected one.")


def _tensor_differences(expected, got, rtol, atol, differ) -> Iterator[Difference]:
    if expected.shape != got.shape:
        says = f"has shape {tuple(got.shape)} where {tuple(expected.shape)} is expected"
        yield differ("shape", "The shape is wrong", f"{says}{_shape_hint(expected.shape, got.shape)}.")
        return
    if expected.dtype != got.dtype:
        says = f"has dtype {_dtype(got)} where {_dtype(expected)} is expected."
        yield differ("dtype", "The dtype is wrong", says)
        return
    one, other = _plain(expected), _plain(got)
    close = torch.isclose(other, one, rtol=rtol, atol=atol, equal_nan=True)
    if not expected.is_floating_point() and not expected.is_complex():
        close = expected == got
    if not close.all():
        broken = (~torch.isfinite(other) & torch.isfinite(one)).sum().item()
        if broken:
            what = "NaN" if other.isnan().any() else "infinite"
            says = f"is {what} in {broken} of {got.numel()} elements"
            if what == "infinite" and one.isinf().any():  # an infinity that was asked for: a mask
                says += " that should be numbers: does the mask cover too much?"
            else:
                says += ": look for 0/0, a log or root of a negative number, or a softmax over a row that is −inf "
                says += "throughout."
            yield differ("nan", "NaN or infinity", says)
        else:
            yield differ("value", "The values are wrong", _value_hint(one, other, close, rtol, atol))
    elif expected.requires_grad and not got.requires_grad:
        says = "has the right values but carries no gradient: `.item()`, `.detach()`, `.data`, `torch.tensor(…)` "
        says += "or `torch.no_grad()` cuts it off from what it was computed from."
        yield differ("no gradient", "No gradient flows", says)


def _raises(raised: Raised) -> Difference:
    kind, message = raised.kind, raised.message
    headline, says = f"It raises {kind}", message or "The exception has no message."
    if kind == "Refused":
        headline, says = "Not yet", message
    elif kind == "SystemExit":
        headline, says = "It calls exit", "An exercise only returns its result; take the call of `exit()` out."
    elif kind == "RecursionError":
        headline, says = "It calls itself without end", "A recursion needs a case in which it stops."
    elif "does not require grad" in message or "not have been used in the graph" in message:
        headline = "No gradient flows"
        says = "The gradient does not reach every input: `.item()`, `.detach()`, `.data`, `torch.tensor(…)` or "
        says += "`torch.no_grad()` cuts a result off from what it was computed from."
    if raised.line:
        says += f"\nIt happens at {raised.line}"
    return Difference(
        kind="refused" if kind == "Refused" else "raises", headline=headline, says=says, got=Foreign(kind)
    )


# --- Hints --------------------------------------------------------------------------------------------------------


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _what(value: Any) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a string", dict: "a dict"}
    names[frozenset] = "a set"
    match value:
        case torch.Tensor():
            return "a tensor"
        case tuple():
            return f"a tuple or list of {len(value)}"
        case Fields() | Foreign():
            return _article(value.kind)
        case None:
            return "None"
    return names.get(type(value), _article(type(value).__name__))


def _same_kind(expected: Any, got: Any) -> bool:
    if isinstance(expected, Foreign):
        return expected == got
    if isinstance(expected, float):  # a whole number is a number
        return type(got) in (int, float)
    return type(expected) is type(got) or _both_tensors(expected, got)


def _type_hint(expected: Any, got: Any) -> str:
    says = f"is {_what(got)} where {_what(expected)} is expected"
    if isinstance(expected, torch.Tensor) and type(got) in (bool, int, float):
        return f"{says}: leave out `.item()`, for a Python number carries no gradient."
    if type(expected) is int and type(got) is float:
        return f"{says}: use `//` to divide, or `int()` at the end."
    if got == Foreign("generator"):
        return f"{says}: `yield` makes a generator, `return` a result."
    return f"{says}."


def _shape_hint(expected: torch.Size, got: torch.Size) -> str:
    one, other = list(expected), list(got)
    if len(one) == len(other):
        swapped = [i for i in range(len(one)) if one[i] != other[i]]
        if len(swapped) == 2 and sorted(one) == sorted(other):
            return f": dimensions {swapped[0]} and {swapped[1]} are swapped (transposed)"
        return ""
    longer, shorter, word = (one, other, "missing") if len(one) > len(other) else (other, one, "too many")
    for i in range(len(longer)):
        if longer[:i] + longer[i + 1 :] == shorter:
            verb = "is" if word == "missing" else "is one"
            return f": dimension {i} (of size {longer[i]}) {verb} {word}"
    return ""


def _value_hint(expected, got, close, rtol, atol) -> str:
    def near(a, b):
        return torch.allclose(a, b, rtol=max(rtol, 1e-4), atol=atol, equal_nan=True)

    if not got.any():
        return "is zero everywhere."
    lost = int((expected.isinf() & (got != expected)).sum())
    if lost:  # no number is near to an infinity
        return f"lacks {lost} of {int(expected.isinf().sum())} infinities: was the result of a mask kept?"
    if expected.ndim >= 2 and expected.shape[-1] == expected.shape[-2] and near(got.mT, expected):
        return "is the transpose of the expected one."
    if not expected.is_complex():
        factor = (got * expected).sum() / (expected * expected).sum().clamp_min(1e-300)
        is_one = math.isclose(factor, 1, rel_tol=1e-3)
        if not is_one and near(got, factor * expected) and (expected.unique().numel() > 1 or _factor(factor.item())):
            return _times(factor.item())
        if expected.numel() > 1 and near(got.flatten().sort().values, expected.flatten().sort().values):
            return "holds the right numbers in another order."
        shift = (got - expected).mean()
        if expected.numel() > 2 and near(got - shift, expected):
            return f"is off by the same amount, {show(shift.item())}, everywhere."
        if ((got - expected).abs() <= 0.02 * expected.abs().max()).all():
            return "is close, but not close enough: is something rounded, left out, or computed in a lower precision?"
    wrong = int((~close).sum())
    return f"has the right shape and dtype, but {wrong} of {close.numel()} numbers are not the expected ones."


def _number_hint(expected: complex, got: complex) -> str:
    if not math.isfinite(abs(got)):
        return f"is {got}."
    if not isinstance(expected, complex) and expected and _factor(got / expected):
        return _times(got / expected)
    return "is not the expected one."


def _factor(ratio: float) -> str:
    """A factor that people know by name, or "" (a small whole number, its inverse or its root; either sign)."""
    size = abs(ratio)
    for n in range(1, 65):
        sign = "minus " if ratio < 0 else ""
        for value, name in ((n, f"{n} times"), (1 / n, f"1/{n} of"), (n**0.5, f"√{n} times"), (n**-0.5, f"1/√{n} of")):
            if math.isclose(size, value, rel_tol=1e-5):
                return sign + {"2 times": "twice", "1/2 of": "half of", "1 times": "the same as"}.get(name, name)
    return ""


def _times(ratio: float) -> str:
    if math.isclose(ratio, -1, rel_tol=1e-5):
        return "is the expected one with the opposite sign."
    name = _factor(ratio)
    return f"is exactly {name} the expected one." if name else f"is {show(ratio)} times the expected one throughout."


def _is_reordered(expected: tuple, got: tuple) -> bool:
    try:
        return expected != got and sorted(expected) == sorted(got)
    except (TypeError, ValueError, RuntimeError):  # tensors and mixed parts have no order
        return False


def _close(expected: complex, got: complex, rtol: float, atol: float) -> bool:
    both_nan = expected != expected and got != got
    return both_nan or expected == got or abs(expected - got) <= atol + rtol * abs(expected)
