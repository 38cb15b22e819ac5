"""What the figures say: one line for each comparison as it is done, and the targets beside what was measured."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from moe_lab.bench.layers import Shape
from moe_lab.gpu.candidates import DENSE, FUSED, GROUPED_MM, LIGER, TORCH
from moe_lab.gpu.floors import QWEN3

LARGE = QWEN3[-1]
NOT_MEASURED = "not measured"


def lines(part: str, record: Mapping[str, Any]) -> list[str]:
    """A record of the results in short."""
    shape = f"{Shape(**record['shape'])}{'' if record['measured'] else ' (a toy of it)'}"
    if part == "stages":
        stages = ", ".join(f"{stage['stage']} {_beside(stage)}" for stage in record["stages"])
        others = ", ".join(f"{name} {_ms(one)}" for name, one in record["others"].items())
        return [f"launches, {shape}, {record['load']}, ms (and the larger floor): {stages}; {others}"]
    if part == "sweep":
        heads = {"product": record["product"], "block forward": record["block"]}
        return [f"{record['tokens_per_expert']:g} tokens per expert, {name}: {_all(c)}" for name, c in heads.items()]
    what = {"raw": "product {product}", "block": "block {pass}", "steps": "steps"}[part].format(**record)
    return [f"{what}, {shape}, {record['load']}: {_all(record['candidates'])}"]


def ceilings(results: Mapping[str, Any]) -> str:
    """The two rates in a sentence."""
    found = results.get("ceilings") or {}
    if not found.get("operations_per_second") or not found.get("bytes_per_second"):
        return f"Ceilings: {NOT_MEASURED}."
    operations, moved = found["operations_per_second"] / 1e12, found["bytes_per_second"] / 1e12
    return f"Ceilings: a dense bf16 product {operations:.0f} TFLOP/s, a copy {moved:.2f} TB/s."


def _beside(stage: Mapping[str, Any]) -> str:
    floor = [ms for ms in stage.get("floor_ms", {}).values() if ms is not None]
    return f"{stage['ms']:.3f}" + (f" ({max(floor):.3f})" if floor else "")


def _all(measured: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {_one(one)}" for name, one in measured.items())


def _one(one: Mapping[str, Any]) -> str:
    if "failed" in one:
        return f"failed ({one['failed'][:40]})"
    return f"{one['tflops']:.0f}" if "tflops" in one else "ran"


def _ms(one: Mapping[str, Any]) -> str:
    return f"{one['ms']:.3f}" if "ms" in one else "failed" if "failed" in one else "ran"


def targets(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target with what was measured: {"target", "wanted", "measured" or None, "met" or None}."""
    return [
        {"target": name, "wanted": wanted, "measured": value, "met": None if value is None else value >= wanted}
        for name, wanted, value in _targets(results)
    ]


def _targets(results: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    for which, says in (("in", "D to 2F"), ("down", "F to D")):
        found = _find(results.get("raw", ()), load="balanced", product=which)
        ours = _tflops(found, found.get("ours"))
        at = f"product {says}, T {LARGE.n_tokens}"
        yield f"{at}: of the dense ceiling", 0.90, _ratio(ours, _tflops(found, DENSE))
        yield f"{at}: × F.grouped_mm", 1.1, _ratio(ours, _tflops(found, GROUPED_MM))
    blocks = results.get("block", ())
    for name, says, absolute in (("forward", "forward", 500), ("both", "both passes", 400)):
        found = _find(blocks, load="balanced", **{"pass": name})
        ours, at = _tflops(found, FUSED), f"block {says}, T {LARGE.n_tokens}"
        yield f"{at}: × Liger", 1.4, _ratio(ours, _tflops(found, LIGER))
        yield f"{at}: × the torch path", 1.5, _ratio(ours, _tflops(found, TORCH))
        yield f"{at}: TFLOP/s", absolute, ours
        for load, called in (("zipf", "Zipf"), ("half", "one expert takes half")):
            skewed = _tflops(_find(blocks, load=load, **{"pass": name}), FUSED)
            yield f"{at}: {called} × balanced", 0.9, _ratio(skewed, ours)
    use = results.get("first_use") or {}
    seconds = None if use.get("n_compiled") else use.get("seconds")  # of what compiles, the time says nothing
    # "at most" as "at least": what is left of two seconds
    yield "first use with compiled kernels: seconds left of 2", 0.0, None if seconds is None else 2 - seconds


def _find(records: Any, **wanted: Any) -> Mapping[str, Any]:
    for record in records:
        if record["shape"] == asdict(LARGE) and all(record[name] == value for name, value in wanted.items()):
            return record
    return {}


def _tflops(record: Mapping[str, Any], name: str | None) -> float | None:
    return record.get("candidates", {}).get(name, {}).get("tflops")


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def table(results: Mapping[str, Any]) -> str:
    """The targets beside what was measured, as Markdown, with what was left out beneath."""
    rows = ["| target | wanted | measured | met |", "|---|---|---|---|"]
    for row in targets(results):
        measured = NOT_MEASURED if row["measured"] is None else f"{row['measured']:.3g}"
        met = "" if row["met"] is None else "yes" if row["met"] else "no"
        rows.append(f"| {row['target']} | {row['wanted']:g} | {measured} | {met} |")
    rows.append("")
    if "tests" in results:
        rows.append("Tests: {passed} passed, {failed} failed, {skipped} skipped.".format(**results["tests"]))
    rows += [f"Peer {name}: {version}." for name, version in results.get("peers", {}).items()]
    if "liger" in results:
        rows.append(f"Liger: {results['liger']}.")
    rows += [f"Failed: {name}: {reason}" for name, reason in results.get("failed_parts", {}).items()]
    if results.get("dropped"):
        rows.append(f"Not measured, for want of time or of a GPU: {'; '.join(results['dropped'])}.")
    return "\n".join(rows)
