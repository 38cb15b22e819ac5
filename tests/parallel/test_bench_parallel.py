"""`moe-lab bench --only parallel`: that it measures what it says, on sizes too small to mean anything."""

import pytest

from moe_lab.bench import parallel
from moe_lab.bench.layers import Shape
from moe_lab.parallel import FORMS, Event

TINY = Shape(24, 8, 4, 4, 2)


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "launch", launch_with_a_tiny_shape)
        patch.setattr(parallel, "SHAPE", TINY)
        return parallel.measure(rounds=2, quick=True)


def launch_with_a_tiny_shape(function, size, *args):
    from moe_lab.parallel import launch

    return launch(tiny, size, function, *args)


def tiny(ranks, function, *args):
    parallel.SHAPE = TINY  # in a process of its own
    return function(ranks, *args)


def test_every_form_is_held_against_the_layer_in_one_process(results):
    assert results["overhead"].keys() == {parallel.AGAIN, *FORMS}
    for name, pair in results["overhead"].items():
        assert pair.keys() == {parallel.ALONE, name}
        assert all(timing["median"] > 0 for timing in pair.values())


def test_shares_add_up_and_bytes_are_those_of_rows_that_leave(results):
    records = {(record["form"], record["ranks"]): record for record in results["divided"]}
    assert records.keys() == {(form, n) for form in parallel.ONE_HOP for n in (1, 2)}
    for (_, n), record in records.items():
        assert sum(record["shares"].values()) == pytest.approx(1)
        assert min(record["shares"].values()) >= 0
        assert (record["bytes_per_token"]["rows"] > 0) == (n > 1)
    per_row = 2 * TINY.d_model * 4  # forth and back
    assert records["per_rank", 2]["bytes_per_token"]["rows"] <= per_row
    assert records["per_assignment", 2]["bytes_per_token"]["rows"] <= TINY.top_k * per_row


def test_what_is_no_stage_is_waiting_for_rows():
    events = [Event("compute", "route", begin=0, end=1), Event("compute", "experts", begin=3, end=7)]
    events.append(Event("all_to_all", "dispatch", "rows", (1, 2), 4, (0, 1), 0, begin=1, end=3))
    events.append(Event("compute", "forward", begin=0, end=8))
    found = parallel.shares(events)
    assert found == {"route": 1, "dispatch": 0, "regroup": 0, "experts": 4, "combine": 0, "rows under way": 3}
    assert parallel.bytes_by_content(events) == {"rows": 8, "ids and weights": 0}


def test_table_and_verdicts_say_what_was_measured(results):
    table = parallel.table(results)
    assert "| per_rank | 1 | 1.00 |" in table
    assert len(table.splitlines()) == 2 + 4
    slow = {name: {name: {"median": 2.12}, parallel.ALONE: {"median": 2.0}} for name in (parallel.AGAIN, *FORMS)}
    assert parallel.verdicts({"overhead": slow})[-1].endswith("MISSED.")
    assert "+6.0%" in parallel.verdicts({"overhead": slow})[0]
    fast = slow | {"per_rank": {"per_rank": {"median": 2.08}, parallel.ALONE: {"median": 2.0}}}
    assert parallel.verdicts({"overhead": fast})[-1].endswith("met.")
