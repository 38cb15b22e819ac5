"""The ledger of claims: what popular articles say about mixtures of experts, and what settles each of them.

`data/claims.yaml` holds the claims. The verdict is a judgement, `why` its reason: a claim can be numerically right and
mislead. The code judges numbers only: `Claim.check` evaluates the expressions of a claim and holds what they give to
what the ledger says. No torch.
"""

import ast
import difflib
import html
import importlib
import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import yaml

from moe_lab.paths import CourseError, data_dir, results_dir
from moe_lab.presets import find_preset

VERDICTS = ("true", "roughly", "misleading", "false", "undisclosed")

# What settles a claim, and of these a claim has exactly one:
KINDS = {
    "computes": "expressions over released configurations, held to the stated values",
    "recorded": "expressions over the recorded runs of this course, held to the stated values",
    "stated": "arithmetic on figures as a source states them",
    "shown": "a cell of a lesson, whose printed result says it",
    "cited": "reading a source",
    "open": "nothing yet: a later notebook",
}

# Short names of presets, as expressions write them.
MODELS = {
    "Llama7B": "Llama-7B",
    "Llama70B": "Llama 3 70B",
    "Llama405B": "Llama 3.1 405B",
    "Mistral": "Mistral-7B",
    "Qwen72B": "Qwen2.5-72B",
    "DeepSeek67B": "DeepSeek-67B",
    "Mixtral": "Mixtral 8x7B",
    "Mixtral22B": "Mixtral 8x22B",
    "DeepSeekMoE": "DeepSeekMoE-16B",
    "V2": "DeepSeek-V2",
    "V3": "DeepSeek-V3",
    "K2": "Kimi-K2",
    "Qwen3": "Qwen3-30B-A3B",
    "OLMoE": "OLMoE-1B-7B",
    "GptOss20B": "gpt-oss-20b",
    "GptOss120B": "gpt-oss-120b",
    "Scout": "Llama 4 Scout",
    "SwitchC": "Switch-C-2048",
}

# Where the other names of expressions come from.
_HOMES = {
    "accounting": """activation_bytes attention_parameters cache_bytes cache_numbers count_flops count_mtp
        count_parameters decode_reads distinct_experts expert_parameters ffn_parameters fp8_checkpoint_bytes
        layer_flops moe_parameters mxfp4_checkpoint_bytes router_parameters shared_expert_parameters six_nd
        training_bytes training_flops_per_token weight_bytes""",
    "roofline": "GPUS decode prefill utilisation",
    "parallel.cost": """DEEPSEEK_V3 H800_INFINIBAND Layout Travel all_gather_bytes all_reduce_bytes all_to_all_bytes
        expected_copies expected_distinct expected_nodes row_bytes traffic""",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
_PLAIN = {
    function.__name__: function
    for function in (abs, all, any, len, list, max, min, range, round, set, sorted, sum, zip)
}


class LedgerError(CourseError, ValueError):
    """The file of claims is wrong; the message names the claim and the field."""


# --- Expressions --------------------------------------------------------------------------------------------------

_ALLOWED = (
    *(ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Store, ast.Attribute, ast.Call, ast.keyword),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.operator, ast.unaryop, ast.boolop, ast.cmpop),
    *(ast.Tuple, ast.List, ast.Set, ast.Dict, ast.Subscript, ast.Slice),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.comprehension),
)
_PRIVATE = ("_", "f_", "gi_", "format")  # what leads from a value to the interpreter: frames, and formats that read on


def evaluate(expression: str) -> object:
    """What an expression gives, over names of the API, of presets and of a few plain functions, and nothing else.

    Raises:
        ValueError: what is no expression, or more than names, attributes, calls, numbers, strings, arithmetic,
            comparisons, collections and comprehensions; an unknown name; an error while it is evaluated.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is no expression: {error.msg}.") from None
    names: dict[type, set[str]] = {ast.Load: set(), ast.Store: set()}
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise ValueError(f"{expression!r}: {type(node).__name__} is not allowed in an expression.")
        name = {ast.Name: "id", ast.Attribute: "attr"}.get(type(node))
        if name and getattr(node, name).startswith(_PRIVATE):
            raise ValueError(f"{expression!r}: the name {getattr(node, name)!r} is not allowed in an expression.")
        if isinstance(node, ast.Name):
            names[type(node.ctx)].add(node.id)
    values = {name: _look_up(name, expression) for name in sorted(names[ast.Load] - names[ast.Store])}
    try:
        return eval(compile(tree, "<claim>", "eval"), {"__builtins__": {}} | values)
    except (ArithmeticError, AttributeError, LookupError, NameError, TypeError, ValueError) as error:
        raise ValueError(f"{expression!r}: {type(error).__name__}: {error}") from error


def _look_up(name: str, expression: str) -> object:
    if name in MODELS:
        return find_preset(MODELS[name]).config
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"moe_lab.{_HOME_OF[name]}"), name)
    own = _PLAIN | {"math": math, "recorded": recorded, "loads": loads}
    if name not in own:
        near = difflib.get_close_matches(name, [*MODELS, *_HOME_OF, *own], n=1, cutoff=0.5)
        raise ValueError(f"{expression!r}: unknown name {name!r}{f'; the nearest is {near[0]!r}' if near else ''}.")
    return own[name]


def recorded(experiment: str, variant: str, measure: str = "mean", layer: int | None = None) -> list[float]:
    """One measure of every recorded run of a variant, a run a seed; with a `layer` (from 0), one of that layer's.

    Raises:
        ValueError: nothing of that kind is recorded.
    """
    measured = _runs(experiment, variant)
    if layer is not None:
        measured = [_pick("layer", layer, dict(enumerate(run["layers"]))) for run in measured]
    numbers = [{name: of[name] for name in of if name != "seed" and _is_number(of[name])} for of in measured]
    return [_pick("measure", measure, of) for of in numbers]


def loads(experiment: str, variant: str, layer: int, seed: int = 0) -> list[list[float]]:
    """Which share of the tokens each expert got, between one point of a recorded training and the next.

    Raises:
        ValueError: nothing of that kind is recorded.
    """
    curve = _pick("seed", seed, {run["seed"]: run for run in _runs(experiment, variant)})["curve"]
    counts = [_pick("layer", layer, dict(enumerate(point["load"]))) for point in curve]
    return [[n / sum(experts) for n in experts] for experts in counts]


def _pick(name: str, wanted: str | int, found: Mapping) -> object:
    if wanted not in found:
        expected = f"expected one of {', '.join(map(str, found))}" if found else "there is none"
        raise ValueError(f"{name}={wanted!r}: {expected}.")
    return found[wanted]


def _runs(experiment: str, variant: str) -> list[Mapping]:
    path = results_dir() / "experiments" / f"{experiment}.json"
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except FileNotFoundError:
        raise ValueError(f"experiment={experiment!r}: {path.name} is not among the recorded results.") from None
    by_variant: dict[str, list[Mapping]] = {}
    for run in runs:
        by_variant.setdefault(run["variant"], []).append(run)
    return _pick("variant", variant, by_variant)


# --- A claim ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Source:
    """A primary source.

    Args:
        second_hand: read only in excerpts, in an abstract or an annotated copy; a complete text in another format is
            not marked.
    """

    tag: str
    citation: str
    link: str
    second_hand: bool = False

    def __str__(self) -> str:
        return f"{self.citation}{' (second-hand)' if self.second_hand else ''} {self.link}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """An expression, and what it has to give.

    Args:
        gives: a number, a truth value, a string, or a list of these.
        within: for a number, how far off it may be: a number in its own unit, or per cent of it ("1%"); 0 is exactly.
        what: what the number is, with its unit.
    """

    expression: str
    gives: object
    what: str
    within: float | str = 0

    @property
    def tolerance(self) -> float:
        """How far off a number may be, in its own unit."""
        if isinstance(self.within, str):
            return float(self.within.removesuffix("%")) / 100 * abs(self.gives)
        return self.within

    def __str__(self) -> str:
        return f"{show(self.gives)} ({self.what})"

    def check(self) -> "Check":
        """Evaluates the expression, and holds it to what it has to give.

        Raises:
            ValueError: the expression cannot be evaluated.
        """
        got = evaluate(self.expression)
        return Check(line=self, got=list(got) if isinstance(got, tuple) else got)


@dataclass(frozen=True, kw_only=True)
class Check:
    """What an expression gave."""

    line: Line
    got: object

    @property
    def expression(self) -> str:
        """What was evaluated."""
        return self.line.expression

    @property
    def expected(self) -> object:
        """What the ledger says."""
        return self.line.gives

    @property
    def ok(self) -> bool:
        """Whether the ledger's number holds."""
        if _is_number(self.expected):
            return _is_number(self.got) and abs(self.got - self.expected) <= self.line.tolerance
        return type(self.got) is type(self.expected) and self.got == self.expected


class Checks(tuple):
    """The checks of one claim; they print as a table."""

    _HEADS = ("", "computed", "ledger", "expression")

    @property
    def ok(self) -> bool:
        """Whether all hold. A claim without expressions has nothing that could fail."""
        return all(check.ok for check in self)

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                "holds" if check.ok else "FAILS",
                show(check.got),
                str(check.line),
                check.expression,
            )
            for check in self
        ]

    def __str__(self) -> str:
        if not self:
            return "Nothing to compute."
        return _text_table(self._HEADS, self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(*row[:-1], _code(row[-1])) for row in self._rows()]
        return _html_table(self._HEADS, rows) if rows else "Nothing to compute."


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A cell of a lesson: the one that has the text `cell`, and prints the text `prints` when it is solved."""

    lesson: str
    cell: str
    prints: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What an article says, in our words, and what settles it.

    Args:
        article: what the article is, in a few words of ours.
        verdict: a judgement, one of `VERDICTS`.
        value: what is right, in a sentence.
        why: the reason for the verdict.
        withheld: the model whose numbers nobody disclosed; then nothing is computed.
        computes, recorded, stated, shown, cited, open: exactly one of them, see `KINDS`. `cited` is what the source
            says, `open` the number of the notebook that will settle it.
    """

    id: str
    article: str
    claim: str
    verdict: str
    value: str
    why: str
    sources: tuple[Source, ...] = ()
    withheld: str | None = None
    computes: tuple[Line, ...] = ()
    recorded: tuple[Line, ...] = ()
    stated: tuple[Line, ...] = ()
    shown: Shown | None = None
    cited: str | None = None
    open: str | None = None

    @property
    def kind(self) -> str:
        """What settles it, one of `KINDS`."""
        return next(kind for kind in KINDS if getattr(self, kind))

    @property
    def standing(self) -> str:
        """The verdict; of an open claim, which way its author leans."""
        return f"open, leaning {self.verdict}" if self.open else self.verdict

    @property
    def lines(self) -> tuple[Line, ...]:
        """Its expressions, if it has any."""
        return self.computes or self.recorded or self.stated

    def check(self) -> Checks:
        """Evaluates every expression of the claim; empty where something else settles it.

        Raises:
            ValueError: an expression that cannot be evaluated; the message names the claim.
        """
        try:
            return Checks(line.check() for line in self.lines)
        except ValueError as error:
            raise ValueError(f"{self.id}: {error}") from error

    def _settled_by(self) -> list[str]:
        if self.lines:
            return [text for line in self.lines for text in (line.expression, f"= {line}")]
        if self.shown:
            prints = "; ".join(" ".join(line.split()) for line in self.shown.prints.splitlines())
            return [f"notebook {self.shown.lesson}, the cell with `{self.shown.cell}`, prints: {prints}"]
        return [self.cited or f"notebook {self.open} will settle it"]

    def __str__(self) -> str:
        parts = [("claim", self.claim), ("value", self.value), ("why", self.why)]
        parts += [(self.kind if i == 0 else "", text) for i, text in enumerate(self._settled_by())]
        parts += [("sources" if i == 0 else "", str(source)) for i, source in enumerate(self.sources)]
        wrapped = (
            textwrap.fill(
                text,
                width=79,
                initial_indent=f"  {name:<10}",
                subsequent_indent=" " * 12,
                break_long_words=False,
                break_on_hyphens=False,
            )
            for name, text in parts
        )
        return "\n".join([f"{self.id} · {self.standing} · {self.article}", *wrapped])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = [("claim", html.escape(self.claim)), ("verdict", f"<b>{self.standing}</b>: {html.escape(self.why)}")]
        cells += [("value", html.escape(self.value))]
        settled = [f"{_code(line.expression)}<br>= {html.escape(str(line))}" for line in self.lines]
        settled = settled or map(html.escape, self._settled_by())
        cells += [(self.kind, "<br>".join(settled)), ("sources", "<br>".join(map(_link, self.sources)) or "none")]
        left = "style='text-align:left;vertical-align:top'"
        rows = "".join(f"<tr><th {left}>{name}</th><td {left}>{cell}</td></tr>" for name, cell in cells)
        return f"<table><caption>{self.id} · {html.escape(self.article)}</caption>{rows}</table>"


class Ledger(dict[str, Claim]):
    """Claims by their ids; they print as a table."""

    def __missing__(self, claim_id: str) -> Claim:
        near = difflib.get_close_matches(str(claim_id).upper(), self, n=3, cutoff=0)
        raise ValueError(f"claim={claim_id!r}: there is no such claim. The nearest are {', '.join(near)}.")

    def where(self, **wanted: str) -> Self:
        """Those whose fields are as wanted: `where(verdict="false")`, `where(kind="open")`, `where(article="S0")`.

        Raises:
            ValueError: nothing to ask for by that name, or a value that no claim has.
        """
        asked = {"article": lambda claim: claim.id.split(".")[0]}
        asked |= {
            name: lambda claim, name=name: getattr(claim, name) for name in ("verdict", "kind", "open", "withheld")
        }
        if unknown := sorted(wanted.keys() - asked.keys()):
            raise ValueError(f"{unknown[0]}={wanted[unknown[0]]!r}: expected one of {', '.join(asked)}.")
        for name, value in wanted.items():
            known = {"verdict": VERDICTS, "kind": KINDS}.get(name, {asked[name](claim) for claim in self.values()})
            if value not in known:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(sorted(filter(None, known)))}.")
        return type(self)(
            (claim.id, claim)
            for claim in self.values()
            if all(asked[name](claim) == value for name, value in wanted.items())
        )

    def counts(self) -> dict[str, Counter]:
        """For each verdict, how many claims each kind settles."""
        return {word: Counter(claim.kind for claim in self.where(verdict=word).values()) for word in VERDICTS}

    def summary(self) -> str:
        """`counts` as a table, with its sums."""
        counts = self.counts()
        counts["all"] = sum(counts.values(), Counter())
        rows = [(word, *(str(of[kind]) for kind in KINDS), str(of.total())) for word, of in counts.items()]
        return _text_table(("", *KINDS, "all"), rows)

    def _rows(self) -> list[tuple[str, ...]]:
        return [(claim.id, claim.standing, claim.kind, claim.claim) for claim in self.values()]

    def __str__(self) -> str:
        return _text_table(("claim", "verdict", "settled by", "it says"), self._rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return _html_table(("claim", "verdict", "settled by", "it says"), map(_escaped, self._rows()))


# --- Reading the file -----------------------------------------------------------------------------------------------


def load_claims(path: Path | None = None) -> Ledger:
    """All claims by their ids, in the order of the articles; by default those of `data/claims.yaml`.

    Raises:
        LedgerError: the file is wrong; the message names the claim and the field.
    """
    path = path or data_dir() / "claims.yaml"
    try:
        ledger = yaml.load(path.read_text(encoding="utf-8"), Loader=_OneOfEachKey)
    except FileNotFoundError:
        raise LedgerError(f"{path} does not exist: get it again from where you got the course.") from None
    except yaml.YAMLError as error:
        raise LedgerError(f"{path.name} is no YAML: {error}") from None
    _require_keys(ledger, path.name, {"sources", "articles", "claims"})
    for field, kind in {"sources": dict, "articles": dict, "claims": list}.items():
        if not isinstance(ledger[field], kind):
            raise LedgerError(f"{path.name}: {field} is no {'list' if kind is list else 'mapping from names'}.")
    sources = {tag: _source(tag, entry) for tag, entry in ledger["sources"].items()}
    claims = Ledger()
    for entry in ledger["claims"]:
        claim = _claim(entry, ledger["articles"], sources)
        if claim.id in claims:
            raise LedgerError(f"{claim.id}: id is there twice.")
        claims[claim.id] = claim
    return claims


class _OneOfEachKey(yaml.SafeLoader):
    """YAML in which a key that is there twice is a mistake, not an overwritten value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key, n in Counter(keys).items() if n > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _require_keys(entry: object, where: str, required: Iterable[str], optional: Iterable[str] = ()) -> None:
    if not isinstance(entry, dict):
        raise LedgerError(f"{where}: {entry!r} has no fields: expected {', '.join(sorted(required))}.")
    if missing := sorted(set(required) - entry.keys()):
        raise LedgerError(f"{where}: {missing[0]} is missing.")
    if unknown := sorted(map(str, entry.keys() - set(required) - set(optional))):
        near = difflib.get_close_matches(unknown[0], [*required, *optional], n=1, cutoff=0)
        raise LedgerError(f"{where}: {unknown[0]} is no field; the nearest is {near[0]}.")


def _source(tag: str, entry: object) -> Source:
    _require_keys(entry, f"source {tag}", {"citation", "link"}, {"second_hand"})
    if not (_is_text(entry["citation"]) and str(entry["link"]).startswith("https://")):
        raise LedgerError(f"source {tag}: citation and link are {entry!r}: expected a text and an https:// address.")
    return Source(tag=tag, **entry)


def _claim(entry: object, articles: Mapping[str, str], sources: Mapping[str, Source]) -> Claim:
    where = str(entry["id"]) if isinstance(entry, dict) and "id" in entry else f"claim {entry!r:.60}"
    required = {"id", "claim", "verdict", "value", "why", "sources"}
    _require_keys(entry, where, required, {"withheld", *KINDS})

    def expect(holds: object, field: str, expected: str) -> None:
        if not holds:
            raise LedgerError(f"{where}: {field} is {entry.get(field)!r}: expected {expected}.")

    expect(re.fullmatch(r"S\d\.[1-9]\d*", where), "id", "an article and a number, such as S0.1")
    article = where.split(".")[0]
    expect(article in articles, "id", f"an article that is listed, one of {', '.join(articles)}")
    # YAML reads the words true and false as truth values
    verdict = {True: "true", False: "false"}.get(entry["verdict"], entry["verdict"])
    expect(verdict in VERDICTS, "verdict", f"one of {', '.join(VERDICTS)}")
    for field in ("claim", "value", "why"):
        expect(_is_text(entry[field]), field, "a sentence")
    expect(isinstance(entry["sources"], list), "sources", "a list of tags")
    unknown = [tag for tag in entry["sources"] if tag not in sources]
    expect(not unknown, "sources", f"tags of known sources, and {', '.join(map(str, unknown))} is none")

    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        found = " and ".join(kinds) if kinds else "nothing"
        raise LedgerError(f"{where}: {found} settles it: expected exactly one of {', '.join(KINDS)}.")
    kind = kinds[0]
    made = {kind: entry[kind]}
    if kind in ("computes", "recorded", "stated"):
        expect(isinstance(entry[kind], list) and entry[kind], kind, "a list of expressions")
        expect(kind != "stated" or entry["sources"], "sources", "the source that states the figures")
        made[kind] = tuple(_line(line, f"{where}: {kind}") for line in entry[kind])
    elif kind == "shown":
        _require_keys(entry[kind], f"{where}: shown", {"lesson", "cell", "prints"})
        expect(all(_is_text(text) for text in entry[kind].values()), kind, "three texts (a lesson's number in quotes)")
        made[kind] = Shown(**entry[kind])
    elif kind == "cited":
        expect(_is_text(entry[kind]), kind, "a sentence that tells what the source says")
        expect(entry["sources"], "sources", "the source that is cited")
    else:
        is_notebook = isinstance(entry[kind], str) and re.fullmatch(r"\d\d", entry[kind])
        expect(is_notebook, kind, "a notebook's number in quotes, such as '10'")

    withheld = entry.get("withheld")
    expect(verdict != "undisclosed" or _is_text(withheld), "withheld", "the model whose numbers nobody disclosed")
    expect(withheld is None or kind == "cited", kind, "nothing computed where numbers are withheld, but cited")
    texts = {field: entry[field].strip() for field in ("claim", "value", "why")}
    return Claim(
        id=where,
        article=articles[article],
        verdict=verdict,
        sources=tuple(sources[tag] for tag in entry["sources"]),
        withheld=withheld,
        **texts,
        **made,
    )


def _line(entry: object, where: str) -> Line:
    _require_keys(entry, where, {"expression", "gives", "what"}, {"within"})
    if not _is_text(entry["expression"]) or not _is_text(entry["what"]):
        raise LedgerError(f"{where}: expression and what are {entry!r}: expected two texts.")
    within = entry.get("within")
    if not _is_number(entry["gives"]):
        if within is not None:
            raise LedgerError(f"{where}: within is {within!r}: expected none, for {entry['gives']!r} is no number.")
    elif not ((_is_number(within) and within >= 0) or re.fullmatch(r"\d+(\.\d+)?%", str(within))):
        raise LedgerError(f"{where}: within is {within!r}: expected 0 or more, or per cent such as '1%'.")
    return Line(**entry)


# --- Showing --------------------------------------------------------------------------------------------------------


def show(value: object) -> str:
    """A value as it stands in a table: 671,026,419,200 or 5.596."""
    if _is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.7g}"
    return str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _text_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows))
    return "\n".join(line.rstrip() for line in lines)


def _html_table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        inside = (f"<{tag} style='text-align:left'>{cell}</{tag}>" for cell in cells)
        return f"<tr>{''.join(inside)}</tr>"

    return f"<table>{row(heads, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _escaped(cells: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(html.escape, cells))


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _link(source: Source) -> str:
    hand = " (second-hand)" if source.second_hand else ""
    return f'<a href="{html.escape(source.link)}">{html.escape(source.citation)}</a>{hand}'
