"""What is counted at the calls is what the closed form says, and the closed form is what a slow loop says."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lab.config import MoEConfig
from moe_lab.moe import MoE
from moe_lab.parallel import (
    Event,
    ExpertParallelMoE,
    Placement,
    Ranks,
    even_placement,
    launch,
    rows_per_node,
    rows_per_rank,
    rows_to_others,
    simulate,
)
from moe_lab.parallel.traffic import rows_per_place

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
CONFIG = MoEConfig(d_model=8, d_ff=12, n_experts=12, top_k=3)
LIMITED = {"n_groups": 4, "groups_kept": 2, "group_score": "top2_sum", "score": "sigmoid"}
TWICE = Placement(((0, 1, 2, 3, 4), (0, 5, 6), (7,), (11, 10, 9, 8, 1, 0)), n_experts=12, n_redundant=3)


# --- the closed form against a loop ---------------------------------------------------------------------------------


def visits_by_loop(topk_experts: list[list[int]], placement: Placement, node_size: int, once: bool) -> list[int]:
    """Token by token: choose a replica, find its rank and node, and go there, or stay away if already there."""
    slots = [(rank, expert) for rank, held in enumerate(placement.experts) for expert in held]
    rows = [0] * (placement.n_ranks // node_size)
    for token, chosen in enumerate(topk_experts):
        nodes = []
        for expert in chosen:
            holders = [rank for rank, held in slots if held == expert]
            nodes.append(holders[token % len(holders)] // node_size)
        for node in set(nodes) if once else nodes:
            rows[node] += 1
    return rows


@st.composite
def routed(draw: st.DrawFn) -> tuple[list[list[int]], Placement]:
    """Any choices, and any placement on 1, 2, 4 or 6 ranks, with replicas and with idle ranks."""
    size, n_experts = draw(st.sampled_from([1, 2, 4, 6])), draw(st.integers(1, 6))
    held = [[] for _ in range(size)]
    for expert in range(n_experts):
        for rank in draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=3)):
            held[rank].append(expert)
    placement = Placement(tuple(map(tuple, held)), n_experts, sum(map(len, held)) - n_experts)
    top_k = draw(st.integers(1, n_experts))
    token = st.permutations(range(n_experts)).map(lambda ids: ids[:top_k])
    return draw(st.lists(token, min_size=1, max_size=6)), placement


@PROPERTY
@given(routed(), st.booleans())
def test_the_closed_form_is_what_a_loop_counts(drawn, once):
    chosen, placement = drawn
    topk = torch.tensor(chosen)
    assert rows_per_rank(topk, placement, once).tolist() == visits_by_loop(chosen, placement, 1, once)
    for node_size in (n for n in (1, 2, 3) if placement.n_ranks % n == 0):
        expected = visits_by_loop(chosen, placement, node_size, once)
        assert rows_per_node(topk, placement, node_size, once).tolist() == expected


def test_by_hand():
    placement = even_placement(8, 4)  # experts 0 1 | 2 3 | 4 5 | 6 7
    topk = torch.tensor([[0, 1], [1, 2], [6, 7], [3, 5]])
    assert rows_per_rank(topk, placement).tolist() == [2, 2, 1, 1]
    assert rows_per_rank(topk, placement, once=False).tolist() == [3, 2, 1, 2]
    assert rows_per_node(topk, placement, 2).tolist() == [3, 2]
    assert rows_to_others(rows_per_rank(topk, placement), own=1) == 4
    assert rows_to_others(rows_per_node(topk, placement, 2), own=0) == 2


def test_no_tokens_send_nothing():
    none = torch.empty(0, 2, dtype=torch.int64)
    for once in (True, False):
        assert rows_per_rank(none, even_placement(4, 2), once).tolist() == [0, 0]


# --- counted at the calls -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counted:
    """What one rank saw.

    Args:
        choices: of every rank's tokens.
        events: the all-to-alls of a forward and a backward pass.
    """

    choices: list[Tensor]
    events: list[Event]

    def rows(self, what: str, stage: str) -> list[list[int]]:
        """Rows to each rank of the group, exchange by exchange."""
        return [list(e.rows) for e in self.events if (e.what, e.stage) == (what, stage)]


def counted(ranks: Ranks, config: MoEConfig, placement: Placement | None, form: str, node_size: int | None) -> Counted:
    """A forward and a backward pass, watched. Rank 2 has no tokens."""
    torch.manual_seed(0)
    layer = ExpertParallelMoE(MoE(config), ranks, placement, form=form, node_size=node_size)
    tokens = [6, 3, 0, 9, 2, 5, 1, 4]
    xs = torch.randn(sum(tokens), config.d_model, generator=torch.Generator().manual_seed(1)).split(tokens)
    with ranks.watch() as events:
        y, _ = layer(xs[ranks.rank].clone().requires_grad_())
        y.sum().backward()
    with torch.no_grad():
        choices = [layer.router(x).topk_experts for x in xs[: ranks.size]]
    return Counted(choices, [event for event in events if event.kind == "all_to_all"])


def expected_rows(seen: Counted, rank: int, placement: Placement, form: str, node_size: int | None) -> list[list[int]]:
    """What a rank sends in every exchange of a dispatch, to each rank of the group."""
    mine, once = seen.choices[rank], form != "per_assignment"
    to_ranks = [rows_per_rank(chosen, placement, once) for chosen in seen.choices]
    if node_size is None:
        return [to_ranks[rank].tolist()]
    node, place = divmod(rank, node_size)
    if form == "across_then_within":  # then what came from the same place of every node is passed on
        passed_on = sum(to_ranks[place::node_size]).view(-1, node_size)[node]
        return [rows_per_node(mine, placement, node_size).tolist(), passed_on.tolist()]
    places = placement.slot_ranks % node_size
    first = rows_per_place(placement.choose_slots(mine), places, node_size)
    passed_on = sum(to_ranks[node * node_size : (node + 1) * node_size]).view(-1, node_size)[:, place]
    return [first.tolist(), passed_on.tolist()]


def assert_as_expected(told: list[Counted], placement: Placement, form: str, node_size: int | None) -> None:
    expected = [expected_rows(seen, rank, placement, form, node_size) for rank, seen in enumerate(told)]
    for rank, seen in enumerate(told):
        there = seen.rows("rows", "dispatch")
        assert there == expected[rank]
        back = seen.rows("rows", "combine")[::-1]  # the last exchange is the first that is undone
        for hop, rows in enumerate(there):
            members = [e.targets for e in seen.events if (e.what, e.stage) == ("rows", "dispatch")][hop]
            own = members.index(rank)
            came = [expected[member][hop][own] for member in members]
            assert back[hop] == came
            assert seen.rows("rows", "combine backward")[hop] == rows
            assert seen.rows("rows", "dispatch backward")[::-1][hop] == came
    leave = [sum(e.rows_to_others for e in seen.events if (e.what, e.stage) == ("rows", "dispatch")) for seen in told]
    come = [sum(e.rows_to_others for e in seen.events if (e.what, e.stage) == ("rows", "combine")) for seen in told]
    assert sum(leave) == sum(come)
    if node_size is None:  # a token's row to its own rank does not leave it
        assert leave == [rows_to_others(torch.tensor(rows[0]), rank) for rank, rows in enumerate(expected)]


FORMS = [
    ("per_assignment", None),
    ("per_rank", None),
    ("across_then_within", 2),
    ("within_then_across", 2),
    ("across_then_within", 1),
    ("within_then_across", 4),
]


@pytest.mark.parametrize(("form", "node_size"), FORMS)
@pytest.mark.parametrize("placement", [None, TWICE], ids=["even", "redundant"])
def test_rows_at_the_calls_are_those_of_the_closed_form(placement, form, node_size):
    told = simulate(counted, 4, CONFIG, placement, form, node_size)
    assert_as_expected(told, placement or even_placement(12, 4), form, node_size)


@pytest.mark.parametrize("node_size", [2, 4])
@pytest.mark.parametrize("form", ["across_then_within", "within_then_across"])
def test_rows_of_eight_ranks_on_nodes(form, node_size):
    config = CONFIG.but(n_experts=24)
    told = simulate(counted, 8, config, None, form, node_size)
    assert_as_expected(told, even_placement(24, 8), form, node_size)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("form", ["per_assignment", "per_rank"])
def test_rows_of_any_number_of_ranks(form, size):
    told = simulate(counted, size, CONFIG, None, form, None)
    assert_as_expected(told, even_placement(12, size), form, None)
    if size == 1:
        assert all(event.rows_to_others == event.bytes_to_others == 0 for event in told[0].events)


def test_ids_and_weights_are_counted_apart():
    placement = even_placement(12, 4)
    for rank, seen in enumerate(simulate(counted, 4, CONFIG, placement, "per_rank", None)):
        choices = rows_per_rank(seen.choices[rank], placement, once=False).tolist()
        assert seen.rows("ids", "dispatch") == seen.rows("weights", "dispatch") == [choices]
        assert [event.what for event in seen.events if event.stage == "dispatch backward"].count("ids") == 0
        came = [rows_per_rank(chosen, placement, once=False)[rank].item() for chosen in seen.choices]
        assert seen.rows("weights", "dispatch backward") == [came]
        per_row = {(event.what, event.bytes_per_row) for event in seen.events if sum(event.rows)}
        # 8 numbers of 4 bytes; a row's number and a slot, 4 bytes each; one number; two counts of 8 bytes
        assert per_row <= {("rows", 32), ("ids", 8), ("weights", 4), ("counts", 16)}
        assert {event.what for event in seen.events if event.stage.startswith("combine")} == {"rows"}


def test_rows_in_bf16_are_half_as_many_bytes():
    def program(ranks: Ranks) -> list[Event]:
        torch.manual_seed(0)
        layer = ExpertParallelMoE(MoE(CONFIG.but(d_ff=16)).bfloat16(), ranks)
        with ranks.watch() as events:
            layer(torch.randn(5, 8).bfloat16())
        return [event for event in events if event.what == "rows"]

    for events in simulate(program, 2):
        assert {event.stage for event in events} == {"dispatch", "combine"}
        assert all(event.bytes_to_others == 16 * event.rows_to_others > 0 for event in events)


@pytest.mark.parametrize("form", ["per_rank", "across_then_within"])
def test_node_limited_routing_sends_as_few_rows_as_computed(form):
    """Groups of experts are nodes: a token goes to at most 2 of the 4 nodes, whichever 3 experts it chooses."""
    node_size = 2 if form == "across_then_within" else None
    config = CONFIG.but(n_experts=24, top_k=6)
    placement = even_placement(24, 8)
    sent = {}
    for name, limits in {"free": {"score": "sigmoid"}, "limited": LIMITED}.items():
        told = simulate(counted, 8, config.but(**limits), placement, form, node_size)
        assert_as_expected(told, placement, form, node_size)
        sent[name] = sum(rows_per_node(chosen, placement, 2).sum().item() for chosen in told[0].choices)
        for chosen in told[0].choices:
            for token in chosen:
                assert rows_per_node(token[None], placement, 2).sum() <= (2 if limits is LIMITED else 4)
        if node_size:  # the first exchange is across nodes: counted there, too
            assert sent[name] == sum(sum(seen.rows("rows", "dispatch")[0]) for seen in told)
    assert sent["limited"] < sent["free"]


def in_process(ranks: Ranks) -> list[Counted]:
    return [counted(ranks, CONFIG, placement, *form) for placement in (None, TWICE) for form in FORMS]


def test_the_same_rows_between_processes():
    told = launch(in_process, 4, timeout=30)
    placements = [placement for placement in (even_placement(12, 4), TWICE) for _ in FORMS]
    for number, (placement, form) in enumerate(zip(placements, FORMS * 2, strict=True)):
        assert_as_expected([one[number] for one in told], placement, *form)
