"""`moe-lab claims`: what articles say about mixtures of experts, and what settles it, worked out now."""

import argparse
import shutil
import textwrap
from collections import Counter

from moe_lab.claims import KINDS, VERDICTS, Check, Claim, Ledger, load_claims, show
from moe_lab.paths import CourseError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe-lab claims`."""
    parser.add_argument("ids", nargs="*", metavar="ID", help="claims to show in full, such as S2.4; none lists them")
    parser.add_argument("--verdict", choices=VERDICTS, help="only those with this verdict")
    kinds = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    parser.add_argument("--kind", choices=KINDS, help=f"only those that this settles ({kinds})")
    parser.add_argument("--article", metavar="S", help="only those of this article, such as S2")


def main(args: argparse.Namespace) -> int:
    """Prints a table of claims, or some in full; returns 1 if the ledger says what its expressions do not give."""
    ledger = load_claims()
    wanted = {name: value for name in ("verdict", "kind", "article") if (value := getattr(args, name))}
    if "article" in wanted:
        wanted["article"] = _article(wanted["article"], ledger)
    try:
        asked = Ledger((each, ledger[each]) for each in map(str.upper, args.ids)) if args.ids else ledger
        found = asked.where(**wanted)
        if not args.ids:
            print(listing(found))
            return 0
        checks = {claim.id: claim.check() for claim in found.values()}
    except ValueError as error:
        raise CourseError(str(error)) from None
    print("\n\n".join(in_full(claim, checks[claim.id]) for claim in found.values()) or "None of them.")
    return 0 if all(each.ok for each in checks.values()) else 1


def _article(name: str, ledger: Ledger) -> str:
    known = list(dict.fromkeys(claim_id.split(".")[0] for claim_id in ledger))
    if name.upper() not in known:
        raise CourseError(f"--article {name}: expected one of {', '.join(known)}.")
    return name.upper()


def _width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, 110))


def listing(claims: Ledger) -> str:
    """A line or a few for each claim: its id, the verdict or that it is open, what it says."""
    ids, words = (max(map(len, column), default=0) + 2 for column in (claims, VERDICTS))
    lines = [
        textwrap.fill(
            f"{claim.claim}{f' (leaning {claim.verdict})' if claim.open else ''}",
            _width(),
            initial_indent=f"{claim.id:<{ids}}{'open' if claim.open else claim.verdict:<{words}}",
            subsequent_indent=" " * (ids + words),
        )
        for claim in claims.values()
    ]
    counted = Counter("open" if claim.open else claim.verdict for claim in claims.values())
    told = ", ".join(f"{counted[word]} {word}" for word in (*VERDICTS, "open") if counted[word])
    total = f"{len(claims)} claim{'' if len(claims) == 1 else 's'}: {told or 'none'}."
    return "\n".join([*lines, "", f"{total} In full: moe-lab claims ID"])


def in_full(claim: Claim, checks: tuple[Check, ...]) -> str:
    """A claim with its verdict and sources, and what its expressions give."""
    lines = [str(claim)]
    for i, check in enumerate(checks):
        got = f"{show(check.got)}, as stated" if check.ok else f"{show(check.got)}, NOT {show(check.expected)}"
        name = "now" if i == 0 else ""
        said = f"{got}: {check.line.what}"
        lines.append(textwrap.fill(said, _width(), initial_indent=f"  {name:<10}", subsequent_indent=" " * 12))
    return "\n".join(lines)
