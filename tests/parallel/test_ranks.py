"""The contract of `Ranks`, kept alike by simulated ranks and by processes; and what a simulation promises beyond it."""

import random
import signal
import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_lab.parallel import RankError, Ranks, launch, leave, simulate
from moe_lab.parallel.simulation import SimulatedRanks

SIZE = 4
Program = Callable[[Ranks], object]
PROGRAMS: dict[str, Program] = {}


def program(function: Program) -> Program:
    """Something that every rank does. All of them run in one simulation, and in one launch."""
    PROGRAMS[function.__name__] = function
    return function


def run_all(ranks: Ranks) -> dict[str, object]:
    return {name: function(ranks) for name, function in PROGRAMS.items()}


def every_way(size: int) -> dict[str, list]:
    return {"simulated": simulate(run_all, size), "processes": launch(run_all, size, timeout=30)}


@pytest.fixture(scope="module")
def told() -> dict[str, list]:
    return every_way(SIZE)


@pytest.fixture(params=["simulated", "processes"])
def answers(request: pytest.FixtureRequest, told: dict[str, list]) -> Callable[[Program], list]:
    """What a program returned on each rank."""
    return lambda function: [one[function.__name__] for one in told[request.param]]


def message(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


# --- the contract ---------------------------------------------------------------------------------------------------


@program
def who(ranks: Ranks) -> tuple:
    return ranks.rank, ranks.size, ranks.members, ranks.world_rank, str(ranks.device), repr(ranks)


def test_every_rank_knows_itself_and_the_others(answers):
    for rank, (mine, size, members, world_rank, device, text) in enumerate(answers(who)):
        assert (mine, size, members, world_rank, device) == (rank, SIZE, (0, 1, 2, 3), rank, "cpu")
        assert text.endswith(f"Ranks(rank {rank} of 4)")


def sent(source: int, to: int) -> int:
    """How many rows go from a rank to another: none from 2, none to 3 but from itself, else all different."""
    return 0 if source == 2 or (to == 3 and source != 3) else source + 2 * to + 1


@program
def unequal(ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Rows that tell who sent them to whom, of two dimensions and of one."""
    send = [sent(ranks.rank, to) for to in range(SIZE)]
    receive = [sent(source, ranks.rank) for source in range(SIZE)]
    numbers = [100 * ranks.rank + 10 * to + i for to in range(SIZE) for i in range(send[to])]
    flat = torch.tensor(numbers, dtype=torch.int64)
    return ranks.all_to_all(flat[:, None].float().repeat(1, 3), send, receive), ranks.all_to_all(flat, send, receive)


def test_rows_arrive_sorted_by_who_sent_them(answers):
    for rank, (rows, flat) in enumerate(answers(unequal)):
        expected = [100 * source + 10 * rank + i for source in range(SIZE) for i in range(sent(source, rank))]
        assert flat.tolist() == expected
        assert torch.equal(rows, torch.tensor(expected).float()[:, None].expand(-1, 3))
        assert (rows.dtype, flat.dtype) == (torch.float32, torch.int64)


@program
def equal(ranks: Ranks) -> Tensor:
    return ranks.all_to_all(torch.arange(8) + 10 * ranks.rank)


def test_equal_parts_need_no_counts(answers):
    for rank, rows in enumerate(answers(equal)):
        assert rows.tolist() == [10 * source + 2 * rank + i for source in range(SIZE) for i in range(2)]


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)


@program
def dtypes(ranks: Ranks) -> list[tuple[Tensor, Tensor, Tensor]]:
    mine = [torch.full((4, 2), ranks.rank + 1, dtype=dtype) for dtype in DTYPES]
    return [(ranks.all_to_all(t), ranks.all_reduce(t), ranks.all_gather(t)) for t in mine]


def test_any_dtype_can_be_sent(answers):
    for told in answers(dtypes):
        for dtype, (rows, total, gathered) in zip(DTYPES, told, strict=True):
            assert rows.dtype == total.dtype == gathered.dtype == dtype
            assert rows[:, 1].tolist() == [1, 2, 3, 4]
            assert total.flatten().tolist() == [10] * 8
            assert gathered[:, 0, 0].tolist() == [1, 2, 3, 4]


@program
def nothing_at_all(ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    none = torch.empty(0, 3)
    return ranks.all_to_all(none, [0] * SIZE, [0] * SIZE), ranks.all_reduce(none), ranks.all_gather(none)


def test_nothing_can_be_sent_too(answers):
    for rows, total, gathered in answers(nothing_at_all):
        assert (rows.shape, total.shape, gathered.shape) == ((0, 3), (0, 3), (4, 0, 3))


@program
def totals(ranks: Ranks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mine = torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * 10**ranks.rank
    transposed, number = ranks.all_reduce(mine.T), ranks.all_reduce(torch.tensor(ranks.rank))
    return mine, transposed, number, ranks.all_gather(mine.T)


def test_sums_and_gathers_on_every_rank(answers):
    for rank, (mine, transposed, number, gathered) in enumerate(answers(totals)):
        assert mine.tolist() == [[10**rank, 2 * 10**rank], [3 * 10**rank, 4 * 10**rank]]  # what was given is as it was
        assert transposed.tolist() == [[1111, 3333], [2222, 4444]]
        assert number.item() == 6
        assert gathered[:, 0].tolist() == [[10**r, 3 * 10**r] for r in range(SIZE)]


@program
def kept_apart(ranks: Ranks) -> tuple[list, list, bool]:
    """What was sent is the receiver's own: neither side sees the other change it."""
    mine = torch.full((4,), float(ranks.rank))
    rows = ranks.all_to_all(mine)
    mine.fill_(-1)  # at once: others may not have looked yet
    total, gathered = ranks.all_reduce(mine), ranks.all_gather(mine)
    before = rows.tolist()
    for tensor in (rows, total, gathered):
        tensor.fill_(-2)
    ranks.all_reduce(torch.zeros(1))
    needs = ranks.all_reduce(torch.ones(1, requires_grad=True)).requires_grad
    return before, mine.tolist(), needs


def test_what_arrives_is_ones_own(answers):
    for before, mine, needs in answers(kept_apart):
        assert (before, mine, needs) == ([0, 1, 2, 3], [-1] * 4, False)


@program
def several_under_way(ranks: Ranks) -> list[list[int]]:
    """Three exchanges begun before the first is waited for, and waited for in another order."""
    begun = [ranks.start_all_to_all(torch.arange(4) + 10 * ranks.rank + 100 * n) for n in range(3)]
    between = ranks.all_reduce(torch.tensor(1)).item()
    arrived = {n: begun[n].wait().tolist() for n in (2, 0, 1)}
    assert between == 4
    assert torch.equal(begun[1].wait(), begun[1].wait())  # twice is not too often
    return [arrived[n] for n in range(3)]


def test_exchanges_under_way_do_not_mix(answers):
    for rank, arrived in enumerate(answers(several_under_way)):
        assert arrived == [[rank + 10 * source + 100 * n for source in range(SIZE)] for n in range(3)]


@program
def point_to_point(ranks: Ranks) -> tuple[list[float], ...]:
    """Two letters to the next rank and one to the last but one, answered in order; rank 0 begins."""
    rank, nothing = ranks.rank, torch.empty(2)
    after, before = (rank + 1) % SIZE, (rank - 1) % SIZE
    if rank == 0:
        for n in (1, 2):
            ranks.send(torch.tensor([rank, n]).float(), after)
    got = [ranks.receive(nothing, before).tolist() for _ in range(2)]
    if rank != 0:
        for n in (1, 2):
            ranks.send(torch.tensor([rank, n]).float(), after)
    assert nothing.shape == (2,)
    return tuple(got)


def test_letters_arrive_in_order(answers):
    for rank, got in enumerate(answers(point_to_point)):
        before = (rank - 1) % SIZE
        assert got == ([before, 1], [before, 2])


@program
def smaller_groups(ranks: Ranks) -> tuple:
    within, across = ranks.split(2)
    whole, alone = ranks.split(4)[0], within.split(1)[0]  # a group of a group, too
    letter = torch.tensor([ranks.rank])
    if within.rank == 0:
        within.send(letter, 1)
        came = -1
    else:
        came = within.receive(letter, 0).item()
    sums = [group.all_reduce(letter).item() for group in (within, across, whole, alone)]
    rows = across.all_to_all(torch.tensor([1.0, 2.0]) + 10 * ranks.rank, [1, 1], [1, 1]).tolist()
    return (within.rank, within.members, within.world_rank), (across.rank, across.members), sums, rows, came


def test_a_group_splits_into_neighbours_and_those_across(answers):
    for rank, (within, across, sums, rows, came) in enumerate(answers(smaller_groups)):
        first, place = rank - rank % 2, rank % 2
        assert within == (place, (first, first + 1), rank)
        assert across == (rank // 2, (place, place + 2))
        assert sums == [2 * first + 1, 2 * place + 2, 6, rank]
        assert rows == [1 + rank // 2 + 10 * place, 1 + rank // 2 + 10 * (place + 2)]
        assert came == (first if place else -1)


@program
def of_one_mind(ranks: Ranks) -> tuple[str, str, str]:
    same = message(lambda: ranks.agree("the size", width=8, name="größer"))
    other = message(lambda: ranks.agree("the size", width=8 + (ranks.rank == 2), name="a", depth=2))
    fewer = message(lambda: ranks.agree("the size", **({"width": 8} if ranks.rank else {})))
    return same, other, fewer


def test_ranks_that_differ_are_told_by_whom_and_how(answers):
    for same, other, fewer in answers(of_one_mind):
        assert same == "nothing was raised"
        assert other.startswith("ValueError: The ranks do not agree about the size")
        assert "width: rank 0 has 8, rank 1 has 8, rank 2 has 9, rank 3 has 8" in other
        assert "name" not in other
        assert "depth" not in other
        assert fewer.startswith("ValueError: The ranks do not agree about the size")


@program
def texts(ranks: Ranks) -> list[str]:
    return ranks.gather_text("é" * ranks.rank)


def test_texts_of_any_length_are_gathered(answers):
    assert answers(texts) == [["", "é", "éé", "ééé"]] * SIZE


@program
def refused(ranks: Ranks) -> list[str]:
    """What is wrong on every rank alike is refused before anything is sent."""
    rows = torch.zeros(6, 2)
    return [
        message(lambda: ranks.all_to_all(rows)),
        message(lambda: ranks.all_to_all(rows, [1, 2, 3], [1, 2, 3])),
        message(lambda: ranks.all_to_all(rows, [1, 2, 4, -1], [1, 2, 3, 0])),
        message(lambda: ranks.all_to_all(rows, [1, 2, 3, 1], [1, 2, 3, 0])),
        message(lambda: ranks.all_to_all(rows.T, [1, 1, 0, 0], [1, 1, 0, 0])),
        message(lambda: ranks.split(3)),
        message(lambda: ranks.split(0)),
        message(lambda: ranks.send(rows, ranks.rank)),
        message(lambda: ranks.receive(rows, 4)),
    ]


def test_what_cannot_be_sent_is_refused_with_the_numbers(answers):
    words = [
        ("6 rows for 4 ranks", "send=["),
        ("send=[1, 2, 3]", "4 counts"),
        ("send=[1, 2, 4, -1]", "0 or more"),
        ("send=[1, 2, 3, 1] adds up to 7", "expected 6"),
        ("(2, 6) with strides (1, 2)", "contiguous"),
        ("group_size=3", "divisor of the 4 ranks"),
        ("group_size=0", "divisor of the 4 ranks"),
        ("another one of the 4 ranks",),
        ("rank 4", "another one of the 4 ranks"),
    ]
    for got in answers(refused):
        for text, expected in zip(got, words, strict=True):
            assert text.startswith("ValueError: ")
            assert all(word in text for word in expected), text


@program
def watched(ranks: Ranks) -> list:
    """What is seen: by whom, when, in this group and in those split from it; and nothing when nobody looks."""
    within, _ = ranks.split(2)
    ranks.all_reduce(torch.zeros(1))
    with ranks.watch() as outer:
        with ranks.stage("dispatch"), ranks.stage("inner"):
            ranks.all_to_all(torch.zeros(6, 5), *counts_of_watched(ranks.rank), "ids")
        with within.watch() as inner:
            pending = within.start_all_to_all(torch.zeros(2, dtype=torch.int64))
            time.sleep(0.01)
            pending.wait()
    ranks.all_reduce(torch.zeros(1))
    return [outer, inner]


def counts_of_watched(rank: int) -> tuple[list[int], list[int]]:
    """Rank r sends 0, 1, 2, 3 rows, turned by r."""
    return [(to - rank) % SIZE for to in range(SIZE)], [(rank - source) % SIZE for source in range(SIZE)]


def test_watchers_see_what_is_sent_and_what_is_computed(answers):
    for rank, (outer, inner) in enumerate(answers(watched)):
        kinds = [(event.kind, event.stage, event.what) for event in outer]
        assert kinds == [
            ("all_to_all", "inner", "ids"),
            ("compute", "inner", ""),
            ("compute", "dispatch", ""),
            ("all_to_all", "no stage", "rows"),
        ]
        ids, innermost, dispatch, rows = outer
        assert ids.rows == tuple((to - rank) % SIZE for to in range(SIZE))
        assert (ids.bytes_per_row, ids.rank, ids.targets) == (20, rank, (0, 1, 2, 3))
        assert (ids.rows_to_others, ids.bytes_to_others) == (6, 120)
        assert dispatch.begin <= innermost.begin <= ids.begin <= ids.end <= innermost.end <= dispatch.end
        assert inner == [rows]
        first = rank - rank % 2
        assert (rows.rows, rows.targets, rows.bytes_to_others) == ((1, 1), (first, first + 1), 8)
        assert rows.end - rows.begin >= 0.01


@program
def stages(ranks: Ranks) -> list[str]:
    seen = [ranks.stage_now]
    with ranks.stage("outer"):
        try:
            with ranks.stage("inner"):
                seen.append(ranks.stage_now)
                raise KeyError("leaves the stage as well")
        except KeyError:
            seen.append(ranks.stage_now)
    return [*seen, ranks.stage_now]


def test_the_innermost_stage_is_the_one_that_counts(answers):
    assert answers(stages) == [["no stage", "inner", "outer", "no stage"]] * SIZE


@program
def slowly(ranks: Ranks) -> tuple[float, float, float]:
    """Seconds of an exchange on a slow wire, of two at once, and of one after that."""
    took = []
    rows = torch.zeros(4)
    with ranks.slow_wire(0.3):
        for n in (1, 2):
            begin = time.perf_counter()
            begun = [ranks.start_all_to_all(rows) for _ in range(n)]
            for one in begun:
                one.wait()
            took.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    ranks.all_to_all(rows)
    return *took, time.perf_counter() - begin


def test_a_slow_wire_takes_its_time_for_any_number_at_once(answers):
    for one, two, after in answers(slowly):
        assert one >= 0.3
        assert 0.3 <= two < 0.55
        assert after < 0.25


def test_the_same_program_gives_the_same_bits(told):
    for name in ("unequal", "equal", "dtypes", "totals", "several_under_way"):
        for ours, theirs in zip(told["simulated"], told["processes"], strict=True):
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def sum_of_fractions(ranks: Ranks) -> Tensor:
    """Numbers whose sum depends on the order."""
    torch.manual_seed(ranks.rank)
    return ranks.all_reduce(torch.randn(50))


def test_sums_of_two_are_the_same_bits():
    assert all(map(torch.equal, simulate(sum_of_fractions, 2), launch(sum_of_fractions, 2, timeout=30)))


@pytest.mark.parametrize("start", [simulate, launch])
def test_a_single_rank_talks_to_itself(start):
    ((rows, total, gathered, members, at_once),) = start(lonely, 1)
    assert (rows.tolist(), total.tolist(), gathered.tolist()) == ([0, 1, 2], [1, 1], [[7]])
    assert members == ((0,), (0,))
    assert [arrived.tolist() for arrived in at_once] == [[1], [2]]


def lonely(ranks: Ranks) -> tuple:
    within, across = ranks.split(1)
    rows = ranks.all_to_all(torch.arange(3), [3], [3])
    gathered = ranks.all_gather(torch.tensor([7]))
    under_way = [within.start_all_to_all(torch.tensor([1])), across.start_all_to_all(torch.tensor([2]))]
    at_once = [pending.wait() for pending in under_way]  # two groups of the same member are two groups
    return rows, ranks.all_reduce(torch.ones(2)), gathered, (within.members, across.members), at_once


# --- simulations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_left():
    """No thread outlives a simulation for long."""
    before = set(threading.enumerate())
    yield
    until = time.monotonic() + 5
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < until, left
        time.sleep(0.01)


pytestmark = pytest.mark.usefixtures("nothing_left")


def test_a_simulation_returns_what_each_rank_returns_and_hands_arguments_on():
    assert simulate(lambda ranks, a, b: (ranks.rank, a, b), 3, "x", 7) == [(0, "x", 7), (1, "x", 7), (2, "x", 7)]


@pytest.mark.parametrize("size", [0, -1])
def test_there_is_at_least_one_rank(size):
    with pytest.raises(ValueError, match=rf"size={size}: expected 1 or more"):
        simulate(who, size)


def test_ranks_take_turns_in_one_order():
    def turns(ranks: Ranks, seen: list[int]) -> None:
        for _ in range(3):
            seen.append(ranks.rank)
            ranks.all_reduce(torch.zeros(1))

    orders = []
    for _ in range(3):
        seen: list[int] = []
        simulate(turns, 4, seen)
        orders.append(seen)
    assert orders[0] == orders[1] == orders[2]
    assert sorted(orders[0]) == sorted([0, 1, 2, 3] * 3)


def test_only_one_rank_runs_at_a_time():
    def program(ranks: Ranks, inside: list[int]) -> int:
        most = 0
        for _ in range(20):
            inside.append(ranks.rank)
            time.sleep(0.0005)
            most = max(most, len(inside))
            inside.remove(ranks.rank)
            ranks.all_reduce(torch.zeros(1))
        return most

    assert simulate(program, 4, []) == [1] * 4


def draws(ranks: Ranks) -> list[float]:
    """Random numbers with calls between them, as many as a rank has: they would mix if they were shared."""
    drawn = []
    for _ in range(3):
        drawn += torch.rand(1 + ranks.rank).tolist()
        ranks.all_reduce(torch.zeros(1))
    return drawn


def test_every_rank_has_random_numbers_of_its_own():
    torch.manual_seed(5)
    expected = torch.rand(12).tolist()
    torch.manual_seed(5)
    told = simulate(draws, 4)
    after = torch.rand(1).item()
    for rank, drawn in enumerate(told):
        assert drawn == pytest.approx(expected[: 3 * (rank + 1)])
    assert after == expected[0]  # the caller's have not moved


def test_a_seed_on_one_rank_is_that_ranks_alone():
    def program(ranks: Ranks) -> float:
        if ranks.rank == 1:
            torch.manual_seed(11)
        ranks.all_reduce(torch.zeros(1))
        return torch.rand(1).item()

    torch.manual_seed(5)
    first = torch.rand(1).item()
    torch.manual_seed(11)
    other = torch.rand(1).item()
    torch.manual_seed(5)
    assert simulate(program, 3) == [first, other, first]


def test_who_waits_for_nobody_is_named_with_the_stage():
    def program(ranks: Ranks) -> None:
        if ranks.rank != 1:
            with ranks.stage("dispatch"):
                ranks.all_reduce(torch.zeros(1))

    with pytest.raises(RankError) as raised:
        simulate(program, 3)
    text = str(raised.value)
    assert "rank 0 waits in all_reduce (dispatch)" in text
    assert "rank 2 waits in all_reduce (dispatch)" in text
    assert "Rank 1 has ended without it" in text


def test_different_calls_are_a_deadlock_that_is_named():
    def program(ranks: Ranks) -> None:
        (ranks.all_gather if ranks.rank else ranks.all_reduce)(torch.zeros(1))

    with pytest.raises(RankError, match=r"rank 0 waits in all_reduce.*; rank 1 waits in all_gather"):
        simulate(program, 2)


def test_two_that_wait_for_each_others_letter():
    def program(ranks: Ranks) -> None:
        ranks.receive(torch.zeros(1), 1 - ranks.rank)

    with pytest.raises(RankError, match=r"rank 0 waits in receive from rank 1.*rank 1 waits in receive from rank 0"):
        simulate(program, 2)


def test_calls_in_another_order_on_groups_are_a_deadlock():
    def program(ranks: Ranks) -> None:
        within, across = ranks.split(2)
        for group in (within, across) if ranks.rank in (0, 3) else (across, within):
            group.all_reduce(torch.zeros(1))

    with pytest.raises(RankError, match="Nobody can go on"):
        simulate(program, 4)


def test_wrong_receive_counts_are_told():
    def program(ranks: Ranks) -> None:
        ranks.all_to_all(torch.zeros(3), [1, 2], [1, 1])

    with pytest.raises(ValueError, match=r"receive=\[1, 1\], but \[1, 1\]|receive=\[1, 1\], but \[2, 2\] rows came"):
        simulate(program, 2)


@pytest.mark.parametrize("other", [torch.zeros(2, 3).double(), torch.zeros(2, 4)], ids=["dtype", "width"])
def test_rows_of_another_kind_are_refused(other):
    def program(ranks: Ranks) -> None:
        ranks.all_to_all(other if ranks.rank else torch.zeros(2, 3))

    with pytest.raises(ValueError, match="different kinds"):
        simulate(program, 2)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_the_error_of_the_rank_that_failed_comes_out(failing):
    def program(ranks: Ranks, seen: dict[int, str]) -> None:
        try:
            ranks.all_reduce(torch.zeros(1))
            if ranks.rank == failing:
                raise KeyError("the cause")
            ranks.all_reduce(torch.zeros(1))
        except RankError as error:
            seen[ranks.rank] = str(error)
            raise

    seen: dict[int, str] = {}
    with pytest.raises(KeyError, match="the cause"):
        simulate(program, 3, seen)
    assert seen == {rank: f"Rank {failing} failed: KeyError: 'the cause'" for rank in range(3) if rank != failing}


def test_a_rank_that_catches_the_error_cannot_go_on_waiting():
    def program(ranks: Ranks) -> None:
        if ranks.rank == 0:
            raise KeyError("the cause")
        while True:
            try:
                ranks.all_reduce(torch.zeros(1))
            except RankError:
                ranks.all_reduce(torch.zeros(1))

    with pytest.raises(KeyError):
        simulate(program, 2)


def test_after_a_failure_random_numbers_are_as_before():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)

    def program(ranks: Ranks) -> None:
        torch.rand(7)
        ranks.all_reduce(torch.zeros(1))
        raise KeyError

    with pytest.raises(KeyError):
        simulate(program, 2)
    assert torch.equal(torch.rand(1), expected)


def test_a_simulation_inside_a_simulation():
    def inner(ranks: Ranks, outer: int) -> int:
        torch.rand(5)
        return ranks.all_reduce(torch.tensor(outer + ranks.rank)).item()

    def program(ranks: Ranks) -> tuple[list[int], int, float]:
        before = ranks.all_reduce(torch.tensor(1)).item()
        return simulate(inner, 3, 10 * ranks.rank), before, torch.rand(1).item()

    torch.manual_seed(5)
    told = simulate(program, 2)
    torch.manual_seed(5)
    random_number = torch.rand(1).item()
    assert told == [([3, 3, 3], 2, random_number), ([33, 33, 33], 2, random_number)]


@pytest.fixture
def interruptible():
    """Ctrl-C is heard in this process; workers of pytest-xdist are deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signal can be sent to a thread here")
@pytest.mark.usefixtures("interruptible")
def test_a_caller_that_is_interrupted_leaves_nothing():
    def program(ranks: Ranks) -> None:
        for turn in range(500):
            if ranks.rank == 1 and turn == 5:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # Ctrl-C, while the caller waits
            ranks.all_reduce(torch.zeros(1))
            time.sleep(0.01)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        simulate(program, 3)
    assert time.monotonic() - begin < 5


def test_an_interrupt_in_a_rank_comes_out():
    def program(ranks: Ranks) -> None:
        if ranks.rank == 1:
            raise KeyboardInterrupt
        ranks.all_reduce(torch.zeros(1))

    with pytest.raises(KeyboardInterrupt):
        simulate(program, 2)


def test_no_mail_is_left():
    def program(ranks: SimulatedRanks) -> dict:
        run_all(ranks)
        ranks.all_reduce(torch.zeros(1))
        return ranks._place.mail

    assert [len(mail) for mail in simulate(program, 4)] == [0] * 4


def test_any_program_that_processes_can_run():
    """Random calls in a random order, but the same on all: nothing is mixed up."""

    def program(ranks: Ranks, seed: int) -> bool:
        chance = random.Random(seed)
        within, across = ranks.split(2)
        under_way, right = [], True
        for number in range(60):
            group = chance.choice([ranks, within, across])
            mine = torch.tensor([1000 * number + ranks.rank] * group.size)
            what = chance.choice(["start", "wait", "reduce", "gather"])
            if what == "start":
                under_way.append((number, group, group.start_all_to_all(mine)))
            elif what == "wait" and under_way:
                began, of, pending = under_way.pop(chance.randrange(len(under_way)))
                right &= pending.wait().tolist() == [1000 * began + member for member in of.members]
            elif what == "reduce":
                right &= group.all_reduce(mine)[0].item() == sum(1000 * number + member for member in group.members)
            else:
                right &= group.all_gather(mine)[:, 0].tolist() == [1000 * number + member for member in group.members]
        for began, of, pending in under_way:
            right &= pending.wait().tolist() == [1000 * began + member for member in of.members]
        return bool(right)

    for seed in range(10):
        assert simulate(program, 4, seed) == [True] * 4


def test_a_group_that_was_left_refuses_to_talk_and_a_split_is_made_once():
    assert launch(leave_and_call, 2, timeout=10) == [(True, True, "This group was left")] * 2


def leave_and_call(ranks: Ranks) -> tuple[bool, bool, str]:
    within, across = ranks.split(1)
    is_same = ranks.split(1)[0] is within
    leave(ranks)
    said = set()
    for group in (ranks, within, across):
        try:
            group.all_reduce(torch.zeros(1))
        except RankError as error:
            said.add(str(error).partition(":")[0])
    return is_same, not ranks.is_joined, *said
