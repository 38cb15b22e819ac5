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
# on other ranks and back, gradients equal to those of one process, a placement that balances the load. You will have
# counted what travels, and broken it in the ways that shipped code was broken.
#
# Sections marked *optional* go past the hour: run their cells, and read them another time.

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
# Four processes share a layer: each has a quarter of the experts and a quarter of the tokens. A token goes to two experts,
# anywhere. **How many of 100 copies leave their process?** And of three exchanges with equal buffers, all-reduce,
# all-gather and all-to-all: **which sends the most bytes?** Sections 9 and 11 will tell.

# %%
my_guess = {"copies that leave, of 100": 50, "most bytes": "all-to-all"}

# %% [markdown]
# ## 1 What a rank is
#
# A **rank** is one of several processes that run the same program, each on its own part. Start four, on this machine.
# (Where a notebook may not start processes, they are simulated, and all cells give the same.)

# %% tags=["nbval-ignore-output"]
cluster = start_cluster(4)

# %% [markdown]
# A cell that begins with `%%px` runs on **every** rank. Each has names of its own, and does not see this notebook's.

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
# too. Four of them matter here. **Predict** each line before you run its cell.

# %%
# %%px
print(ranks.all_reduce(numbers).tolist())

# %% [markdown]
# **all-reduce**: the sum of all, on every rank. Next: each gives one number.

# %%
# %%px
print(ranks.all_gather(numbers[0]).tolist())

# %% [markdown]
# **all-gather**: everybody's, on every rank. Next: each has one number for each rank.

# %%
# %%px
print(ranks.all_to_all(numbers).tolist())

# %% [markdown]
# **all-to-all**: rank 0 got the first number of each, rank 1 the second. Read the four lines of `numbers` as a table: it
# was transposed. And last, **point to point**: to one neighbour.

# %%
# %%px
if ranks.rank < 3:
    ranks.send(numbers[0], to=ranks.rank + 1)
if ranks.rank > 0:
    print(ranks.receive(numbers[0], source=ranks.rank - 1).item())

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
# Nine tokens, unevenly spread. Each token is one number, whose tens tell its rank; and each chooses two experts.
# **Predict** how many of the 18 rows leave their rank.

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
viz.draw_exchange(all_choices, placement, all_x)

# %% [markdown]
# Everybody wants expert 5. Before a rank sends anything, it counts.
#
# ### Exercise 7.1 · what to send
#
# ●○○ · 4 minutes · one to four lines
#
# `experts` is a placement's tuple, as printed above; every rank holds as many. Return a table (ranks, experts on a rank),
# `int64`: at [r, j] how many of this rank's rows go to the j-th expert of rank r.
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
# Give every rank a copy of what we have: our function, the placement, the data. Each takes its own part, and brings its
# rows into the order of their experts, as in notebook 04. In that order they also stand rank by rank.

# %%
all_weights = [torch.tensor([0.75, 0.25]).expand(choices.shape) for choices in all_choices]
cluster.push(send_counts=send_counts, placement=placement)
cluster.push(all_x=all_x, all_choices=all_choices, all_weights=all_weights)

# %%
# %%px --local
from moe_lab import dispatch as local  # notebook 04's functions: everything on one rank

# %%
# %%px
x, choices = all_x[ranks.rank], all_choices[ranks.rank]
plan = local.sort_choices(choices, n_experts=8)
rows = local.permute(x, plan)  # (R, 1)
counts = send_counts(choices, placement.experts)
print(rows.flatten().tolist(), counts.tolist())

# %% [markdown]
# Each knows what it sends; what comes is up to the others' routers. So two exchanges: first the **counts**, then the
# **rows**. Without lists all parts are equal, as above; unequal ones take two, how many to each rank and how many from each.
# Rank 0 sends one row to rank 1, two to rank 2, three to rank 3:

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
# `rows` (R, D) are sorted by expert; `counts` is 7.1's table. Return what arrived, (R', D), and the table of what came: at
# [s, j] how many rows from rank s for this rank's j-th expert. Rows for the rank itself go through the call, too.
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
# An expert wants its rows together. They lie rank by rank, and within a rank expert by expert. On rank 2:

# %%
viz.draw_regroup(cluster.pull("received")[2], placement.experts[2])

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
y = local.combine(back, plan, all_weights[ranks.rank])
print(y.flatten().tolist())

# %% [markdown]
# **Check it** against one process that has all tokens and all experts:

# %%
x, choices, weights = (torch.cat(parts) for parts in (all_x, all_choices, all_weights))
alone = (weights * (choices + 1) * x).sum(1, keepdim=True)
print("four ranks equal one process:", torch.equal(torch.cat(cluster.pull("y")), alone))

# %% [markdown]
# **The whole layer**, in the form that it has in real code: notebook 04's, cut open where a row leaves its rank.


# %%
def forward(x, routing, experts, own, ranks):
    """This rank's (T, D) to (T, D); `own` are its experts, `experts` says who holds which."""
    plan = local.make_plan(routing)
    counts = send_counts(routing.topk_experts, experts)
    arrived, received = dispatch(local.permute(x, plan), counts, ranks)
    order = regroup(received)
    ends = received.sum(0).cumsum(0).int()
    outputs = own(arrived[order], ends)
    rows = combine(outputs, order, counts, received, ranks)
    return local.combine(rows, plan, routing.topk_weights)


# %% [markdown]
# ## 6 Gradients
#
# A gradient goes the way of its row, backwards: so **the backward of an all-to-all is an all-to-all with the counts
# exchanged**. Autograd has to be told.


# %%
# %%px --local
class AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, send, receive, ranks):
        ctx.way_back = receive, send, ranks
        return ranks.all_to_all(rows, send, receive)

    @staticmethod
    def backward(ctx, d_rows):
        send, receive, ranks = ctx.way_back
        return ranks.all_to_all(d_rows.contiguous(), send, receive), None, None, None


class WithGradients:
    """Ranks whose all-to-all sends gradients back the way that the rows came."""

    def __init__(self, ranks):
        self.ranks = ranks

    def all_to_all(self, rows, send=None, receive=None):
        return AllToAll.apply(rows, send, receive, self.ranks)


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
# The loss is the **mean over the tokens of all ranks**. Every rank called `backward()` on the **sum** over its own `n_tokens`,
# an `int`. From the gradients of its router and its experts make those of the loss; return both.
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
y = forward(x, layer.router(x), placement.experts, own, WithGradients(ranks))
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
# rounded. **per_rank** sends a token *once* to each rank, however many of its experts live there; the last two go from
# node to node first.

# %%
# %%px
from moe_lab.parallel import FORMS, ExpertParallelMoE

for form in FORMS:
    packaged = ExpertParallelMoE(layer, ranks, form=form, node_size=2)
    same = torch.allclose(packaged(x)[0], y, atol=1e-5)
    if ranks.rank == 0:
        print(f"{form:<20}equal: {same}")

# %% [markdown]
# ## 7 Break it
#
# Five mistakes, on **simulated** ranks, which take turns in this process: there a hang is an error message. First the toy's
# trip as it is, in a form whose steps can be exchanged.


# %%
def trip(ranks, choices=None, ids=None, **broken):
    """The toy of sections 2 to 5; `ids` are the experts that a rank believes to have."""
    steps = {"dispatch": dispatch, "combine": combine} | broken
    mine = (choices or all_choices)[ranks.rank]
    x, weights = all_x[ranks.rank][: len(mine)], all_weights[ranks.rank][: len(mine)]
    plan = local.sort_choices(mine, n_experts=8)
    counts = send_counts(mine, placement.experts)
    with ranks.stage("dispatch"):
        arrived, received = steps["dispatch"](local.permute(x, plan), counts, ranks)
    order = regroup(received)
    own = torch.tensor(ids or placement.experts[ranks.rank]) + 1.0
    outputs = arrived[order] * own.repeat_interleave(received.sum(0))[:, None]
    with ranks.stage("combine"):
        rows = steps["combine"](outputs, order, counts, received, ranks)
    return local.combine(rows, plan, weights)


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
# Lucky: the sums do not fit. Now let one token of each rank send both its rows to the next rank, so that all send and get as
# much. Right, and broken:

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
# **No inverse permutation** on the way back. **Predict** how many of the nine are wrong.


# %%
def combine_as_it_stands(outputs, order, counts, received, ranks):
    return ranks.all_to_all(outputs, received.sum(1).tolist(), counts.sum(1).tolist())


show(combine=combine_as_it_stands)

# %% [markdown]
# All nine, and no error: each rank gets as many rows as it should, only other tokens'.
#
# **A rank leaves early**, for instance because it has no tokens today:

# %%
try:
    simulate(lambda ranks: None if ranks.rank == 3 else trip(ranks), 4)
except Exception as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# On a cluster nothing is to be seen until a time-out, and then an innocent rank reports it.
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
# ## 8 A better placement
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
print("one expert is more than a rank's fair share:", max(loads) > sum(loads) / 4)

# %% [markdown]
# Which experts share a rank is free to choose: results are the same.
#
# ### Exercise 7.6 · a placement
#
# ●●○ · 7 minutes · five to eight lines
#
# `loads` is a list with a number for each expert. Place the **heaviest first**, each on the **least loaded** rank that
# **has room**: a rank holds E / n_ranks experts (which divides). Return a list of expert ids for each rank.
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
    """For each rank its experts. Of equal loads the lower id goes first; so do equal ranks."""
    ### BEGIN SOLUTION
    held = [[] for _ in range(n_ranks)]
    for expert in sorted(range(len(loads)), key=lambda e: -loads[e]):
        with_room = [mine for mine in held if len(mine) < len(loads) // n_ranks]
        min(with_room, key=lambda mine: sum(loads[e] for e in mine)).append(expert)
    return held
    ### END SOLUTION


# %%
from moe_lab.parallel.placement import balance_placement

placements = {
    "in order": even_placement(8, 4),
    "greedy": Placement(place(loads, 4), n_experts=8),
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
# Greedy helps as far as whole experts go. One that is too heavy alone is **replicated**: DeepSeek-V3 serves prompts with 32
# redundant experts, chosen anew every ten minutes or so ([report](https://arxiv.org/abs/2412.19437), section 3.4.1). Its
# balancer, [EPLB](https://github.com/deepseek-ai/EPLB), is our third group.
#
# ## 9 What travels
#
# Every copy is D numbers. **Predict** from the tables alone, then **count** at the calls: `ranks.watch()` notes each.

# %%
torch.manual_seed(1)
layer = MoE(MoEConfig(d_model=16, d_ff=32, n_experts=16, top_k=4))
tokens = torch.rand(4, 500, 16) - 0.5
with torch.no_grad():
    all_choices = [layer.router(part).topk_experts for part in tokens]
cluster.push(layer=layer, tokens=tokens)

# %%
# %%px
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
print(f"leave their rank: {share:.0%}; you said {my_guess['copies that leave, of 100']}")

# %% [markdown]
# Three quarters: of four ranks one is home. That holds for any k, and however uneven the experts are, as long as all ranks'
# tokens are alike. For 64 ranks it is 98 %.

# %%
viz.draw_traffic(
    matrix,
    title="Rows of one dispatch: 500 tokens a rank, 4 of 16 experts",
    alt="A matrix of four ranks by four. Its lines are much alike: every rank sends some hundreds "
    "of rows to each other one, and keeps about a quarter.",
)

# %% [markdown]
# ### Exercise 7.7 · once to each rank (*optional*)
#
# ●●○ · 5 minutes · one to three lines
#
# In the form **per_rank** a token travels once to each rank that has one or more of its experts. How many rows leave this
# rank? `owners` (E,) holds each expert's rank. Return an `int`.
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
# ## 10 Hide the wire
#
# On a laptop an exchange takes no time; on a network it does. So we make the wire **slow on purpose**: 0.1 s for every
# all-to-all. Two micro-batches: one after the other, or in turns (`overlap`), so that one computes while the other's rows
# travel. The shared expert computes meanwhile, too.

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

# %%
from moe_lab.viz.ranks import seconds

times = {name: seconds(run) for name, run in runs.items()}
print("in turns is faster:", times["in turns"] < times["one after the other"])

# %% [markdown]
# What cannot be hidden: the counts. Until they are there, nobody knows how much to receive.
#
# ## 11 What it costs
#
# Is all-to-all hard because it carries so much? Bytes that each of 64 ranks sends, for a buffer X:

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
# | blocking | it comes twice in every layer, and everybody waits for the fullest rank |
# | across nodes | every rank talks to every other, and nothing can be summed on the way |
#
# In a data centre, eight GPUs share a fast node, and nodes a slower network. DeepSeek-V3's layer on 64 GPUs, modelled:

# %%
viz.draw_savings()

# %% [markdown]
# A token goes once to each *node* and is forwarded there; the router keeps to four nodes; the dispatch is in fp8.
#
# ### The four ways side by side (*optional*)

# %%
from moe_lab.parallel.cost import DEEPSEEK_V3

viz.draw_ways(DEEPSEEK_V3)

# %% [markdown]
# ### To thousands of GPUs (*optional*)
#
# Modelled, not measured: bandwidths and rates are published ones (`moe_lab/parallel/cost.py` has the sources).

# %%
viz.draw_scaling()

# %% [markdown]
# ## What real models do
#
# To look things up:
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
# **Next:** 08, how a GPU runs the experts' ragged products at full speed.
