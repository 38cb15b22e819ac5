"""Ranks that die, hang, raise, or are of another configuration: the others end soon, with one clear error."""

import math
import os
import re
import shlex
import signal
import socket
import time

import psutil
import pytest
import torch

from moe_lab.checkpoints import load, save
from moe_lab.config import LMConfig, MoEConfig, RunConfig, TrainConfig
from moe_lab.data import load_corpus
from moe_lab.lm import LM
from moe_lab.moe import MoE
from moe_lab.parallel import ExpertParallelMoE, ParallelTrainer, RankError, even_placement, launch
from moe_lab.parallel.demo import parse
from moe_lab.parallel.launching import outcomes_of
from moe_lab.parallel.process import Store
from moe_lab.paths import course_root
from moe_lab.plain import read_config

TIMEOUT = 3.0  # seconds that a rank waits for another here
WITHIN = 10.0  # seconds from when all have joined until every surviving rank has ended
BAD = 1
CONFIG = MoEConfig(d_model=8, n_experts=6, top_k=2, d_ff=4, n_shared_experts=1)
RUN = RunConfig(
    model=LMConfig(d_model=16, n_layers=1, n_heads=2, d_ff=16, moe=CONFIG.but(d_model=16)),
    training=TrainConfig(steps=6, batch_size=6, context=16),
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    time.sleep(600)


def fail() -> None:
    raise ZeroDivisionError("a fault of rank 1's own")


HAPPENS = {"die": die, "hang": hang, "fail": fail}


def before_a_call(ranks, what, happen) -> None:
    """Let something happen on the bad rank just before it sends tensors that hold `what`."""
    start = ranks.start_all_to_all

    def all_to_all(rows, send=None, receive=None, holds="rows"):
        if holds == what:
            happen()
        return start(rows, send, receive, holds)

    ranks.start_all_to_all = all_to_all


def forward_and_backward(ranks, where, what) -> str:
    """A step in which `what` happens on the bad rank: before, during or after its dispatch, or on the way back."""
    torch.manual_seed(0)
    layer = ExpertParallelMoE(MoE(CONFIG), ranks)
    x = torch.randn(5, 8, requires_grad=True)
    layer(x)[0].sum().backward()  # one that goes well: all are connected
    happen = HAPPENS[what]
    if ranks.rank == BAD:
        if where == "before dispatch":
            happen()
        elif where == "during dispatch":
            before_a_call(ranks, "rows", happen)
        elif where == "experts":
            layer.experts.register_forward_pre_hook(lambda *_: happen())
        elif where == "backward":
            layer.experts.register_full_backward_hook(lambda *_: happen())
    layer(x)[0].sum().backward()
    return "went well"


def processes_left() -> list[str]:
    """Children of this process beyond the two helpers that multiprocessing keeps for the next start."""
    children = psutil.Process().children(recursive=True)
    lines = [" ".join(child.cmdline()) for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [line for line in lines if "resource_tracker" not in line and "forkserver" not in line] + [
        line for line in lines if "forkserver" in line
    ][1:]


def check_survivors(outcomes, names: str, stage: str) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank != BAD:
            assert outcome.error, outcome
            assert outcome.error.startswith("RankError: ")
            assert f"rank {BAD} {names}" in outcome.error
            assert stage in outcome.error
            assert outcome.seconds < WITHIN
            assert outcome.exit_code == 1


@pytest.mark.parametrize(
    ("where", "stage"),
    [("before dispatch", "route"), ("during dispatch", "dispatch"), ("experts", "combine"), ("backward", "backward")],
)
def test_a_killed_rank_is_named_by_all_others(where, stage):
    outcomes = outcomes_of(forward_and_backward, 3, where, "die", timeout=TIMEOUT)
    assert outcomes[BAD].exit_code == -signal.SIGKILL
    check_survivors(outcomes, "is gone; it was last seen in", stage)
    assert not processes_left()


@pytest.mark.parametrize(("where", "stage"), [("during dispatch", "dispatch"), ("experts", "combine")])
def test_a_hanging_rank_is_named_after_the_time_out_and_killed_in_the_end(where, stage):
    outcomes = outcomes_of(forward_and_backward, 3, where, "hang", timeout=TIMEOUT)
    assert outcomes[BAD].error is None
    assert outcomes[BAD].exit_code == -signal.SIGKILL
    check_survivors(outcomes, "did not come: for", stage)
    assert not processes_left()


@pytest.mark.parametrize(("where", "stage"), [("before dispatch", "route"), ("experts", "combine")])
def test_what_a_rank_raised_is_told_by_all_others(where, stage):
    outcomes = outcomes_of(forward_and_backward, 3, where, "fail", timeout=TIMEOUT)
    assert outcomes[BAD].error == "ZeroDivisionError: a fault of rank 1's own"
    check_survivors(outcomes, "failed in", stage)
    assert all("a fault of rank 1's own" in outcome.error for outcome in outcomes)
    assert not processes_left()


def test_launch_raises_what_the_first_rank_raised():
    with pytest.raises(RankError, match=r"Rank 1 of 3 failed: ZeroDivisionError: a fault of rank 1's own") as caught:
        launch(forward_and_backward, 3, "experts", "fail", timeout=TIMEOUT)
    assert caught.value.rank == BAD


def of_another_configuration(ranks, field) -> None:
    is_bad = ranks.rank == BAD
    if field == "ep_size":
        ranks.split(1 if is_bad else ranks.size)
    config = CONFIG.but(n_experts=12 if is_bad else 6) if field == "n_experts" else CONFIG
    layer = MoE(config).to(torch.bfloat16 if field == "dtype" and is_bad else torch.float32)
    ExpertParallelMoE(layer, ranks)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("ep_size", "group_size: rank 0 has 3, rank 1 has 1, rank 2 has 3"),
        ("n_experts", "n_experts: rank 0 has 6, rank 1 has 12, rank 2 has 6"),
        ("dtype", "dtype: rank 0 has torch.float32, rank 1 has torch.bfloat16, rank 2 has torch.float32"),
    ],
)
def test_ranks_of_different_configurations_all_refuse(field, says):
    outcomes = outcomes_of(of_another_configuration, 3, field, timeout=TIMEOUT)
    for outcome in outcomes:
        assert outcome.error.startswith("ValueError: The ranks do not agree about")
        assert says in outcome.error
        assert outcome.seconds < WITHIN


def train_and_die(ranks, folder, where) -> None:
    """Three steps with a checkpoint after the second; then a rank dies, in a step or while rank 0 writes the next."""
    torch.manual_seed(0)
    trainer = ParallelTrainer(LM(RUN.model), load_corpus(["prose"]).train, RUN.training, ranks)
    for _ in range(3):
        trainer.step()
        state = trainer.state()
        if ranks.rank == 0 and trainer.index == 2:
            save(folder / "step-2.safetensors", state, RUN)
    if where == "in a step" and ranks.rank == BAD:
        trainer.experts_group.start_all_to_all = lambda *_: die()
    if where == "while writing" and ranks.rank == 0:
        import moe_lab.checkpoints

        def half(tensors, path, metadata):
            path.write_bytes(b"half a file")
            die()

        moe_lab.checkpoints.save_file = half
        save(folder / "step-2.safetensors", state, RUN)  # over the one that stands there
    trainer.step()


@pytest.mark.parametrize("where", ["in a step", "while writing"])
def test_the_last_complete_checkpoint_is_intact_and_resumes(where, tmp_path):
    outcomes = outcomes_of(train_and_die, 3, tmp_path, where, timeout=TIMEOUT)
    assert [outcome.exit_code for outcome in outcomes].count(-signal.SIGKILL) == 1
    assert [outcome.error.partition(":")[0] for outcome in outcomes if outcome.exit_code > 0] == ["RankError"] * 2
    state, found = load(tmp_path / "step-2.safetensors")
    assert found == RUN
    torch.manual_seed(0)
    whole = launch(resumed, 1, None)[0]
    assert launch(resumed, 2, state) == [pytest.approx(whole, rel=1e-5)] * 2


def resumed(ranks, state) -> list[float]:
    """The losses of steps 2 to 5, from the start or from a checkpoint after two steps."""
    torch.manual_seed(0)
    trainer = ParallelTrainer(LM(RUN.model), load_corpus(["prose"]).train, RUN.training, ranks)
    if state is not None:
        trainer.load_state(state)
    return [step.loss for step in [trainer.step() for _ in range(RUN.training.steps - trainer.index)][-4:]]


def test_ports_are_free_again():
    store = Store()
    port = int(store.address.rpartition(":")[2])
    with socket.socket() as taken, pytest.raises(OSError, match="in use"):
        taken.bind(("127.0.0.1", port))
    del store
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def listening() -> set[int]:
    return {c.laddr.port for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def test_a_launch_that_failed_keeps_no_port():
    before = listening()
    outcomes_of(forward_and_backward, 2, "experts", "die", timeout=TIMEOUT)
    assert listening() <= before


def give_a_lambda(ranks):
    return lambda: None


def test_what_cannot_be_sent_back_is_told():
    with pytest.raises(RankError, match=r"Rank 0 of 1 failed: .*pickle"):
        launch(give_a_lambda, 1, timeout=TIMEOUT)
    with pytest.raises(ValueError, match="size=0: expected 1 or more"):
        launch(give_a_lambda, 0)


@pytest.mark.parametrize("page", ["README.md", "docs/several_nodes.md"])
def test_commands_for_torchrun_fit_their_configuration(page):
    """Every command of the pages: options that exist, and as many ranks as its experts can be spread over."""
    text = (course_root() / page).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"torchrun(.*?)-m moe_lab\.parallel\.demo(.*)", text)
    assert commands
    for launcher, options in commands:
        n_ranks = math.prod(int(n) for n in re.findall(r"--(?:nnodes|nproc-per-node) (\d+)", launcher))
        n_ranks *= 2 if "$SLURM_NNODES" in launcher else 1
        args = parse(shlex.split(options.rstrip("'`. ")))
        config = read_config(args.config)
        ep_size = args.ep_size or n_ranks
        assert n_ranks % ep_size == 0
        assert ep_size % (args.node_size or 1) == 0
        assert config.training.batch_size >= n_ranks
        even_placement(config.model.moe.n_experts, ep_size)
