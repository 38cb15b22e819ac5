# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# moe_lab:
#   title: Expert parallelism
#   minutes: 60
#   seconds: 90
#   hardware: CPU
# ---

# %% [markdown]
# # 07 · Expert parallelism
#
# **What travels when experts live on different ranks?**
#
# `CPU` · 60 minutes · prerequisites: notebooks 03 and 04
#
# At the end **you will have built** a layer of experts that runs in four processes: the way of every token to its experts
# on other ranks and back, and gradients equal to those of one process. You will have counted what travels, and broken it in
# the ways that shipped code was broken.
#
# What is marked *optional*, sections 8 and 10 too, goes past the hour: run its cells, and read it another time.

# %%
import torch

from moe_lab import viz
from moe_lab.config import MoEConfig
from moe_lab.course import exercise, show_progress
from moe_lab.course.cluster import start_cluster
from moe_lab.moe import MoE
from moe_lab.parallel import Placement, even_placement, simulate
from moe_lab.parallel.cost import all_gather_bytes, all_reduce_bytes, all_to_all_bytes

torch.set_num_threads(1)

# %% [markdown]
# ## Predict first
#
# Four processes share a layer: each has a quarter of the experts and of the tokens. A token goes to two experts, anywhere:
# two copies. **How many of 100 copies leave their process?** And of all-reduce, all-gather and all-to-all on equal buffers:
# **which sends the most bytes?** Write your guesses for `None`; sections 9 and 11 tell.

# %%
my_guess = {"copies that leave, of 100": None, "most bytes": None}

# %% [markdown]
# ## 1 What a rank is
#
# A **rank** is one of several processes that run the same program, each on its own part. Start four, on this machine.
# (Where a notebook may not start processes, they are simulated, and all cells give the same.)

# %% tags=["nbval-ignore-output"]
cluster = start_cluster(4)

# %% [markdown]
# A cell that begins with `%%px` runs on **every** rank. Each has names of its own, and does not see this notebook's; other
# cells run in the notebook, which is no rank and has no `ranks`.

# %% tags=["nbval-ignore-output"]
# %%px
import os

print("process", os.getpid())

# %% [markdown]
# `ranks` is there on every rank: who am I, and how many are we?

# %%
# %%px
print(f"rank {ranks.rank} of {ranks.size}")

# %% [markdown]
# The same line gave four answers. So each rank makes four numbers of its own:

# %%
# %%px
import torch

numbers = 10 * ranks.rank + torch.arange(4)
print(numbers.tolist())

# %% [markdown]
# Ranks talk in **collectives**: calls that all of them make together. Whoever calls waits until the others have called,
# too. Four ways to talk matter here. **Predict** each one's lines before you run its cell.
#
# **all-reduce**: the sum over the ranks, number by number, on every rank.

# %%
# %%px
print(ranks.all_reduce(numbers).tolist())

# %% [markdown]
# **all-gather**: each gives one number, and everybody gets all of them.

# %%
# %%px
print(ranks.all_gather(numbers[0]).tolist())

# %% [markdown]
# **all-to-all**: each has one number for each rank, the first for rank 0, the second for rank 1.

# %%
# %%px
print(ranks.all_to_all(numbers).tolist())

# %% [markdown]
# Read the four lines of `numbers` as a table: it was transposed. And last, **point to point**: from one rank to its next
# neighbour. `receive` takes a tensor `like` the one that will come, for its shape and type.

# %%
# %%px
if ranks.rank < 3:
    ranks.send(numbers[0], to=ranks.rank + 1)
if ranks.rank > 0:
    print(ranks.receive(like=numbers[0], source=ranks.rank - 1).item())

# %%
viz.draw_collectives()

# %% [markdown]
# Who uses which? Four ways to share a model, each with its own collective:
#
# | way | what a rank has | what travels | by | source |
# |---|---|---|---|---|
# | data parallel, DP | the whole model, its own tokens | gradients, once a step | all-reduce | [Li et al. 2020](https://arxiv.org/abs/2006.15704) |
# | tensor parallel, TP | a slice of every matrix | activations, in every layer | all-reduce, all-gather | [Shoeybi et al. 2019](https://arxiv.org/abs/1909.08053), section 3 |
# | **expert parallel, EP** | some of the experts, its own tokens | copies of tokens, in every MoE layer | **all-to-all** | [Lepikhin et al. 2020](https://arxiv.org/abs/2006.16668), section 3 |
# | pipeline parallel, PP | some of the layers | activations, between stages | point to point | [Narayanan et al. 2021](https://arxiv.org/abs/2104.04473), section 2 |
#
# ## 2 Who owns which expert
#
# Eight experts on four ranks, two each, in order: a **placement**. Expert 5 is a *global* id. On rank 2, which holds
# (4, 5), it is *local* number 1.

# %%
placement = even_placement(n_experts=8, n_ranks=4)
print(placement.experts)

# %% [markdown]
# Nine tokens, unevenly spread. Each token is one number, whose tens tell its rank; and each chooses two experts. For each
# choice a copy of the token is made: a **row**.

# %%
all_x = [[1, 2, 3], [11, 12], [21, 22, 23], [31]]
all_x = [
    torch.tensor(x, dtype=torch.float32)[:, None] for x in all_x
]  # (T, 1) on each rank
all_choices = [
    torch.tensor([[0, 5], [3, 2], [5, 1]]),
    torch.tensor([[5, 2], [7, 5]]),
    torch.tensor([[4, 0], [5, 6], [2, 5]]),
    torch.tensor([[6, 1]]),
]
print(sum(choices.numel() for choices in all_choices), "rows")

# %% [markdown]
# **Predict** from the lists: how many of the 18 rows leave their rank?

# %%
viz.draw_exchange(all_choices, placement, all_x)

# %% [markdown]
# Everybody wants expert 5. Before sending, a rank counts.
#
# ### Exercise 7.1 · what to send
#
# ●○○ · 4 minutes · one to four lines
#
# `experts` is a placement's tuple, as printed above, of any number of experts; all ranks hold equally many. Return a table
# (ranks, experts on a rank), `int64`: at [r, j] how many of this rank's rows go to the j-th expert of rank r.
#
# <details><summary>Hint 1</summary>
#
# First count for each global id: `torch.bincount`, with `minlength`. Every choice is a row.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Indexing with a table gives a table: `counts[torch.tensor(experts)]`.
#
# </details>


# %%
@exercise("7.1")
def send_counts(topk_experts, experts):
    """(T, K) choices of one rank, and who holds what, to (ranks, own): rows for each expert."""
    ### BEGIN SOLUTION
    n_experts = sum(len(held) for held in experts)
    of_expert = torch.bincount(topk_experts.flatten(), minlength=n_experts)
    return of_expert[torch.tensor(experts)]
    ### END SOLUTION


# %% [markdown]
# A rank's row sums are one line of the **traffic matrix**. What stays at home does not travel:

# %%
traffic = torch.stack(
    [send_counts(choices, placement.experts).sum(1) for choices in all_choices]
)
print("leave:", int(traffic.sum() - traffic.trace()), "of", int(traffic.sum()))
viz.draw_traffic(
    traffic,
    title="Rows from rank to rank",
    alt="A matrix of four ranks by four. Rank 2 is sent two rows by rank 0 and two by rank 1; "
    "rank 3 sends a single row, to rank 0. On the diagonal what stays.",
)

# %% [markdown]
# ## 3 The way there
#
# `cluster.push` copies names from here to all ranks. (If you solve an exercise later, run the `push` below it again.) And
# `%%px --local` runs a cell here *and* on all ranks.

# %%
all_weights = [torch.tensor([0.75, 0.25]).expand(choices.shape) for choices in all_choices]
cluster.push(send_counts=send_counts, placement=placement)
cluster.push(all_x=all_x, all_choices=all_choices, all_weights=all_weights)

# %%
# %%px --local
from moe_lab import dispatch as one_rank  # notebook 04's functions

# %% [markdown]
# Each rank takes its own part, and sorts its rows by expert, as in notebook 04. In that order they also stand rank by rank,
# *because this placement is in order*. For another one, renumber first: sort by the expert's place in the list of all
# ranks' experts.

# %%
# %%px
x, choices = all_x[ranks.rank], all_choices[ranks.rank]
plan = one_rank.sort_choices(choices, n_experts=8)
rows = one_rank.permute(x, plan)  # (R, 1)
counts = send_counts(choices, placement.experts)
print(rows.flatten().tolist(), counts.tolist())

# %% [markdown]
# Each knows what it sends; what comes is up to the others' routers. So two exchanges: first **counts**, then **rows**.
#
# `ranks.all_to_all(t)` cuts `t` along its first dimension into equal parts, part r for rank r. For unequal parts:
# `all_to_all(t, send, receive)`, two lists; `send[r]` rows go to rank r, `receive[r]` come from it. Here only rank 0 sends:

# %%
# %%px
send = [0, 1, 2, 3] if ranks.rank == 0 else [0, 0, 0, 0]
receive = [ranks.rank, 0, 0, 0]
print(ranks.all_to_all(100 + torch.arange(sum(send)), send, receive).tolist())

# %% [markdown]
# ### Exercise 7.2 · dispatch
#
# ●●○ · 7 minutes · three or four lines
#
# `rows` (R, D) are sorted by rank and expert; `counts` is 7.1's table. Return what arrived, (R', D), and the table of what
# came: at [s, j] how many rows from rank s for this rank's j-th expert. Rows for the rank itself go through the call, too.
#
# <details><summary>Hint 1</summary>
#
# Row r of `counts` is for rank r, so the table is itself something to be exchanged, in equal parts of one row.
#
# </details>
# <details><summary>Hint 2</summary>
#
# How many rows go to rank r? The sum of row r. `.sum(1).tolist()` of one table gives `send`, of the other `receive`.
#
# </details>


# %%
@exercise("7.2")
def dispatch(rows, counts, ranks):
    """Rows (R, D) to the ranks of their experts: what came, (R', D), and from whom for what."""
    ### BEGIN SOLUTION
    received = ranks.all_to_all(counts)
    send, receive = counts.sum(1).tolist(), received.sum(1).tolist()
    return ranks.all_to_all(rows, send, receive), received
    ### END SOLUTION


# %%
cluster.push(dispatch=dispatch)

# %%
# %%px
arrived, received = dispatch(rows, counts, ranks)
print(arrived.flatten().tolist(), received.tolist())

# %% [markdown]
# Rank 2 has seven rows, rank 3 three. Their tens tell where they come from: they stand in the order of the ranks.
#
# ## 4 Regroup
#
# An expert wants its rows together. They lie rank by rank, and within a rank expert by expert. On rank 2 (`cluster.pull`
# brings a name's values here, a list with one for each rank):

# %%
came, values = cluster.pull("received")[2], cluster.pull("arrived")[2]
viz.draw_regroup(came, placement.experts[2], values)

# %% [markdown]
# ### Exercise 7.3 · regroup
#
# ●●○ · 7 minutes · two to four lines
#
# From the table `received` (ranks, own) return the order (R',), `int64`, for which `arrived[order]` stands expert by expert,
# and within an expert in the order in which the rows came.
#
# <details><summary>Hint 1</summary>
#
# Which expert is each arrived row for? Read row by row, the table's columns run 0, 1, …, 0, 1, …: `repeat` makes that list.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `repeat_interleave` with the flattened counts makes as many of each as there are rows. Then a stable `argsort`.
#
# </details>


# %%
@exercise("7.3")
def regroup(received):
    """(ranks, own) counts of what came to (R',): the order that sorts it by expert."""
    ### BEGIN SOLUTION
    n_ranks, own = received.shape
    experts = torch.arange(own).repeat(n_ranks).repeat_interleave(received.flatten())
    return experts.argsort(stable=True)
    ### END SOLUTION


# %% [markdown]
# Now the experts work, each on its own rank. As in notebook 04, expert e multiplies by e + 1.

# %%
cluster.push(regroup=regroup)

# %%
# %%px
order = regroup(received)
own = torch.tensor(placement.experts[ranks.rank])  # global ids
factors = (own + 1.0).repeat_interleave(received.sum(0))  # of each row, expert by expert
outputs = arrived[order] * factors[:, None]
print(arrived[order].flatten().tolist(), "to", outputs.flatten().tolist())

# %% [markdown]
# ## 5 The way back
#
# Every output goes back to where its row came from; there notebook 04's `combine` can sum a token's rows.
#
# ### Exercise 7.4 · combine over ranks
#
# ●●○ · 5 minutes · three or four lines
#
# `outputs` (R', D) stand expert by expert; `order`, `counts` and `received` are those of the way there. Return this rank's
# own rows, (R, D), in the order in which they left.
#
# <details><summary>Hint 1</summary>
#
# all-to-all cuts by rank. So first undo the regrouping: what stands at place i arrived as row `order[i]`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `rows[order] = outputs`, or `outputs[order.argsort()]`. And who sends now what was received?
#
# </details>


# %%
@exercise("7.4")
def combine(outputs, order, counts, received, ranks):
    """Outputs (R', D), expert by expert, back to where their rows came from: (R, D)."""
    ### BEGIN SOLUTION
    rows = torch.empty_like(outputs)
    rows[order] = outputs
    return ranks.all_to_all(rows, received.sum(1).tolist(), counts.sum(1).tolist())
    ### END SOLUTION


# %%
cluster.push(combine=combine)

# %%
# %%px
back = combine(outputs, order, counts, received, ranks)
y = one_rank.combine(back, plan, all_weights[ranks.rank])
print(y.flatten().tolist())

# %% [markdown]
# **Check it** against one process that has all tokens and all experts:

# %%
x, choices, weights = (torch.cat(parts) for parts in (all_x, all_choices, all_weights))
alone = (weights * (choices + 1) * x).sum(1, keepdim=True)
print("four ranks equal one process:", torch.equal(torch.cat(cluster.pull("y")), alone))

# %% [markdown]
# **The whole layer**: notebook 04's, cut open where a row leaves its rank. So that it holds for any placement, choices are
# renumbered first: `choose_slots` gives the expert's place in the list of all ranks' experts, its *slot*. In that order
# rows do stand rank by rank.


# %%
def forward(x, routing, placement, own, ranks):
    """This rank's (T, D) to (T, D); `own` are its experts, `placement` says who holds which."""
    slots = placement.choose_slots(routing.topk_experts)
    plan = one_rank.sort_choices(slots, placement.n_slots)
    counts = send_counts(routing.topk_experts, placement.experts)
    arrived, received = dispatch(one_rank.permute(x, plan), counts, ranks)
    order = regroup(received)
    ends = received.sum(0).cumsum(0).int()
    outputs = own(arrived[order], ends)
    rows = combine(outputs, order, counts, received, ranks)
    return one_rank.combine(rows, plan, routing.topk_weights)


# %% [markdown]
# ## 6 Gradients
#
# A gradient goes the way of its row, backwards: so **the backward of an all-to-all is an all-to-all with the counts
# exchanged**. Autograd has to be told; `exchange`, of the package, does that. It starts, and gives a function that waits.

# %%
# %%px --local
from moe_lab.parallel import exchange


class WithGradients:
    """Ranks whose all-to-all sends gradients back the way that the rows came."""

    def __init__(self, ranks):
        self.ranks = ranks

    def all_to_all(self, rows, send=None, receive=None):
        if send is None:  # counts, which have no gradient
            return self.ranks.all_to_all(rows)
        return exchange(self.ranks, rows, send, receive)()


# %% [markdown]
# What does a rank have after `backward()`?
#
# | gradient of | comes from |
# |---|---|
# | its experts, which are nowhere else | the tokens of **all** ranks, through the exchange |
# | its copy of the router | this rank's tokens **alone** |
#
# ### Exercise 7.5 · gradients
#
# ●●○ · 6 minutes · two or three lines
#
# The loss is the **mean over the tokens of all ranks**. Every rank called `backward()` on the **sum** over its own
# `n_tokens` (an `int`, perhaps 0), which left the gradients `router` and `experts`, two tensors. Return those of the loss,
# router first.
#
# <details><summary>Hint 1</summary>
#
# What is there in copies is summed over the ranks (`ranks.all_reduce`); what is there once is not.
#
# </details>
# <details><summary>Hint 2</summary>
#
# By how many tokens is a mean over all ranks divided? Ranks have different numbers, so ask: all-reduce takes tensors, such
# as `torch.tensor(n_tokens)`.
#
# </details>


# %%
@exercise("7.5")
def finish_gradients(router, experts, n_tokens, ranks):
    """Gradients of this rank's summed loss to those of the mean over all ranks' tokens."""
    ### BEGIN SOLUTION
    total = ranks.all_reduce(torch.tensor(n_tokens))
    return ranks.all_reduce(router) / total, experts / total
    ### END SOLUTION


# %% [markdown]
# Now a real layer, SwiGLU experts and a router, on uneven parts of 20 tokens. Rank 2 has none; it makes every call all the
# same.

# %%
torch.manual_seed(0)
layer = MoE(MoEConfig(d_model=16, d_ff=32, n_experts=8, top_k=2))
tokens = torch.rand(20, 16).split([8, 2, 0, 10])
cluster.push(forward=forward, finish_gradients=finish_gradients, layer=layer, tokens=tokens)

# %%
# %%px
x = tokens[ranks.rank].requires_grad_()
own = layer.experts.take(placement.experts[ranks.rank])
y = forward(x, layer.router(x), placement, own, WithGradients(ranks))
y.square().sum().backward()
found = finish_gradients(layer.router.weight.grad, own.w_down.grad, len(x), ranks)
print(f"{len(x)} tokens, router {tuple(found[0].shape)}, experts {tuple(found[1].shape)}")

# %%
whole = torch.cat(tokens)
y = layer(whole)[0]
(y.square().sum() / len(whole)).backward()
router_grads, expert_grads = zip(*cluster.pull("found"), strict=True)


def agree(mine, one):
    return torch.allclose(mine, one, rtol=1e-4, atol=1e-6)


print("outputs:   ", agree(torch.cat(cluster.pull("y.detach()")), y))
print("router:    ", all(agree(grad, layer.router.weight.grad) for grad in router_grads))
print("experts:   ", agree(torch.cat(expert_grads), layer.experts.w_down.grad))

# %% [markdown]
# Four processes compute what one does, gradients included. The package's `ExpertParallelMoE` is this layer with its corners
# rounded.
#
# ## 7 Break it
#
# Four mistakes, on **simulated** ranks, which take turns in this process: there a hang is an error message. First the toy's
# trip as it is, its steps exchangeable. (`ranks.stage` only names a step, for error messages.)


# %%
def trip(ranks, choices=None, ids=None, **broken):
    """The toy of sections 2 to 5; `ids` are the experts that a rank believes to have."""
    steps = {"dispatch": dispatch, "combine": combine} | broken
    mine = (choices or all_choices)[ranks.rank]
    x, weights = all_x[ranks.rank][: len(mine)], all_weights[ranks.rank][: len(mine)]
    plan = one_rank.sort_choices(mine, n_experts=8)
    counts = send_counts(mine, placement.experts)
    with ranks.stage("dispatch"):
        arrived, received = steps["dispatch"](one_rank.permute(x, plan), counts, ranks)
    order = regroup(received)
    own = torch.tensor(ids or placement.experts[ranks.rank]) + 1.0
    outputs = arrived[order] * own.repeat_interleave(received.sum(0))[:, None]
    with ranks.stage("combine"):
        rows = steps["combine"](outputs, order, counts, received, ranks)
    return one_rank.combine(rows, plan, weights)


def show(**broken):
    """The toy's results, or why there are none."""
    try:
        found = simulate(lambda ranks: trip(ranks, **broken), 4)
        print("results:", torch.cat(found).flatten().tolist())
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


show()

# %% [markdown]
# **Counts in the wrong order**: `send` and `receive` exchanged. **Predict** what you see.


# %%
def dispatch_exchanged(rows, counts, ranks):
    received = ranks.all_to_all(counts)
    send, receive = counts.sum(1).tolist(), received.sum(1).tolist()
    return ranks.all_to_all(rows, receive, send), received


show(dispatch=dispatch_exchanged)

# %% [markdown]
# Lucky: on some rank the sums do not fit. Now let one token of each rank send both its rows to the next rank, so that all
# send and get as much. Right, and broken:

# %%
around = [torch.tensor([pair]) for pair in ([2, 3], [4, 5], [6, 7], [0, 1])]
show(choices=around)
show(choices=around, dispatch=dispatch_exchanged)

# %% [markdown]
# Wrong, and no error: the rows went the other way round.
#
# **Local and global ids mixed**: every rank takes its two experts for experts 0 and 1.

# %%
show(ids=(0, 1))

# %% [markdown]
# Wrong, all nine, and no error. With one rank, local and global ids are the same: a test on one rank finds nothing.
#
# **No inverse permutation** on the way back. **Predict**: an error, or results? Of the right tokens?


# %%
def combine_as_it_stands(outputs, order, counts, received, ranks):
    return ranks.all_to_all(outputs, received.sum(1).tolist(), counts.sum(1).tolist())


show(combine=combine_as_it_stands)

# %% [markdown]
# No error, and all nine wrong: each rank gets as many rows as it should, only other tokens'.
#
# **The experts' gradients times the number of ranks**: what has copies was averaged over the ranks, the experts were
# forgotten. Reported of PyTorch, DeepSpeed, Megatron ([1](https://github.com/pytorch/pytorch/issues/160285),
# [2](https://github.com/deepspeedai/DeepSpeed/issues/5618), [3](https://github.com/NVIDIA/Megatron-LM/pull/5956)).
# How much longer is an optimizer's step?

# %%
gradient = torch.cat(expert_grads)  # of section 6
for make in (torch.optim.SGD, torch.optim.Adam):
    steps = []
    for factor in (1, 4):
        weight = torch.nn.Parameter(torch.zeros_like(gradient))
        weight.grad = factor * gradient
        make([weight], lr=1.0).step()
        steps.append(weight.norm().item())
    print(f"{make.__name__}: {steps[1] / steps[0]:.1f} × the step")

# %% [markdown]
# Adam divides by the gradient's size. In the first report the losses were equal; only clipping by the norm goes wrong. So test
# **gradients**, not losses.
#
# ### A rank leaves early (*optional*)
#
# Because it has no tokens, say:

# %%
try:
    simulate(lambda ranks: None if ranks.rank == 3 else trip(ranks), 4)
except Exception as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# On a cluster nothing is to be seen until a time-out, and then an innocent rank reports it.
#
# ## 8 A better placement (*optional*)
#
# The slowest rank sets the pace: before it has computed, nobody has all rows back. Our trained model, second layer, on Python
# code, two of eight experts for each byte:

# %%
from moe_lab.checkpoints import load_shipped_model
from moe_lab.data import load_corpus, validation_windows
from moe_lab.train import choices_of

texts, _ = validation_windows(load_corpus().val["python"], context=128, limit=32)
with torch.no_grad():
    routing = choices_of(load_shipped_model("tiny_moe"), texts)[1]
loads = routing.tokens_per_expert.tolist()
print("rows, × the mean:", [round(8 * load / sum(loads), 1) for load in loads])
print("one is more than a rank's fair share:", max(loads) > sum(loads) / 4)

# %% [markdown]
# ### Exercise 7.6 · a placement (*optional*)
#
# ●●○ · 7 minutes · five to eight lines
#
# `loads` is a list with a number for each expert. Place the **heaviest first**, each on the **least loaded** rank that
# **has room**: a rank holds E / n_ranks experts (which divides). Return a list of expert ids for each rank, in any order
# within a rank.
#
# <details><summary>Hint 1</summary>
#
# `sorted(range(len(loads)), key=lambda e: -loads[e])` has the heaviest first, and keeps equals in order.
#
# </details>
# <details><summary>Hint 2</summary>
#
# For each expert: the ranks that have room, and of these `min(..., key=...)` by the sum of their loads. `min` takes the
# first of equals.
#
# </details>


# %%
@exercise("7.6")
def place(loads, n_ranks):
    """For each rank its experts. Of equal loads the lower id goes first, of equal ranks the lower."""
    ### BEGIN SOLUTION
    held = [[] for _ in range(n_ranks)]
    for expert in sorted(range(len(loads)), key=lambda e: -loads[e]):
        with_room = [mine for mine in held if len(mine) < len(loads) // n_ranks]
        min(with_room, key=lambda mine: sum(loads[e] for e in mine)).append(expert)
    return held
    ### END SOLUTION


# %%
from moe_lab.parallel.placement import balance_placement

greedy = Placement(place(loads, 4), n_experts=8)
placements = {
    "in order": even_placement(8, 4),
    "greedy": greedy,
    "four replicas more": balance_placement(loads, n_ranks=4, n_redundant=4),
}
viz.draw_rank_loads(
    placements,
    torch.tensor(loads),
    title="Rows that each of four ranks computes, Python code",
    alt="Three groups of four bars. In order, one rank has far more rows than the mean. The greedy "
    "placement is more even, and with four replicas all four are about equal.",
)

# %% [markdown]
# ("+ 1": and expert 1, whose part is thin.) An expert too heavy alone is **replicated**, at the cost of memory: three
# places a rank, not two. DeepSeek-V3 serves with 32 redundant experts
# ([report](https://arxiv.org/abs/2412.19437), section 3.4.1); its balancer, [EPLB](https://github.com/deepseek-ai/EPLB),
# is our third group.
#
# **Check**: section 6's layer, placed greedily, through our `forward`.

# %%
cluster.push(greedy=greedy)

# %%
# %%px
own = layer.experts.take(greedy.experts[ranks.rank])
with torch.no_grad():
    moved = forward(x, layer.router(x), greedy, own, ranks)

# %%
print("greedy placement:", greedy.experts)
print("equal to one process:", agree(torch.cat(cluster.pull("moved")), y))

# %% [markdown]
# ## 9 What travels
#
# Every row is D numbers. **Predict** from the tables of 7.1 alone, then **count** at the calls: `ranks.watch()` notes each.
# `per_assignment` is our form, a row for every choice. (`per_rank`, which is the package's habit, is for 7.7.)

# %%
torch.manual_seed(1)
layer = MoE(MoEConfig(d_model=16, d_ff=32, n_experts=16, top_k=4))
tokens = torch.rand(4, 500, 16) - 0.5
with torch.no_grad():
    all_choices = [layer.router(part).topk_experts for part in tokens]
cluster.push(layer=layer, tokens=tokens)

# %%
# %%px
from moe_lab.parallel import ExpertParallelMoE

counted, bytes_sent = {}, {}
for form in ("per_assignment", "per_rank"):
    packaged = ExpertParallelMoE(layer, ranks, form=form)
    with torch.no_grad(), ranks.watch() as events:
        packaged(tokens[ranks.rank])
    exchanges = [event for event in events if event.what == "rows"]
    counted[form] = torch.tensor([event.rows for event in exchanges])  # dispatch, combine
    bytes_sent[form] = sum(event.bytes_to_others for event in exchanges)

# %%
by_four = even_placement(16, 4)
traffic = torch.stack(
    [send_counts(choices, by_four.experts).sum(1) for choices in all_choices]
)
matrix = torch.stack([counted["per_assignment"][0] for counted in cluster.pull("counted")])
share = (matrix.sum() - matrix.trace()) / matrix.sum()
print("dispatch as predicted:", torch.equal(matrix, traffic))
print(f"leave their rank: {share:.0%}; you said", my_guess["copies that leave, of 100"])

# %% [markdown]
# Three quarters: of four ranks one is home. It holds for any k and loads, if ranks' tokens are alike. With 64 ranks: 98 %.

# %% [markdown]
# ### Exercise 7.7 · once to each rank (*optional*)
#
# ●●○ · 5 minutes · one to three lines
#
# In the form **per_rank** a token goes once to each rank with any of its experts. How many rows leave `rank`? `owners` (E,)
# holds each expert's rank. Return an `int`.
#
# <details><summary>Hint 1</summary>
#
# Which ranks does a token visit? `owners[topk_experts]` is (T, K). Of these, distinct ones count, without `rank`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# For each token `set(...) - {rank}`; sum their sizes.
#
# </details>


# %%
@exercise("7.7")
def rows_once(topk_experts, owners, rank):
    """Rows that leave `rank` when each token goes once to each rank."""
    ### BEGIN SOLUTION
    visited = owners[topk_experts].tolist()
    return sum(len(set(those) - {rank}) for those in visited)
    ### END SOLUTION


# %%
owners = by_four.slot_ranks
predicted = [rows_once(choices, owners, rank) for rank, choices in enumerate(all_choices)]
there, back = torch.stack([counted["per_rank"] for counted in cluster.pull("counted")], 1)
print("dispatch as predicted:", (there.sum(1) - there.diag()).tolist() == predicted)
print("combine is the way back:", torch.equal(back, there.T))

# %%
fewer = sum(rows["per_rank"] for rows in cluster.pull("bytes_sent"))
all_rows = sum(rows["per_assignment"] for rows in cluster.pull("bytes_sent"))
print(f"once to each rank: {fewer / all_rows:.0%} of the bytes of a row for every choice")

# %% [markdown]
# ## 10 Hide the wire (*optional*)
#
# On a network an exchange takes time. So we make the wire **slow on purpose**: 0.1 s for every all-to-all. It has a delay,
# not a width: two exchanges can be under way together, which helps here as much as computing meanwhile. Two micro-batches:
# one after the other, or in turns (`overlap`).

# %%
torch.manual_seed(2)
layer = MoE(MoEConfig(d_model=64, d_ff=192, n_experts=8, top_k=2, n_shared_experts=1))
batches = torch.rand(2, 1024, 64)
cluster.push(layer=layer, batches=batches)

# %%
# %%px
from moe_lab.parallel import overlap

packaged = ExpertParallelMoE(layer, ranks)


def watched(run):
    ranks.all_reduce(torch.zeros(1))  # all begin together
    with torch.no_grad(), ranks.slow_wire(0.1), ranks.watch() as events:
        run()
    return events


watched(lambda: packaged(batches[0]))  # the first one is always slow
apart = watched(lambda: [packaged(x) for x in batches])
in_turns = watched(lambda: overlap([packaged.steps(x) for x in batches]))

# %%
runs = {
    "one after the other": cluster.pull("apart")[:2],
    "in turns": cluster.pull("in_turns")[:2],
}
viz.draw_timeline(
    runs,
    title="Two micro-batches on a wire that is slow on purpose",
    alt="Two panels, each with a lane for computing and one for the wire, of ranks 0 and 1. One "
    "after the other, the wire is idle while the rank computes, and the rank while rows travel. "
    "In turns, the second batch's rows travel while the first one computes, and the whole is shorter.",
)

# %% [markdown]
# Two strips on a wire: exchanges of both batches. Within one batch nobody can skip the wait for the counts; only the other
# batch's work fills it.
#
# ## 11 What it costs
#
# Does all-to-all carry so much? Bytes that each of 64 ranks sends; X is the whole buffer, which a rank has *after* an
# all-gather and *before* the other two.

# %%
for name, sent in (
    ("all-reduce", all_reduce_bytes),
    ("all-gather", all_gather_bytes),
    ("all-to-all", all_to_all_bytes),
):
    print(f"{name}: {sent(1.0, 64):.3f} X")
print("you said", my_guess["most bytes"])

# %% [markdown]
# No: a ring all-reduce sends twice as much. All-to-all is hard for what it is:
#
# | all-to-all is | because |
# |---|---|
# | irregular | sizes are known only when the router has chosen |
# | blocking | it comes in every layer, there and back, and everybody waits for the fullest rank |
# | across nodes | every rank talks to every other, and nothing can be summed on the way |
#
# In a data centre, eight GPUs share a *node* with fast links, and nodes a slower network. DeepSeek-V3's layer on 64 GPUs of
# its kind (H800, network InfiniBand), modelled:

# %%
viz.draw_savings()

# %% [markdown]
# A token goes once to each *node* and is forwarded there; the router keeps to four nodes; the dispatch is in fp8.
#
# ### The four ways side by side (*optional*)
#
# Section 1's table in bytes: what a rank sends in one training step if DeepSeek-V3 is shared in one way only, over 8 GPUs.

# %%
from moe_lab.parallel.cost import DEEPSEEK_V3

viz.draw_ways(DEEPSEEK_V3)

# %% [markdown]
# ### To thousands of GPUs (*optional*)
#
# Modelled, not measured: bandwidths and rates are published ones (`moe_lab/parallel/cost.py` has the sources). *Weak*
# scaling: every GPU keeps as many tokens as before. *Strong*: all share one batch, and each has less to do.

# %%
viz.draw_scaling()

# %% [markdown]
# ## What real models do
#
# All send rows by all-to-all and differ in how. To look things up:
#
# <details><summary>Who, what, and where it says so</summary>
#
# | who | what | source |
# |---|---|---|
# | GShard (2020) | experts over up to 2,048 TPU cores, two all-to-alls a layer, capacity fixes their shapes | [Lepikhin et al.](https://arxiv.org/abs/2006.16668), section 3 |
# | DeepSeek-V3 (2024) | 64 ranks on 8 nodes, at most 4 nodes a token, fp8 dispatch, two micro-batches in turns | [report](https://arxiv.org/abs/2412.19437), sections 3.2 and 3.3 |
# | DeepEP | its kernels: a row for every node, forwarded within | [code](https://github.com/deepseek-ai/DeepEP) |
# | EPLB | replicas and placement, by groups and nodes | [code](https://github.com/deepseek-ai/EPLB) |
# | Megatron-Core | all-gather or all-to-all dispatchers, overlap with the shared expert | [code](https://github.com/NVIDIA/Megatron-LM/tree/main/megatron/core/transformer/moe) |
# | torchtitan | this notebook's flow: sort, counts, rows, regroup | [code](https://github.com/pytorch/torchtitan/blob/main/torchtitan/models/common/token_dispatcher.py) |
#
# </details>
#
# ## Recap
#
# - Experts stay, tokens travel: counts, rows, regroup, experts, and back by the same way.
# - Experts' gradients are complete; copies are summed over the ranks; all are divided by all tokens.
# - All-to-all is hard because it is irregular, blocking and across nodes.

# %%
cluster.stop()

# %%
show_progress("07")

# %% [markdown]
# **Next:** [08](08_triton_grouped_gemm.ipynb), how a GPU runs the experts' ragged products at full speed.
