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
#   title: Dispatch
#   minutes: 60
#   seconds: 90
#   hardware: CPU
# ---

# %% [markdown]
# # 04 · Dispatch
#
# **How do tokens reach their experts and come back, without a loop over everything?**
#
# `CPU` · 60 minutes · prerequisites: notebooks 01 to 03
#
# At the end **you will have built** a dispatcher that equals notebook 03's loop, outputs and gradients: a plan, the way
# to the experts, their products, the way back. You will know what a capacity drops, and whom that concerns; and you
# will have measured every way of doing it.
#
# Sections marked *optional* go past the hour: run their cells, and read them another time.

# %%
import inspect
import math

import torch
import torch.nn.functional as F

from moe_lab import bench, dispatch, viz
from moe_lab.course import exercise, show_progress
from moe_lab.moe import moe_loop, moe_reference
from moe_lab.records import DispatchPlan, Routing

torch.set_num_threads(1)  # also what makes the measurements comparable

# %% [markdown]
# ## Predict first
#
# A layer has 8 experts, and every token goes to two. Give it **256 experts** of the same size; still every token goes to
# two. The experts' FLOPs stay the same. How many times longer does a training step of the layer take with notebook
# 03's loop, and how many times with the best dispatch? Section 8 will tell.

# %%
my_guess = {"loop": 1, "best": 1}  # times as long

# %% [markdown]
# ## 1 Why the loop is slow
#
# Here is the loop again, with `expert(e, x)` for what expert e computes.

# %%
print(inspect.getsource(moe_loop).split('"""')[2].strip("\n"))  # without its docstring

# %% [markdown]
# For each expert: one look-up through all T·K choices, a few products, one addition into all of `y`. Count the operators
# that torch runs in a forward pass of 2,048 tokens. **Predict** how their number grows with E.

# %%
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCount(TorchDispatchMode):
    """Counts the operators that torch runs."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


def operators(n_experts, forward):
    """How many operators a forward pass takes."""
    layer, x = bench.layer_and_input(bench.Shape(2048, 64, 64, n_experts, top_k=2))
    with OperatorCount() as counter, torch.no_grad():
        forward(layer, x)
    return counter.count


# %%
def loop(layer, x):
    """Notebook 03's layer: every expert in turn."""
    return moe_loop(x, layer.router(x), layer.experts.one)


def goal(layer, x):
    """The layer that this notebook arrives at."""
    return layer(x)[0]


expert_counts = [8, 16, 32, 64, 128, 256]
ways = {"loop": loop, "sorted, F.grouped_mm": goal}
counted = {name: [operators(n, way) for n in expert_counts] for name, way in ways.items()}
viz.growth(
    {name: (expert_counts, numbers) for name, numbers in counted.items()},
    title="Operators in one forward pass",
    x="experts E",
    y="operators",
    alt="The loop's operators double with the number of experts, to thousands; "
    "the sorted way needs the same few dozen for any number.",
)

# %% tags=["nbval-ignore-output"]
for name, (at_8, at_16, *_) in counted.items():
    each = (at_16 - at_8) / 8
    print(f"{name}: {each:g} for every expert, and {at_8 - 8 * each:g} more")

# %% [markdown]
# Each operator has its price. On a GPU each look-up also makes Python wait for what it finds: E **host syncs** a layer.
# So: look up **once**, and hand over all products **together**.
#
# ## 2 Six tokens by hand
#
# Each token is one number, and expert e multiplies by e + 1. Not all weights sum to 1, on purpose. **Predict** token 0's
# result.


# %%
def routing_of(experts, weights, n_experts):
    """A routing set by hand. Dispatch never looks at logits and scores: they are zeros."""
    zeros = torch.zeros(len(experts), n_experts)
    return Routing(
        router_logits=zeros, router_scores=zeros, topk_weights=weights, topk_experts=experts
    )


x = torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0]])  # (T, D)
w = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1)  # (E, 1, 1): an expert is one number
routing = routing_of(
    torch.tensor([[0, 3], [3, 0], [0, 1], [1, 0], [0, 3], [3, 1]]),  # (T, K)
    torch.tensor([[6, 2], [4, 2], [6, 2], [4, 2], [5, 3], [4, 2]]) / 8,
    n_experts=4,
)
by_loop = moe_loop(x, routing, lambda e, tokens: tokens * w[e, 0])
print(by_loop.flatten().tolist())

# %% [markdown]
# Token 0: 0.75 · (1 · 10) + 0.25 · (4 · 10) = 17.5.
#
# Now the whole trip without a loop over experts. The choices are **sorted** by expert; tokens are **copied** into rows;
# each expert works **once** on its own stretch of rows; every token **collects** its rows. Follow token 3 with a finger.

# %%
viz.draw_dispatch(routing, dispatch.make_plan(routing))

# %% [markdown]
# This is the most useful picture of the notebook. The rest builds it, arrow by arrow.
#
# ## 3 The plan
#
# A choice is one slot of one token. Choices are numbered as they lie in memory: **choice = token · K + slot**. One
# stable sort brings them into the order of the rows.

# %%
chosen = routing.topk_experts.flatten()  # (T·K,)
print("expert of each choice:", chosen.tolist())
print("sorted:               ", chosen.sort(stable=True).values.tolist())

# %% [markdown]
# **Stable** means that equal ids keep their order, so that an expert's rows stand in the order of its tokens. The same
# sort, drawn; `choice_rows`, `row_choices` and `offsets` are the plan.

# %%
viz.draw_sort(routing, dispatch.make_plan(routing))

# %% [markdown]
# **Offsets** say where each expert's rows end: E numbers. An expert's rows begin where those of the one before it end,
# the first at 0. Expert 2 has no rows: its end is that of expert 1.
#
# ### Exercise 4.1 · where each expert's rows end
#
# ●○○ · 5 minutes · one or two lines
#
# The ids come sorted. Return `int32` of shape (E,), as the product in section 4 wants them.
#
# <details><summary>Hint 1</summary>
#
# Count how often each id occurs (`torch.bincount`, with `minlength`). An end is the sum of all counts up to there.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `cumsum(0)` adds up and `.int()` converts. Or ask for every expert where its id would go behind its equals:
# `torch.searchsorted(..., right=True, out_int32=True)`. On a GPU that one needs no sync, while `bincount` does.
#
# </details>


# %%
@exercise("4.1")
def expert_offsets(sorted_experts, n_experts):
    """(R,) sorted ids of experts to (E,) int32: where each expert's rows end."""
    ### BEGIN SOLUTION
    ids = torch.arange(n_experts)
    return torch.searchsorted(sorted_experts, ids, right=True, out_int32=True)
    ### END SOLUTION


# %% [markdown]
# The plan holds two tables; flattened, each is the **inverse** of the other. `row_choices` asks from the row: which choice
# travels here? `choice_rows` asks from the choice: in which row does it travel? A permutation and its inverse:

# %%
order = torch.tensor([2, 0, 1])  # row 0 carries choice 2, ...
inverse = torch.empty_like(order)
inverse[order] = torch.arange(3)  # ... so choice 2 travels in row 0
print(inverse.tolist(), "undoes it:", order[inverse].tolist())

# %% [markdown]
# ### Exercise 4.2 · the plan
#
# ●●○ · 8 minutes · four to six lines
#
# Return `DispatchPlan(row_choices, choice_rows, offsets)`: `row_choices` (R,) with R = T·K, `choice_rows` (T, K), both
# int64, and `offsets` as in 4.1. An expert's rows are in the order of their choices. `routing.topk_experts` (T, K) holds
# the ids, `routing.n_experts` is E.
#
# <details><summary>Hint 1</summary>
#
# `.sort(stable=True)` of the flattened ids gives two things: `values`, which `expert_offsets` wants, and `indices`. Which
# of the two tables are the indices?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Invert as in the cell above (or with `argsort`), then `.view(T, K)`: choice t·K + slot lands at [t, slot].
#
# </details>


# %%
@exercise("4.2")
def make_plan(routing):
    """Which choice travels in which row: rows sorted by expert, then by token."""
    ### BEGIN SOLUTION
    experts = routing.topk_experts
    sorted_experts, row_choices = experts.flatten().sort(stable=True)
    choice_rows = torch.empty_like(row_choices)
    choice_rows[row_choices] = torch.arange(len(row_choices))
    offsets = expert_offsets(sorted_experts, routing.n_experts)
    return DispatchPlan(row_choices, choice_rows.view(experts.shape), offsets)
    ### END SOLUTION


# %% [markdown]
# **Check** it against the lines of the drawing above.

# %%
plan = make_plan(routing)
for name in ("row_choices", "choice_rows", "offsets"):
    print(f"{name:<12}", getattr(plan, name).tolist())

# %% [markdown]
# ## 4 There, and back
#
# **There:** each row copies the token of its choice.
#
# ### Exercise 4.3 · permute
#
# ●○○ · 3 minutes · one line
#
# Return the rows (R, D). Choice t·K + slot belongs to token t; K is the width of `plan.choice_rows`.
#
# <details><summary>Hint 1</summary>
#
# `plan.row_choices` says which choice a row carries. A whole division by K turns a choice into its token.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `tokens[ids]` gathers rows, also the same one several times. On a CPU `tokens.index_select(0, ids)` is the faster one.
#
# </details>


# %%
@exercise("4.3")
def permute(tokens, plan):
    """(T, D) to (R, D): a copy of its token for every row."""
    ### BEGIN SOLUTION
    top_k = plan.choice_rows.shape[1]
    return tokens.index_select(0, plan.row_choices // top_k)
    ### END SOLUTION


# %%
rows = permute(x, plan)
print(rows.flatten().tolist())

# %% [markdown]
# **The experts:** each multiplies its own stretch of rows. This is the **grouped product**: one matrix per group, groups
# of any size, empty ones too.
#
# ### Exercise 4.4 · the grouped product
#
# ●●○ · 6 minutes · four to six lines
#
# Return (R, O): `rows[r] @ weights[e].T` for row r of expert e. A loop over slices is welcome here: it is the truth that
# the fast variants are tested against.
#
# <details><summary>Hint 1</summary>
#
# `offsets.tolist()` gives the ends as Python numbers. Keep a `start` that begins at 0.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.cat` joins the groups' results. An empty slice times a matrix is an empty result: no special case.
#
# </details>


# %%
@exercise("4.4")
def grouped_mm(rows, weights, offsets):
    """(R, I), (E, O, I) and ends (E,) to (R, O): every row times its own expert's matrix."""
    ### BEGIN SOLUTION
    start, products = 0, []
    for expert, end in enumerate(offsets.tolist()):
        products.append(rows[start:end] @ weights[expert].T)
        start = end
    return torch.cat(products)
    ### END SOLUTION


# %%
outputs = grouped_mm(rows, w, plan.offsets)
print(outputs.flatten().tolist())

# %% [markdown]
# **Back:** a token's result is the weighted sum of its rows, wherever they stand:
#
# $$y_t = \sum_{k} \text{weight}_{t,k}\; \text{row}_{\,\text{choice\_rows}[t,k]}$$
#
# ### Exercise 4.5 · combine
#
# ●●○ · 5 minutes · one to three lines
#
# `weights` is (T, K), in the order of the tokens; do not normalise them. Return (T, D). Gradients must reach rows and
# weights.
#
# <details><summary>Hint 1</summary>
#
# `rows[plan.choice_rows]` is (T, K, D): every token's own rows, side by side.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `weights[..., None]` is (T, K, 1) and multiplies each row as a whole. Then sum over K.
#
# </details>


# %%
@exercise("4.5")
def combine(rows, plan, weights):
    """(R, D) and (T, K) to (T, D): the weighted sum of each token's rows."""
    ### BEGIN SOLUTION
    return (weights[..., None] * rows[plan.choice_rows]).sum(1)
    ### END SOLUTION


# %%
y = combine(outputs, plan, routing.topk_weights)
print(y.flatten().tolist())
print("equals the loop:", torch.equal(y, by_loop))

# %% [markdown]
# **The whole layer** is now a few lines. The experts are SwiGLUs; their gate and up matrices lie stacked in one tensor,
# `w_in` (E, 2F, D), so that two grouped products suffice.


# %%
def moe_sorted(x, routing, w_in, w_down):
    """A layer of SwiGLU experts: plan, permute, products, combine."""
    plan = make_plan(routing)
    gate, up = grouped_mm(permute(x, plan), w_in, plan.offsets).chunk(2, dim=-1)
    outputs = grouped_mm(F.silu(gate) * up, w_down, plan.offsets)
    return combine(outputs, plan, routing.topk_weights)


# %% [markdown]
# **Check it against the definition** of notebook 03, every expert on every token: the output, and all gradients.

# %%
layer, tokens = bench.layer_and_input(bench.Shape(50, 16, 24, 8, top_k=3))
leaves = {"x": tokens, "router": layer.router.weight}
leaves |= {"w_in": layer.experts.w_in, "w_down": layer.experts.w_down}

y_sorted = moe_sorted(tokens, layer.router(tokens), leaves["w_in"], leaves["w_down"])
y_slow = moe_reference(tokens, layer.router(tokens), layer.experts.one)
mine, slow = (
    torch.autograd.grad(out.square().sum(), leaves.values()) for out in (y_sorted, y_slow)
)
print("outputs equal:", torch.allclose(y_sorted, y_slow, atol=1e-5))
for name, one, other in zip(leaves, mine, slow, strict=True):
    print(f"gradient of {name} equal:", torch.allclose(one, other, rtol=1e-3, atol=1e-4))

# %% [markdown]
# **The last loop.** Exercise 4.4 still takes one expert after the other. torch has all of it as one operator,
# `F.grouped_mm`. It takes rows and matrices in steps of 16 bytes: our toy it refuses ("strides should be multiple of 16
# bytes"), real sizes it takes.

# %%
layer, tokens = bench.layer_and_input(bench.Shape(2048, 64, 64, 8, top_k=2))
real, w_in = make_plan(layer.router(tokens)), layer.experts.w_in
real_rows = permute(tokens, real)
by_torch = F.grouped_mm(real_rows, w_in.mT, offs=real.offsets)  # (R, D) and (E, D, 2F)
by_slices = grouped_mm(real_rows, w_in, real.offsets)
print(tuple(by_torch.shape), "equal:", torch.allclose(by_torch, by_slices, atol=1e-4))

# %% [markdown]
# That is the fast way: **sorted, `F.grouped_mm`**.
#
# ## 5 The way back is the way there
#
# In the backward pass every arrow turns round: what was copied is summed, and what was summed is copied. **Predict** with
# which weights `permute`'s copies are summed.

# %%
viz.draw_dispatch(routing, plan, gradients=True)

# %% [markdown]
# **The backward of permute is a combine**, with all weights 1. We let autograd find the gradient of `x`, and compare.

# %%
x_leaf = x.clone().requires_grad_()
d_rows = torch.arange(1.0, 13.0)[:, None]  # some gradient that arrives at the rows
permute(x_leaf, plan).backward(d_rows)

ones = torch.ones(6, 2)
print("autograd:", x_leaf.grad.flatten().tolist())
print("combine: ", combine(d_rows, plan, ones).flatten().tolist())

# %% [markdown]
# **The backward of combine is a permute**: each row gets its token's gradient, times its own weight. A weight gets the
# dot product of that gradient with its row, which is how the router learns. So a dispatcher needs two moves, in both
# passes (and a dot product for the weights).
#
# ### The backward of combine, checked (*optional*)

# %%
rows_leaf = outputs.clone().requires_grad_()
weights_leaf = routing.topk_weights.clone().requires_grad_()
dy = torch.arange(1.0, 7.0)[:, None]
combine(rows_leaf, plan, weights_leaf).backward(dy)

row_weights = routing.topk_weights.flatten()[plan.row_choices, None]
print("autograd:", rows_leaf.grad.flatten().tolist())
print("permute: ", (permute(dy, plan) * row_weights).flatten().tolist())
dots = (permute(dy, plan) * outputs).sum(1)[plan.choice_rows]
print("the weights' gradients are the dots:", torch.equal(weights_leaf.grad, dots))

# %% [markdown]
# ## 6 Rows of fixed number: padding and capacity
#
# Groups of any size need a special product. A plain batched product, (E, C, D) times (E, D, F), wants C rows from
# **every** expert. Two ways to get them: **pad** all to the fullest, or set a **capacity** C and drop what exceeds it.
# First the padding:

# %%
viz.draw_layouts(plan)

# %% [markdown]
# The hatched rows are waste: memory, and products of zeros. How much depends on the fullest expert. Two loads for 64
# experts, 8 per token as in OLMoE: an even one, and a skewed one, where each token draws its experts with weights 1, 1/2,
# 1/3, … (no expert twice).


# %%
def draws(probabilities, n_tokens, top_k):
    """A routing by chance: each token takes different experts, likely ones more often."""
    chances = torch.rand(n_tokens, len(probabilities)).log() / probabilities
    chosen = chances.topk(top_k).indices
    return routing_of(chosen, torch.full(chosen.shape, 1 / top_k), len(probabilities))


torch.manual_seed(0)
loads = {"even": torch.ones(64), "1/rank": 1 / torch.arange(1, 65)}
drawn = {name: draws(p, n_tokens=2048, top_k=8) for name, p in loads.items()}
for name, load in drawn.items():
    counts = load.tokens_per_expert
    waste = 1 - counts.sum() / (64 * counts.max())
    print(
        f"{name:<7}mean 256 rows, fullest {counts.max():>5}: {waste:.0%} of padded rows empty"
    )

# %% [markdown]
# **A capacity** fixes C before anybody chooses, in proportion to the even share
# ([Fedus et al. 2021](https://arxiv.org/abs/2101.03961), equation 3, for k = 1):
#
# $$C = \left\lceil \frac{T K}{E} \cdot \text{capacity factor} \right\rceil$$
#
# Who is kept? First choices of all tokens queue first, then second ones; among equals early tokens come first
# ([Lepikhin et al. 2020](https://arxiv.org/abs/2006.16668), algorithm 1). **Predict** who of our six tokens is dropped
# at factor 1: C = 3.

# %%
viz.draw_dispatch(routing, dispatch.make_plan(routing, capacity=3), back=False)

# %% [markdown]
# Tokens 1, 3 and 4 lose their second choices: experts 0 and 3 are full. **How much is dropped** on the two loads?

# %%
factors, share = [1, 1.25, 1.5, 2, 3, 4], {}
for name, load in drawn.items():
    capacities = [dispatch.expert_capacity(2048, 8, 64, factor) for factor in factors]
    dropped = [dispatch.make_plan(load, capacity).dropped for capacity in capacities]
    share[name] = [100 * lost.float().mean().item() for lost in dropped]
viz.lines(
    {f"{name} load": (factors, values) for name, values in share.items()},
    title="What a capacity drops: 2,048 tokens, 8 of 64 experts",
    x="capacity factor",
    y="choices dropped (%)",
    markers=True,
    alt="An even load loses about two per cent at factor 1 and none from 1.25 on. The "
    "load by rank loses 39 per cent at factor 1, a third at 1.25, and still 8 per cent at 4.",
)

# %%
print("factor         ", *(f"{factor:>5}" for factor in factors))
for name, lost in share.items():
    kept = (100 - torch.tensor(lost)) / torch.tensor(factors)
    print(f"{name:<7}filled %", *(f"{percent:>5.1f}" for percent in kept.tolist()))

# %% [markdown]
# A skewed load loses choices while rows stay empty: at factor 1.25 about half of them are filled, under an even load
# 80 %. Notebook 05 is about balancing the load.
#
# A dropped choice **contributes 0**. In a plan, empty rows and dropped choices carry an index one past the end: the
# package's functions handle it, ours would raise.


# %%
def toy(routing, capacity=None, drop="position"):
    """The toy layer's output, with or without a capacity."""
    plan = dispatch.make_plan(routing, capacity, drop)
    outputs = grouped_mm(dispatch.permute(x, plan), w, plan.offsets)
    return dispatch.combine(outputs, plan, routing.topk_weights).flatten()


print("dropless  ", toy(routing).tolist())
print("capacity 3", toy(routing, capacity=3).tolist())

# %% [markdown]
# A token that loses all its choices gets 0 from the layer, and the residual stream carries it on as it is.
#
# **Does a token's result depend on others?** Let token 4 choose expert 2 in place of expert 0. **Predict** which *other*
# tokens' results change, dropless and with capacity 3.

# %%
other_experts = routing.topk_experts.clone()
other_experts[4, 0] = 2
otherwise = routing_of(other_experts, routing.topk_weights, n_experts=4)
for name, capacity in {"dropless": None, "capacity 3": 3}.items():
    changed = toy(routing, capacity) != toy(otherwise, capacity)
    changed[4] = False  # it changed its mind, of course
    print(f"{name}: other tokens that changed:", changed.nonzero().flatten().tolist())

# %% [markdown]
# Dropless: none. With a capacity: token 1, whose second choice got the place of token 4's first. **Token 1 comes before
# token 4**: in a causal language model a look into the future. (With k = 1 only earlier tokens matter.)
# **Dropless** ways have none of this (MegaBlocks, [Gale et al. 2022](https://arxiv.org/abs/2211.15841)).
#
# ### Dropping by score (*optional*)
#
# Or keep the largest weights:

# %%
for drop in ("position", "score"):
    lost = dispatch.make_plan(routing, capacity=3, drop=drop).dropped.nonzero().tolist()
    print(f"by {drop:<9} dropped (token, slot):", *map(tuple, lost))

# %% [markdown]
# Expert 3 now keeps token 4 rather than token 0: a later token can push out an earlier one at k = 1, too.
#
# ### Exercise 4.6 · who is dropped (*optional*)
#
# ●●● · 10 minutes · five to seven lines
#
# Return (T, K) bool: True for each choice that finds its expert full. C and the queue are those from above: first choices
# before second ones, then early tokens.
#
# <details><summary>Hint 1</summary>
#
# The queue is `routing.topk_experts.T.flatten()`: all first choices, then all second ones. A choice's place is the number
# of equal ids before it in the queue.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `F.one_hot(queue, routing.n_experts).cumsum(0)` counts every expert's choices along the queue. In each row pick the
# column of its own expert (`gather`), minus 1.
#
# </details>
# <details><summary>Hint 3</summary>
#
# Dropped is `place >= C`. Back from the queue's order: `.view(K, T).T`.
#
# </details>


# %%
@exercise("4.6")
def dropped_choices(routing, capacity_factor):
    """(T, K) bool: whether a choice finds its expert full, served first choices first."""
    ### BEGIN SOLUTION
    n_tokens, top_k = routing.topk_experts.shape
    n_experts = routing.n_experts
    capacity = math.ceil(n_tokens * top_k * capacity_factor / n_experts)
    queue = routing.topk_experts.T.flatten()
    places = F.one_hot(queue, n_experts).cumsum(0).gather(1, queue[:, None]) - 1
    return (places >= capacity).view(top_k, n_tokens).T
    ### END SOLUTION


# %% [markdown]
# ## 7 What each way needs
#
# A dispatcher has no parameters. Its price is rows, which are multiplied and kept for the backward pass:
#
# | way | rows | host syncs on a GPU | adds into shared places | drops |
# |---|---|---|---|---|
# | every expert (on every token) | T·E | none | no | no |
# | loop | T·K | one per expert (`torch.where`) | E times into y; within one call every token occurs at most once | no |
# | sorted, one `index_add` back | T·K | the product's | yes: atomics, any order | no |
# | sorted, one product each (4.4) | T·K | one (`tolist`) | no | no |
# | sorted, padded (to the fullest) | E · fullest | one (that size) | no | no |
# | sorted, capacity | E·C | none, C is known | no | yes |
# | sorted, `F.grouped_mm` | T·K | none from Hopper on; before, torch loops | no | no |
#
# Where **atomics** add, the order changes from run to run, and with it the last bits. `combine` **gathers**: each token
# sums its own rows in one fixed order.
#
# ### The same bits every time (*optional*)
#
# **Predict** from which k on the order can change a bit.

# %%
torch.manual_seed(0)
for k in (1, 2, 3, 8):
    summands = torch.rand(64 * k, 16)  # 64 tokens' rows
    owners = torch.arange(64).repeat_interleave(k)
    first = torch.zeros(64, 16).index_add(0, owners, summands)
    orders = [torch.randperm(64 * k) for _ in range(5)]
    sums = [torch.zeros(64, 16).index_add(0, owners[o], summands[o]) for o in orders]
    same = all(torch.equal(first, total) for total in sums)
    print(f"k = {k}: the same bits in every order: {same}")

# %% [markdown]
# Two numbers are safe: 0 + a + b = 0 + b + a, bit by bit. From three on they are not.
#
# ## 8 What each way takes
#
# One layer, 2,048 tokens, k = 2, D = F = 64, forward and backward, even load, 8 to 256 experts ("every expert" only to
# 32). The ways take turns, so that noise meets all. This runs for a while.

# %%
NAMES = {
    "every expert": "every expert",
    "loop": "loop",
    "reference": "sorted, one product each",
    "padded": "sorted, padded",
    "torch": "sorted, F.grouped_mm",
}
steps = {}
for n in expert_counts:
    ways = bench.variants(bench.Shape(2048, 64, 64, n, top_k=2))
    names = [name for name in NAMES if n <= 32 or name != "every expert"]
    steps |= {(name, n): ways[name] for name in names}
timings = bench.compare(steps, rounds=4)
times = {key: timing.low for key, timing in timings.items()}  # lower quartiles: steadier

# %%
unit, curves = times["torch", 8], {}
for name, shown in NAMES.items():
    measured = [n for n in expert_counts if (name, n) in times]
    curves[shown] = (measured, [times[name, n] / unit for n in measured])
viz.growth(
    curves,
    title="A training step of one layer, even load",
    x="experts E",
    y="time (1 = F.grouped_mm at E = 8)",
    alt="Every expert on every token grows in proportion to E from the start. The loop is "
    "close to the others at eight experts and far slower at 256. Padded and "
    "F.grouped_mm grow least, and stay close together.",
)

# %% [markdown]
# And your prediction? (The numbers differ between machines and runs.)

# %% tags=["nbval-ignore-output"]
for name, guess in (("loop", my_guess["loop"]), ("torch", my_guess["best"])):
    grown = times[name, 256] / times[name, 8]
    print(f"{NAMES[name]:<24} E 8 to 256: you said × {guess}, it is × {grown:.1f}")

# %% [markdown]
# The loop grows faster than its operators: in the backward pass each `w[e]` makes a gradient as large as **all** experts.
# And even the best way pays for more experts, at equal FLOPs. Take its step apart: the router, dispatch there and back,
# the experts.

# %%
parts = {n: bench.parts(bench.Shape(2048, 64, 64, n, top_k=2)) for n in expert_counts}
runs = {(part, n): run for n in expert_counts for part, run in parts[n].items()}
timings = bench.compare(runs, rounds=11)
low = {key: timing.low for key, timing in timings.items()}  # lower quartiles again
step_at_8 = sum(low[part, 8] for part in parts[8])
viz.growth(
    {
        part: (expert_counts, [low[part, n] / step_at_8 for n in expert_counts])
        for part in parts[8]
    },
    title="What grows with the number of experts",
    x="experts E",
    y="time (1 = the step at E = 8)",
    alt="Dispatch stays small and nearly flat. The router grows most; the experts, at "
    "equal FLOPs, grow too.",
)

# %% [markdown]
# Dispatch is small, and stays so. The router scores all E experts; and the experts' products, at equal FLOPs, become many
# and small: T·K/E = 16 rows each at E = 256.
#
# ### A trap in the loop (*optional*)
#
# A gradient as large as all experts for each `w[e]` is E² work. `unbind` takes the matrices apart once. (transformers'
# "eager" experts
# [index like this](https://github.com/huggingface/transformers/blob/main/src/transformers/models/mixtral/modeling_mixtral.py),
# too.)

# %%
layer, tokens = bench.layer_and_input(bench.Shape(2048, 64, 64, 128, top_k=2))


def step(forward):
    """A training step of the layer by `forward`."""

    def run():
        layer.zero_grad(set_to_none=True)
        forward(layer, tokens).sum().backward()

    return run


def loop_unbound(layer, x):
    """The loop on matrices that were taken apart once."""
    w_in, w_down = layer.experts.w_in.unbind(), layer.experts.w_down.unbind()

    def one(e, rows):
        gate, up = F.linear(rows, w_in[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, w_down[e])

    return moe_loop(x, layer.router(x), one)


# %%
ways = {
    "loop, w[e]": loop,
    "loop, unbind": loop_unbound,
    "sorted,\nF.grouped_mm": goal,
}
timings = bench.compare({name: step(way) for name, way in ways.items()}, rounds=3)
best = timings["sorted,\nF.grouped_mm"].median
viz.bars(
    {name: timing.median / best for name, timing in timings.items()},
    title="The loop, with and without its trap, at E = 128",
    y="time (1 = F.grouped_mm)",
    show="{:.1f} ×".format,
    alt="The loop that indexes w[e] takes longest; with unbind it is faster, and still "
    "some times slower than the sorted way.",
)

# %% [markdown]
# ### And under a skewed load (*optional*)
#
# Now each token draws its experts about with weights 1, 1/2, 1/3, … The work is the same T·K rows. **Predict** who gets slower.

# %%
names, fewer, steps = ("loop", "padded", "torch"), (8, 16, 32, 64), {}
for n in fewer:
    for load in ("even", "1/rank"):
        shape = bench.Shape(2048, 64, 64, n, top_k=2)
        ways = bench.variants(shape, skewed=load == "1/rank")
        steps |= {(name, n, load): ways[name] for name in names}
skew = bench.compare(steps, rounds=5)


def slower(name, n):
    """How many times longer a way takes under the skewed load, by lower quartiles."""
    return skew[name, n, "1/rank"].low / skew[name, n, "even"].low


# %%
viz.growth(
    {NAMES[name]: (fewer, [slower(name, n) for n in fewer]) for name in names},
    title="What a skewed load costs",
    x="experts E",
    y="time under 1/rank (1 = even load)",
    levels={"no slower": 1},
    order=list(NAMES.values()),
    alt="The loop and F.grouped_mm take about the same time as under an even load. "
    "Padding takes longer, and ever more so with the number of experts.",
)

# %% [markdown]
# Only padding; the rest is noise. Our layer takes `F.grouped_mm`; notebook 08 writes one for a GPU.
#
# ## What real models do
#
# To look things up:
#
# | who | what | source |
# |---|---|---|
# | GShard (2020) | capacity, k = 2, by position | [Lepikhin et al.](https://arxiv.org/abs/2006.16668), algorithm 1 |
# | Switch (2021) | capacity, k = 1, for a TPU's fixed shapes; the residual carries dropped tokens | [Fedus et al.](https://arxiv.org/abs/2101.03961), section 2.2 |
# | MegaBlocks (2022) | dropless; each group padded to a multiple of 128 rows | [Gale et al.](https://arxiv.org/abs/2211.15841), section 5 |
# | OLMoE (2024) | dropless | [Muennighoff et al.](https://arxiv.org/abs/2409.02060), section 2 |
# | DeepSeek-V2 (2024) | drops the lowest scores on a full device in training | [paper](https://arxiv.org/abs/2405.04434), section 2.2.4 |
# | DeepSeek-V3 (2024) | drops nothing, in training or inference | [paper](https://arxiv.org/abs/2412.19437), section 2.1.2 |
# | transformers 5 | dropless: a loop ("eager"), or sorted and `grouped_mm` | [code](https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/moe.py) |
#
# ## Recap
#
# - One stable sort makes the plan. Permute copies, combine sums; each is the other's backward pass.
# - A capacity fixes shapes and drops choices: results then depend on the batch.
# - At equal FLOPs, more experts still cost.

# %%
show_progress("04")

# %% [markdown]
# **Next:** [05 · Load balancing](05_load_balancing.ipynb): why does routing collapse, and what does each cure cost?
