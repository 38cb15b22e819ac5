"""The rehearsal of a program for several ranks gives what the simulator gives, and says what would hang."""

import threading

import pytest
import torch

from moe_lab.config import MoEConfig
from moe_lab.course.checking import Refused
from moe_lab.course.rehearsal import rehearse
from moe_lab.course.sandbox import Sandbox
from moe_lab.moe import MoE
from moe_lab.parallel import ExpertParallelMoE, simulate


def every_call(ranks, numbers):
    """Makes each call once, and twice those that could be mixed up."""
    mine = numbers[ranks.rank]
    there = ranks.all_to_all(mine)
    send = [ranks.rank] * ranks.size
    receive = list(range(ranks.size))
    uneven = ranks.all_to_all(torch.arange(sum(send)) + 100 * ranks.rank, send, receive)
    pending = ranks.start_all_to_all(mine * 2)
    total = ranks.all_reduce(mine)
    gathered = ranks.all_gather(mine[0])
    passed = ranks.receive(mine, ranks.rank - 1) + 1 if ranks.rank else mine
    if ranks.rank + 1 < ranks.size:
        ranks.send(passed, ranks.rank + 1)
    within, across = ranks.split(2)
    groups = within.all_reduce(mine), across.all_gather(mine)
    return there, uneven, pending.wait(), total, gathered, passed, *groups, torch.rand(3)


@pytest.mark.parametrize("size", [2, 4])
def test_every_call_gives_what_the_simulator_gives(size):
    numbers = torch.arange(size * size).view(size, size)
    pairs = zip(rehearse(every_call, size, numbers), simulate(every_call, size, numbers), strict=True)
    for rehearsed, simulated in pairs:
        assert all(torch.equal(a, b) for a, b in zip(rehearsed, simulated, strict=True))


def test_a_whole_layer_gives_what_the_simulator_gives():
    def forward(ranks, x):
        torch.manual_seed(0)
        layer = ExpertParallelMoE(MoE(MoEConfig(d_model=8, d_ff=8, n_experts=6, top_k=2)), ranks)
        tokens = x[ranks.rank :: ranks.size].clone().requires_grad_()
        layer(tokens)[0].square().sum().backward()
        return tokens.grad, layer.experts.w_down.grad

    x = torch.rand(7, 8)
    for one, other in zip(rehearse(forward, 3, x), simulate(forward, 3, x), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_runs_in_the_thread_that_asks_and_keeps_its_random_numbers():
    threads = []

    def note(ranks):
        threads.append(threading.current_thread())
        ranks.all_reduce(torch.ones(1))
        return torch.rand(1).item()

    torch.manual_seed(3)
    first = rehearse(note, 3)
    assert set(threads) == {threading.current_thread()}
    assert len(set(first)) == 1


def test_arguments_are_copied_for_every_run():
    def add(ranks, x):
        x += 1
        ranks.all_reduce(x)
        x += 1
        return ranks.all_reduce(x)

    x = torch.zeros(1)
    assert [int(total) for total in rehearse(add, 2, x)] == [4, 4]
    assert x.item() == 0


def test_what_is_printed_is_shown_once(capsys):
    def talk(ranks):
        print("before", ranks.rank)
        ranks.all_reduce(torch.ones(1))
        print("after", ranks.rank)

    rehearse(talk, 2)
    assert sorted(capsys.readouterr().out.splitlines()) == ["after 0", "after 1", "before 0", "before 1"]


def one_leaves(ranks):
    if ranks.rank != 1:
        ranks.all_reduce(torch.ones(1))


def one_calls_another(ranks):
    return ranks.all_gather(torch.ones(1)) if ranks.rank == 2 else ranks.all_reduce(torch.ones(1))


def wrong_counts(ranks):
    ranks.all_to_all(torch.ones(3), [1, 1, 1], [1, 2, 1])


def nobody_sends(ranks):
    ranks.receive(torch.ones(1), 1 - ranks.rank)


def other_shapes(ranks):
    ranks.all_reduce(torch.ones(ranks.rank + 1))


def catches_everything(ranks):
    try:
        ranks.all_reduce(torch.ones(1))
    except:  # noqa: E722
        return 1


@pytest.mark.parametrize(
    ("function", "size", "says"),
    [
        (one_leaves, 3, "rank 0 waits in all_reduce; rank 2 waits in all_reduce. Rank 1 has returned without"),
        (
            one_calls_another,
            3,
            "Call number 1 is all_gather on rank 2 and all_reduce on rank 0. On a cluster this hangs",
        ),
        (wrong_counts, 3, "Rank 0 expects 2 rows from rank 1, which sends 1"),
        (nobody_sends, 2, "rank 0 waits in receive from rank 1; rank 1 waits in receive from rank 0"),
        (other_shapes, 2, r"all_reduce gets tensors of different shapes: \(1,\) on rank 0, \(2,\) on rank 1"),
        (catches_everything, 2, "An `except:` caught"),
    ],
)
def test_what_would_hang_or_go_wrong_is_refused(function, size, says):
    with pytest.raises(Refused, match=says):
        rehearse(function, size)


def test_what_a_rank_raises_comes_out():
    def fail(ranks):
        ranks.all_reduce(torch.ones(1))
        raise KeyError(ranks.rank)

    with pytest.raises(KeyError, match="0"):
        rehearse(fail, 2)


def test_a_time_limit_holds():
    def loop(ranks):
        ranks.all_reduce(torch.ones(1))
        while True:
            pass

    with Sandbox(0.2, globals()) as box:
        rehearse(loop, 2)
    assert box.stopped == "time"
