"""The ledger of claims: every claim is there once, and what is said to settle it does."""

import json
import re
import subprocess
import sys

import pytest
import yaml

from moe_lab import claims, paths, presets
from moe_lab.claims import KINDS, MODELS, VERDICTS, LedgerError, Line, evaluate, load_claims, loads, recorded
from moe_lab.course.map import NOTEBOOKS

CLAIMS = load_claims()
PER_ARTICLE = {"S0": 16, "S1": 19, "S2": 21, "S3": 19, "S4": 29}
LINES = [pytest.param(line, id=f"{one.id}-{i}") for one in CLAIMS.values() for i, line in enumerate(one.lines)]


def of_kind(*kinds):
    """The claims that one of these kinds settles."""
    return [pytest.param(claim, id=claim.id) for claim in CLAIMS.values() if claim.kind in kinds]


def test_every_claim_is_there():
    wanted = [f"{article}.{i}" for article, n in PER_ARTICLE.items() for i in range(1, n + 1)]
    assert list(CLAIMS) == wanted
    assert len(CLAIMS) == 104


def test_how_many_of_each_kind(capsys):
    summary = CLAIMS.summary()
    with capsys.disabled():
        print(f"\n{summary}\nopen: {', '.join(CLAIMS.where(kind='open'))}")
    assert sum(of.total() for of in CLAIMS.counts().values()) == 104
    assert list(CLAIMS.counts()) == list(VERDICTS)
    assert summary.splitlines()[-1].split()[-1] == "104"


# --- What settles a claim -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", of_kind("computes", "recorded", "stated"))
def test_expressions_hold(claim):
    checks = claim.check()
    assert checks
    assert checks.ok, f"\n{checks}"


@pytest.mark.parametrize("line", LINES)
def test_another_value_would_not_pass(line):
    """No tolerance is so wide, and no comparison so lax, that a wrong value holds."""
    if isinstance(line.gives, bool):
        others = [not line.gives]
    elif isinstance(line.gives, list):
        others = [line.gives[:-1], [*line.gives[:-1], "x"]]
    else:
        others = [line.gives * 1.04, line.gives * 0.96, -line.gives, str(line.gives)]
    for other in others:
        wrong = Line(expression=line.expression, gives=other, within=line.tolerance, what=line.what)
        assert not wrong.check().ok


# After these a number stands for so many thousands, millions …
SCALED = re.compile(r" ?(thousand|million|billion|trillion|[kKMGT]B\b|[GT]?FLOP|TFLOP|T\b)")


def numbers_in(text):
    """The numbers of a sentence, each with its decimals, and whether a unit follows that is a power of 1,000.

    Not those in names (H800, top-2, Llama 3 70B, 6·N·D), of sections and of tables.
    """
    for name in sorted(presets.PRESETS, key=len, reverse=True):
        text = text.replace(name, "")
    text = re.sub(r"\b([Ss]ections?|tables?|notebook|AIME) [\d.]+( to \d+)?", "", text)
    found = re.finditer(r"(?<![\w.·-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w·])", text)
    return [
        (float(one[0].replace(",", "")), len(one[0].partition(".")[2]), bool(SCALED.match(text, one.end())))
        for one in found
    ]


def test_numbers_in_names_do_not_count():
    said = "Llama 3 70B took 2.788 million H800 hours (top-2, 128K, S1.11, 6·N·D), 50 % of 1,342 GB in 8 H100s."
    assert numbers_in(said) == [(2.788, 3, True), (50, 0, False), (1342, 0, True), (8, 0, False)]
    assert numbers_in("Table 6, section 4.2 and tables 7 state 29 %.") == [(6, 0, False), (29, 0, False)]


def held_by(lines):
    """What expressions give, and the numbers that stand in them or in what is said of them."""
    held = []
    for line in lines:
        given = line.gives if isinstance(line.gives, list) else [line.gives]
        held += [abs(value) for value in given if isinstance(value, int | float)]
        held += [
            float(literal.replace("_", "")) for literal in re.findall(r"(?<![\w.])\d[\d_]*(?:\.\d+)?", line.expression)
        ]
    return held


def is_held(number, decimals, is_scaled, held):
    """Whether a number is one of these: rounded, and in thousands, millions … where its unit says so."""
    off = min(abs(value / 1000**power - number) for value in held for power in range(5 if is_scaled else 1))
    return off <= 0.501 * 10**-decimals


@pytest.mark.parametrize("claim", of_kind("computes", "recorded", "stated"))
def test_every_number_of_the_value_is_held_by_an_expression(claim):
    """Each stands in an expression, or is what one gives."""
    held = held_by(claim.lines)
    for found in numbers_in(claim.value):
        assert is_held(*found, held), f"{claim.id}: {found[0]} is not held by {held}"


# Numbers of a reason that its sources state, and nothing here counts.
FROM_A_SOURCE = {"S0.15": {16}, "S1.13": {14.8}, "S2.16": {29}, "S3.6": {1.808, 2.414}}


@pytest.mark.parametrize("claim", of_kind("computes", "recorded", "stated"))
def test_every_number_of_the_reason_is_held_too(claim):
    """By an expression, by what the article says, or by a source."""
    held, cited = held_by(claim.lines), FROM_A_SOURCE.get(claim.id, set())
    said = {number for number, *_ in numbers_in(claim.claim)}
    found = numbers_in(claim.why)
    assert cited <= {number for number, *_ in found}
    for number, *how in found:
        assert number in said | cited or is_held(number, *how, held), f"{claim.id}: {number} is not held by {held}"


def names_in(line):
    """What a line has of the package: presets, functions, tables."""
    return set(re.findall(r"[A-Za-z_]\w*", line.expression)) & {*MODELS, *claims._HOME_OF, "recorded", "loads"}


@pytest.mark.parametrize("line", [line for param in of_kind("computes") for line in param.values[0].computes])
def test_a_line_counts_something_or_says_that_it_does_not(line):
    assert names_in(line) or "as stated" in line.what, line


@pytest.mark.parametrize("claim", of_kind("computes"))
def test_what_is_computed_has_a_line_that_counts(claim):
    assert any(map(names_in, claim.lines))


@pytest.mark.parametrize("claim", of_kind("stated"))
def test_what_is_arithmetic_on_stated_figures_counts_nothing(claim):
    assert claim.sources
    assert not any(map(names_in, claim.lines))


def test_no_line_compares_a_preset_with_itself():
    """R1 is V3's own object here: to count it would say nothing of R1."""
    shared = [
        name for name, preset in presets.PRESETS.items() if preset.config is presets.PRESETS["DeepSeek-V3"].config
    ]
    assert shared == ["DeepSeek-V3", "DeepSeek-R1"]
    assert "DeepSeek-R1" not in MODELS.values()


@pytest.mark.parametrize("claim", of_kind("recorded"))
def test_what_is_recorded_is_read_from_the_records(claim):
    for line in claim.recorded:
        assert re.search(r"\b(recorded|loads)\(", line.expression)


@pytest.mark.parametrize("claim", of_kind("computes"))
def test_what_is_computed_needs_no_records(claim):
    for line in claim.computes:
        assert not re.search(r"\b(recorded|loads)\(", line.expression)


@pytest.mark.parametrize("claim", of_kind("shown"))
def test_the_lesson_shows_it(claim):
    """One cell of the lesson has the text, and the same cell, solved, has printed the result."""
    shown = claim.shown
    (lesson,) = paths.lessons_dir().glob(f"{shown.lesson}_*.py")
    assert lesson.read_text(encoding="utf-8").count(shown.cell) == 1
    (solution,) = paths.solutions_dir().glob(f"{shown.lesson}_*.ipynb")
    cells = json.loads(solution.read_text(encoding="utf-8"))["cells"]
    (cell,) = [cell for cell in cells if shown.cell in "".join(cell["source"])]
    printed = "".join("".join(output.get("text", "")) for output in cell["outputs"])
    assert shown.prints in printed
    assert "nbval-ignore-output" not in cell["metadata"].get("tags", ())  # so the suite holds it to this


@pytest.mark.parametrize("claim", of_kind("cited"))
def test_what_is_cited_has_its_source(claim):
    assert claim.sources
    assert claim.cited.endswith(".")


@pytest.mark.parametrize("claim", of_kind("open"))
def test_what_is_open_waits_for_a_notebook_that_is_not_written(claim):
    """Fails when that notebook is written, and the claim is still called open."""
    minutes = {number: minutes for number, _, minutes in NOTEBOOKS}
    assert claim.open > "09"
    assert minutes[claim.open] is None, f"notebook {claim.open} is written: what does it say about {claim.id}?"


def test_of_what_is_withheld_nothing_is_counted():
    withheld = [claim for claim in CLAIMS.values() if claim.withheld]
    assert {claim.id for claim in withheld} == {"S1.8", "S1.10", "S3.1", "S4.2"}
    assert {claim.withheld for claim in withheld} == set(presets.UNDISCLOSED)
    for claim in withheld:
        assert (claim.kind, claim.check()) == ("cited", ())
        with pytest.raises(ValueError, match="undisclosed"):
            presets.find_preset(claim.withheld)
    assert set(CLAIMS.where(verdict="undisclosed")) == {"S1.8", "S3.1", "S4.2"}


def test_every_source_and_every_short_name_is_used():
    ledger = yaml.safe_load((paths.data_dir() / "claims.yaml").read_text(encoding="utf-8"))
    assert set(ledger["sources"]) == {source.tag for claim in CLAIMS.values() for source in claim.sources}
    expressions = " ".join(line.expression for claim in CLAIMS.values() for line in claim.lines)
    assert {name for name in MODELS if not re.search(rf"\b{name}\b", expressions)} == set()


def test_claims_are_told_plainly():
    for claim in CLAIMS.values():
        for text in (claim.claim, claim.value, claim.why):
            assert text.endswith("."), f"{claim.id}: {text}"
            assert len(text.split()) <= 60, f"{claim.id}: {text}"


# --- Expressions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1 + 2 * 3", 7),
        ("count_parameters(Llama7B).total", 6_738_415_616),
        ("[number for number in (3, 1, 2) if number < 3] == [1, 2]", True),
        ("math.log2(8)", 3.0),
        ('V3.moe.score == "sigmoid" and not V3.qkv_bias', True),
        ('{"a": 1}["a"]', 1),
        ("max(abs(-n) for n in range(4))", 3),
    ],
)
def test_an_expression_is_evaluated(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("1 +", "is no expression"),
        ("x = 1", "is no expression"),
        ("__import__('os')", "'__import__' is not allowed"),
        ("V3.__class__", "'__class__' is not allowed"),
        ("(1 for _ in (1,)).gi_frame", "not allowed"),
        ("'{0.moe}'.format(V3)", "'format' is not allowed"),
        ("lambda: 1", "Lambda is not allowed"),
        ("1 if V3 else 2", "IfExp is not allowed"),
        ("f'{V3}'", "JoinedStr is not allowed"),
        ("(n := 1)", "NamedExpr is not allowed"),
        ("open('x')", "unknown name 'open'"),
        ("count_parameter(V3)", "the nearest is 'count_parameters'"),
        ("V3.sizes", "AttributeError"),
        ("count_parameters()", "TypeError"),
        ("1 / 0", "ZeroDivisionError"),
        ("layer_flops(V3, 0)", "expected 1 or more"),
        ("recorded('balance', 'nonsense')", "variant='nonsense'"),
        ("[n for n in (1, 2)] + n", "NameError"),
        ("recorded('balance', 'no cure', 'colour')", "measure='colour': expected one of mean."),
        ("recorded('nonsense', 'no cure')", "not among the recorded results"),
        ("loads('balance', 'no cure', layer=0, seed=99)", "seed=99: expected one of 0, 1, 2."),
    ],
)
def test_a_wrong_expression_says_what_is_wrong(expression, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        evaluate(expression)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: recorded("nonsense", "no cure"), "experiment='nonsense': nonsense.json is not among"),
        (lambda: recorded("balance", "nonsense"), "variant='nonsense': expected one of no cure, switch 0.0001,"),
        (lambda: recorded("balance", "no cure", "colour"), "measure='colour': expected one of mean."),
        (lambda: recorded("balance", "no cure", "layers"), "measure='layers': expected one of mean."),
        (lambda: recorded("balance", "no cure", "mean", layer=0), "measure='mean': expected one of max_violation,"),
        (lambda: recorded("balance", "no cure", "dead", layer=2), "layer=2: expected one of 0, 1."),
        (lambda: recorded("balance", "no cure", "dead", layer=-1), "layer=-1: expected one of 0, 1."),
        (lambda: recorded("longer_training", "dense, equal active", "dead", layer=0), "layer=0: there is none."),
        (lambda: loads("balance", "nonsense", layer=0), "variant='nonsense': expected one of"),
        (lambda: loads("balance", "no cure", layer=0, seed=3), "seed=3: expected one of 0, 1, 2."),
        (lambda: loads("balance", "no cure", layer=2), "layer=2: expected one of 0, 1."),
        (lambda: loads("balance", "no cure", layer=-1), "layer=-1: expected one of 0, 1."),
    ],
)
def test_what_is_not_recorded_is_a_value_error(ask, says):
    """Directly, too, not only within an expression."""
    with pytest.raises(ValueError, match=re.escape(says)):
        ask()


def test_what_is_recorded_is_there():
    assert recorded("balance", "no cure", "dead", layer=0) == [0, 0, 1]
    assert len(recorded("balance", "no cure")) == 3
    shares = loads("balance", "no cure", layer=1, seed=2)
    assert all(len(experts) == 16 and sum(experts) == pytest.approx(1) for experts in shares)


@pytest.mark.parametrize(
    ("gives", "within", "got", "ok"),
    [
        (10, 0, "10", True),
        (10, 0, "10.0", True),
        (10, 0, "10.001", False),
        (10, 0.5, "10.4", True),
        (10, 0.5, "9.4", False),
        (200, "1%", "201.9", True),
        (200, "1%", "197.9", False),
        (-200, "1%", "-201", True),
        (1, 0, "True", False),
        (True, 0, "1", False),
        (True, 0, "1 < 2", True),
        ([1, 2], 0, "(1, 2)", True),
        ([1, 2], 0, "[1, 2, 3]", False),
        ("a", 0, "'a'", True),
        (1, 5, "math.nan", False),
    ],
)
def test_a_value_is_held_to_its_tolerance(gives, within, got, ok):
    assert Line(expression=got, gives=gives, within=within, what="x").check().ok is ok


# --- A ledger that is wrong -----------------------------------------------------------------------------------------

GOOD = {
    "articles": {"S0": "An article"},
    "sources": {"A": {"citation": "A paper", "link": "https://arxiv.org/abs/1"}},
    "claims": [
        {"id": "S0.1", "claim": "It is.", "verdict": True, "value": "It is.", "why": "So.", "sources": ["A"]}
        | {"computes": [{"expression": "1 + 1", "gives": 2, "within": 0, "what": "x"}]},
        {"id": "S0.2", "claim": "It is.", "verdict": "roughly", "value": "It is.", "why": "So.", "sources": ["A"]}
        | {"cited": "It says so."},
    ],
}


@pytest.fixture
def load(tmp_path):
    """Loads the good ledger with changes in its first claim."""

    def load_changed(*without, **changes):
        ledger = json.loads(json.dumps(GOOD))
        ledger["claims"][0] |= changes
        for field in without:
            del ledger["claims"][0][field]
        path = tmp_path / "claims.yaml"
        path.write_text(yaml.safe_dump(ledger), encoding="utf-8")
        return load_claims(path)

    return load_changed


def test_the_good_one_is_read(load):
    found = load()
    assert list(found) == ["S0.1", "S0.2"]
    assert (found["S0.1"].verdict, load(verdict=False)["S0.1"].verdict) == ("true", "false")
    assert found["S0.1"].check().ok
    assert not load(computes=[{"expression": "1 + 1", "gives": 3, "within": 0, "what": "x"}])["S0.1"].check().ok


LINE = {"expression": "1", "gives": 1, "within": 0, "what": "x"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"verdict": "mostly"}, "S0.1: verdict is 'mostly': expected one of true, roughly"),
        ({"id": "S0.2"}, "S0.2: id is there twice"),
        ({"id": "first"}, "first: id is 'first': expected an article and a number"),
        ({"id": "S7.1"}, "S7.1: id is 'S7.1': expected an article that is listed"),
        ({"claim": " "}, "S0.1: claim is ' ': expected a sentence"),
        ({"why": 3}, "S0.1: why is 3: expected a sentence"),
        ({"sources": ["A", "B"]}, "S0.1: sources is ['A', 'B']: expected tags of known sources, and B is none"),
        ({"sources": "A"}, "S0.1: sources is 'A': expected a list"),
        ({"cited": "It says so."}, "S0.1: computes and cited settles it: expected exactly one"),
        ({"settled": True}, "S0.1: settled is no field"),
        ({"computes": []}, "S0.1: computes is []: expected a list of expressions"),
        ({"computes": [LINE | {"within": "close"}]}, "S0.1: computes: within is 'close'"),
        ({"computes": [LINE | {"within": -1}]}, "S0.1: computes: within is -1"),
        ({"computes": [LINE | {"within": None}]}, "S0.1: computes: within is None"),
        ({"computes": [LINE | {"gives": True}]}, "S0.1: computes: within is 0: expected none, for True is no number"),
        ({"computes": [{"expression": "1", "what": "x"}]}, "S0.1: computes: gives is missing"),
        ({"computes": [LINE | {"expression": 1}]}, "S0.1: computes: expression and what"),
        ({"withheld": "GPT-4"}, "S0.1: computes is"),
        ({"verdict": "undisclosed"}, "S0.1: withheld is None: expected the model"),
    ],
)
def test_a_wrong_field_is_named(load, changes, says):
    with pytest.raises(LedgerError, match=re.escape(says)) as caught:
        load(**changes)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("open", 10, "S0.1: open is 10: expected a notebook's number in quotes"),
        ("cited", True, "S0.1: cited is True: expected a sentence"),
        ("shown", {"lesson": "02", "cell": "x"}, "S0.1: shown: prints is missing"),
        ("shown", {"lesson": 2, "cell": "x", "prints": "y"}, "S0.1: shown is {"),
        ("recorded", "x", "S0.1: recorded is 'x': expected a list"),
        ("stated", 3, "S0.1: stated is 3: expected a list"),
    ],
)
def test_a_wrong_kind_is_named(load, kind, value, says):
    with pytest.raises(LedgerError, match=re.escape(says)):
        load("computes", **{kind: value})


def test_what_nothing_settles_is_refused(load):
    with pytest.raises(LedgerError, match=r"S0\.1: nothing settles it: expected exactly one of computes, recorded"):
        load("computes")


def test_a_missing_field_is_named(load):
    with pytest.raises(LedgerError, match=r"S0\.1: why is missing"):
        load("why")
    with pytest.raises(LedgerError, match=r"claim .*: id is missing"):
        load("id")


def test_a_citation_needs_a_source(load):
    with pytest.raises(LedgerError, match=r"S0\.1: sources is \[\]: expected the source that is cited"):
        load("computes", cited="It says so.", sources=[])
    with pytest.raises(LedgerError, match=r"S0\.1: sources is \[\]: expected the source that states the figures"):
        load("computes", stated=[LINE], sources=[])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("claims: [", "is no YAML"),
        ("- 1", "has no fields"),
        ("articles: {}\nsources: {}", "claims is missing"),
        ("articles: {}\nsources: []\nclaims: []", "sources is no mapping"),
        ("articles: {}\nsources: {}\nclaims: {}", "claims is no list"),
        ("articles: {}\narticles: {}\nsources: {}\nclaims: []", "'articles' is there twice"),
        ("articles: {}\nsources: {A: {citation: x}}\nclaims: []", "source A: link is missing"),
        (
            "articles: {}\nsources: {A: {citation: x, link: here}}\nclaims: []",
            "expected a text and an https:// address",
        ),
        ("articles: {}\nsources: {}\nclaims: [3]", "claim 3: 3 has no fields"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, text, says):
    path = tmp_path / "claims.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LedgerError, match=re.escape(says)):
        load_claims(path)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(LedgerError, match=r"claims\.yaml does not exist"):
        load_claims(tmp_path / "claims.yaml")


# --- Showing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_claim_prints(claim):
    text, page = str(claim), claim._repr_html_()
    assert text.startswith(f"{claim.id} · {claim.standing} · {claim.article}\n")
    one_line = " ".join(text.split())
    for part in (claim.claim, claim.value, claim.why):
        assert " ".join(part.split()) in one_line
    assert page.count("<tr>") == page.count("</tr>") == 5
    for source in claim.sources:
        assert source.link in text
        assert f'<a href="{source.link}">' in page
    longest = max(text.splitlines(), key=len)
    assert len(longest) <= 110 or " " not in longest.strip()  # an address may be longer


def test_second_hand_sources_are_marked():
    assert "(second-hand)" in str(CLAIMS["S1.8"])
    assert "(second-hand)" in CLAIMS["S1.8"]._repr_html_()
    assert "(second-hand)" not in str(CLAIMS["S0.1"])


def test_checks_print_as_a_table():
    checks = CLAIMS["S0.5"].check()
    head, first, *_ = str(checks).splitlines()
    assert head.split() == ["computed", "ledger", "expression"]
    assert first.split()[:3] == ["holds", "5.596247", "5.6"]
    wrong = claims.Checks([Line(expression="1 < 0", gives=True, what="<b>").check()])
    assert str(wrong).splitlines()[1].split()[:3] == ["FAILS", "False", "True"]
    assert "<code>1 &lt; 0</code>" in wrong._repr_html_()
    assert str(CLAIMS["S1.8"].check()) == CLAIMS["S1.8"].check()._repr_html_() == "Nothing to compute."


def test_a_ledger_prints_as_a_table():
    some = CLAIMS.where(article="S4", verdict="false")
    assert list(some) == ["S4.24"]
    assert str(some).splitlines()[1].split()[:3] == ["S4.24", "false", "computes"]
    assert some._repr_html_().count("<tr>") == 2
    assert sum(len(CLAIMS.where(kind=kind)) for kind in KINDS) == 104


def test_open_claims_do_not_look_settled():
    (claim,) = CLAIMS.where(open="12").values()
    assert str(claim).startswith("S3.19 · open, leaning roughly · ")
    assert "<b>open, leaning roughly</b>" in claim._repr_html_()
    assert "open, leaning roughly" in str(CLAIMS.where(kind="open"))
    assert {each.standing == each.verdict for each in CLAIMS.values() if each.kind != "open"} == {True}


def test_asking_for_what_is_not_there():
    with pytest.raises(ValueError, match=r"claim='S0\.17': there is no such claim\. The nearest are S0\.7, S0\.1,"):
        CLAIMS["S0.17"]
    with pytest.raises(ValueError, match="expected one of article, verdict"):
        CLAIMS.where(colour="red")


def test_no_torch_for_any_claim():
    code = (
        "import sys; from moe_lab.claims import load_claims; found = load_claims(); "
        "assert all(claim.check().ok for claim in found.values()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
