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
#   title: The router
#   minutes: 60
#   seconds: 90
#   hardware: CPU
# ---

# %% [markdown]
# # 02 · The router
#
# **How can a network choose, and still be trained?**
#
# `CPU` · 60 minutes · prerequisites: notebook 01; softmax and gradients in PyTorch
#
# At the end **you will have built** the router of Mixtral, OLMoE and DeepSeek-V3 as one function: scores, a choice,
# weights, groups and a bias. You will have written and checked the gradient that trains it, and seen a router that can
# never learn.
#
# Sections marked *optional* go past the hour: run their cells, read them another time.

# %%
import math

import torch

from moe_lab import viz
from moe_lab.config import RouterConfig
from moe_lab.course import exercise, show_progress
from moe_lab.records import ExpertChoice, Routing

torch.set_num_threads(1)

# %% [markdown]
# ## Predict first
#
# Notebook 01 ended so: a token needs a quarter of the FFN, but another quarter each time. Something cheap has to choose
# **before** the work is done: one row of parameters per expert.
#
# Eight experts; the best two are chosen; their shares sum to one. **How many of the eight rows learn something from
# one token?** Section 6 will tell.

# %%
my_guess = 8  # of 8 rows

# %% [markdown]
# ## 1 The registrar
#
# A school has a registrar at its door. Each question goes to two of four rooms, and she has to choose before any room
# has heard it. She compares the question with a card per room. Here questions and cards are two numbers:
# how much arithmetic, how much language. **Predict** the rooms. The third question is a trap.

# %%
questions = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])  # (T, D)
cards = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-1.0, -1.0]])  # (E, D)

router_logits = questions @ cards.T  # (T, E)
print(router_logits)

# %% [markdown]
# The first question goes to rooms 0 and 2, the second to 1 and 2. The third fits three rooms alike: see section 4.
#
# In a model, a question is a token's D numbers, a room is an **expert**, the cards are the **router**, one (E, D) matrix,
# and the products are its **logits**:

# %%
viz.draw_router(learning=False)

# %% [markdown]
# There the analogy ends: a router sees one token in one layer, and no room has a subject on its door. Mixtral's authors
# found no clear topics ([Jiang et al. 2024](https://arxiv.org/abs/2401.04088), section 5).
#
# ## 2 What can be learnt?
#
# Three experts say 1, 3 and −1 about a token. Turn one logit. **Predict** which of these outputs do not move.

# %%
said = torch.tensor([1.0, 3.0, -1.0])
turned = torch.linspace(-2, 3, 301)  # expert 0's logit; the others have 1 and 0
logits = torch.stack([turned, torch.ones(301), torch.zeros(301)], dim=1)

scores, (best, ids), pair = logits.softmax(-1), logits.softmax(-1).max(-1), logits.topk(2)
outputs = {
    "the best says it all": said[ids],
    "the best, times its score": best * said[ids],
    "the best two, weighted": (pair.values.softmax(-1) * said[pair.indices]).sum(1),
    "all three, weighted": (scores * said).sum(1),
}

# %%
viz.lines(
    {name: (turned, output) for name, output in outputs.items()},
    title="Turning one logit: what does the output do?",
    x="logit of expert 0 (the others: 1 and 0)",
    y="output of the layer",
    alt="Four curves. The bare choice is flat, with one jump at 1. The best, times its score, "
    "bends, with a jump at 1. The best two are flat up to 0, jump, and bend. The sum over all "
    "three is smooth everywhere.",
)

# %% [markdown]
# The bare choice is flat: nothing to learn from. **A choice has no slope, a weight has.** Jumps remain; [Shazeer et al.
# 2017](https://arxiv.org/abs/1701.06538), section 2.1, found them frightening in theory and harmless in practice. Weights
# normalised among the chosen ignore the others (the best two, left of 0), a bare score feels them (the best, left of 1).

# %%
logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
weights, experts = logits.softmax(-1).topk(2)
print("the chosen ids carry a gradient:", experts.requires_grad)
print("the weights carry a gradient:   ", weights.requires_grad)

# %% [markdown]
# So a layer of experts multiplies each chosen expert's output by its weight (Shazeer, equation 1):
#
# $$y = \sum_{i\, \in\, \text{chosen}} w_i(x)\, E_i(x)$$
#
# Three steps make the weights, and papers differ in each: **score**, **choose**, **weigh**.

# %%
viz.draw_router()

# %% [markdown]
# ## 3 Scores
#
# Softmax lets the experts compete (Shazeer, equation 2). Sigmoid judges each by itself
# ([DeepSeek-V3](https://arxiv.org/abs/2412.19437), equation 15):
#
# $$s_i = \frac{e^{z_i}}{\sum_j e^{z_j}} \qquad\text{or}\qquad s_i = \frac{1}{1 + e^{-z_i}}$$
#
# **Predict:** one logit rises. How many of the four scores move?

# %%
from moe_lab.routing import score

before, after = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.tensor([[2.0, 2.0, 0.0, -1.0]])
for kind in ("softmax", "sigmoid"):
    moved = int((score(before, kind) != score(after, kind)).sum())
    total = score(before, kind).sum().item()
    print(f"{kind}: {moved} of 4 scores move; their sum before was {total:.2f}")

# %% [markdown]
# Both rise with the logit, so both rank the experts alike. The weights will differ.
#
# ## 4 The choice, and its ties
#
# The k largest scores win. What if the k-th and the next are equal? Models are trained in bf16, whose numbers have 8
# significant bits. **Predict:** of 100 tokens, how many tie there at 64 experts and k = 8?

# %%
torch.manual_seed(0)
logits = torch.randn(20_000, 64)

for dtype in (torch.bfloat16, torch.float32):
    best = logits.to(dtype).sort(dim=-1, descending=True).values
    tied = 100 * (best[:, 7] == best[:, 8]).float().mean().item()
    print(f"{dtype}: of 100 tokens {tied:.0f} have equal 8th and 9th logits")

# %% [markdown]
# And `torch.topk` promises nothing about equals: another machine, another size, and other
# experts are chosen. Of six equal scores, here it takes:

# %% tags=["nbval-ignore-output"]
print(torch.ones(1, 6).topk(2).indices.tolist())

# %% [markdown]
# So routing is fp32 ([Switch](https://arxiv.org/abs/2101.03961), section 2.4), and ties get a rule.
#
# ### Exercise 2.1 · the best k, with a rule for ties
#
# ●○○ · 5 minutes · one line · `scores` (T, E) in fp32. Return each row's `k` best **ids**, int64 (T, k): the largest
# score first, of equal scores the lowest id first.
#
# <details><summary>Hint 1</summary>
#
# Look at the arguments of `torch.argsort`. One of them is about equal values, another about the direction.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `scores.argsort(dim=-1, descending=True, stable=True)` orders all ids. How many columns of it are asked for?
#
# </details>


# %%
@exercise("2.1")
def best_k(scores, k):
    """(T, E) to (T, k) ids: the largest score first, of equals the lowest id."""
    ### BEGIN SOLUTION
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :k]
    ### END SOLUTION


# %% [markdown]
# The registrar again, and **a check against torch** where nothing ties:


# %%
def random_logits(n_tokens, seed=0):
    """(n_tokens, 8) numbers between -2 and 2, the same on every machine."""
    return 4 * torch.rand(n_tokens, 8, generator=torch.Generator().manual_seed(seed)) - 2


# the trap: three rooms tie for the third question, and the rule takes the lowest ids
print("rooms:", best_k(router_logits, 2).tolist())
logits = random_logits(1000)
print("as torch.topk:", torch.equal(best_k(logits, 3), logits.topk(3).indices))

# %% [markdown]
# ## 5 Weights
#
# A chosen expert's weight is its score. Many models **normalise**: they divide a token's chosen scores by their sum. A
# **scaling factor** may follow, such as 2.5 in DeepSeek-V3.
#
# ### Exercise 2.2 · weights for the chosen
#
# ●○○ · 5 minutes · about four lines · `scores` (T, E), `experts` (T, K) ids. Return (T, K): each choice's weight, in its
# place.
#
# <details><summary>Hint 1</summary>
#
# `scores.gather(-1, experts)` reads, in every row, the columns that `experts` names.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `.sum(-1, keepdim=True)` gives a column, (T, 1), by which every row can be divided.
#
# </details>


# %%
@exercise("2.2")
def weigh(scores, experts, normalise=True, scaling_factor=1.0):
    """The chosen experts' scores, divided by their sum if `normalise`, times the factor."""
    ### BEGIN SOLUTION
    weights = scores.gather(-1, experts)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scaling_factor
    ### END SOLUTION


# %% [markdown]
# **Before or after?** Mixtral's paper takes a softmax of the chosen logits alone; its code takes a softmax of all, then
# normalises the chosen. **Predict:** do the weights differ? And if the code left out the second step?

# %%
scores, chosen = score(logits), best_k(logits, 2)
choose_first = logits.gather(-1, chosen).softmax(-1)
print("normalised:", torch.allclose(weigh(scores, chosen), choose_first))
print("bare:      ", torch.allclose(weigh(scores, chosen, normalise=False), choose_first))

# %% [markdown]
# The large sum $\sum_j e^{z_j}$ cancels. Without normalising it stays: the weights tell how much of the whole probability
# the chosen hold.
#
# **Move the sliders.** Raise a passed-over logit slowly: when do the weights notice, normalised and not? Which
# temperature, a divisor of the logits, changes who is chosen? With sigmoid, what do the weights sum to?

# %%
viz.RouterExplorer()

# %% [markdown]
# Normalised, the weights notice nothing until the logit enters the choice, and sum to 1. Bare softmax scores shrink all
# the while; bare sigmoid scores stay until it enters, and sum to anything up to k. No temperature changes the choice.
#
# ## 6 Which gradient reaches the router?
#
# Your prediction, by autograd, with a loss that wants something different from each weight:


# %%
def rows_that_learn(k, kind, normalise):
    """How many of eight logits, and so of the router's rows, get a gradient."""
    logits = torch.linspace(1, -1, 8)[None].requires_grad_()
    scores = score(logits, kind)
    weights = weigh(scores, best_k(scores.detach(), k), normalise)
    (gradient,) = torch.autograd.grad((weights * torch.arange(1, k + 1)).sum(), logits)
    return int((gradient.abs() > 1e-6).sum())


print(f"You said {my_guess}; it is {rows_that_learn(2, 'softmax', True)}.")

# %% [markdown]
# The chosen two, and no other. Now rules as in other models, with a small k:

# %%
for name, rule in {
    "as OLMoE:       k = 2, softmax": (2, "softmax", False),
    "as DeepSeek-V3: k = 2, sigmoid, normalised": (2, "sigmoid", True),
    "as Switch:      k = 1, softmax": (1, "softmax", False),
    "as Llama 4:     k = 1, sigmoid": (1, "sigmoid", False),
    "a mistake:      k = 1, softmax, normalised": (1, "softmax", True),
}.items():
    print(f"{name:<43} rows: {rows_that_learn(*rule)}")

# %% [markdown]
# Bare softmax scores reach every row, one normalised weight reaches none. The slopes show why. A row is a chosen weight,
# a column is a logit; first Mixtral's rule (softmax, k = 2, normalised):


# %%
def slopes(k, kind, normalise):
    """(K, E): how the weight of each choice answers to each logit."""
    logits = torch.tensor([[0.5, 2.0, -0.5, 1.0]])
    chosen = best_k(logits, k)

    def weights(z):
        return weigh(score(z, kind), chosen, normalise)[0]

    return torch.autograd.functional.jacobian(weights, logits)[:, 0].round(decimals=4) + 0.0


slopes(2, "softmax", True)

# %%
viz.heatmaps(
    {
        "softmax": slopes(2, "softmax", False),
        "softmax, normalised": slopes(2, "softmax", True),
        "sigmoid": slopes(2, "sigmoid", False),
        "k = 1, normalised": slopes(1, "softmax", True),
    },
    title="How the weights of the chosen answer to each logit",
    x="logit of expert",
    y="weight of expert",
    rows=["1", "3"],
    colour="slope",
    signed=True,
    numbers=True,
    alt="Four small tables. Softmax: all four columns are filled. Softmax normalised: only "
    "columns 1 and 3, plus and minus the same number. Sigmoid: each choice only its own "
    "column. k = 1 normalised: all zeros.",
)

# %% [markdown]
# Take the second table. Let $g_i = \partial L/\partial w_i$, which is $\partial L/\partial y \cdot E_i(x)$. Then
#
# $$\frac{\partial L}{\partial z_j} = w_j\Big(g_j - \sum_{i\,\in\,\text{chosen}} w_i\, g_i\Big) \quad\text{for chosen } j,
# \text{ else } 0$$
#
# An expert is compared with the weighted **mean of the chosen**.
#
# ### Exercise 2.3 · the gradient that reaches the router
#
# ●●○ · 8 minutes · about four lines · `weights` $w$, `experts`, `d_weights` $g$: (T, K), a token's weights sum to one.
# Return (T, n_experts). `torch.zeros(len(weights), n_experts).scatter(-1, experts, values)` puts values into their
# experts' columns.
#
# <details><summary>Hint 1</summary>
#
# First the bracket for every choice, (T, K): `d_weights` minus a column, (T, 1).
#
# </details>
# <details><summary>Hint 2</summary>
#
# The column is `(weights * d_weights).sum(-1, keepdim=True)`. And the values are `weights` times the bracket.
#
# </details>


# %%
@exercise("2.3")
def logits_gradient(weights, experts, d_weights, n_experts):
    """The logits' gradient (T, E), where the weights are a softmax of the chosen logits."""
    ### BEGIN SOLUTION
    mean = (weights * d_weights).sum(-1, keepdim=True)
    gradient = torch.zeros(len(weights), n_experts)
    return gradient.scatter(-1, experts, weights * (d_weights - mean))
    ### END SOLUTION


# %% [markdown]
# **Check it against autograd**, with three experts and with one:

# %%
logits = random_logits(6).requires_grad_()
for k in (3, 1):
    chosen = best_k(logits.detach(), k)
    weights = weigh(score(logits), chosen)
    g = torch.arange(6.0 * k).view(6, k)
    (theirs,) = torch.autograd.grad(weights, logits, g)
    mine = logits_gradient(weights.detach(), chosen, g, 8)
    print(
        f"k = {k}: equal {torch.allclose(mine, theirs, atol=1e-5)}, all zero {not mine.any()}"
    )

# %% [markdown]
# A lone expert is its own mean: the language-model loss cannot reach the router. This
# [shipped](https://github.com/jingyaogong/minimind/issues/858), and a user's MoE fell behind a dense model a third its
# size. [Switch](https://arxiv.org/abs/2101.03961), section 2.1, keeps the bare probability.
#
# ## 7 Groups, and a bias that only selects
#
# DeepSeek-V3's 256 experts live on 8 machines in training (section 3.2). **Predict:** a token chooses 8 experts at
# random. On how many machines?

# %%
missed = math.comb(256 - 32, 8) / math.comb(256, 8)  # no chosen expert on a given machine
print(f"{8 * (1 - missed):.2f} of 8 machines, on average")

# %% [markdown]
# Each visit is traffic. So the experts of a machine are a **group**, and a token chooses within its best `groups_kept`. A
# group is worth its best score ([DeepSeek-V2](https://arxiv.org/abs/2405.04434), section 2.2.2), or the sum of its two
# best (V3, section 2.1.2, where 8 experts on 4 machines are two on each):

# %%
one_token = torch.tensor([0.9, 0.1, 0.0, 0.5, 0.7, 0.6, 0.4, 0.5, 0.1, 0.2, 0.3, 0.8])
viz.draw_groups(one_token, n_groups=4, groups_kept=2, top_k=3)

# %% [markdown]
# ### Exercise 2.4 · a few groups only (*optional*)
#
# ●●○ · 10 minutes · about five lines · Experts stand in `n_groups` equal groups in order of their ids. Return `scores`
# (T, E), with −inf for all experts outside each token's best `groups_kept` groups, of equals the first. A group is worth
# its `"max"` or `"top2_sum"`.
#
# <details><summary>Hint 1</summary>
#
# `scores.unflatten(-1, (n_groups, -1))` is (T, groups, E / groups). `topk` along its last axis finds a group's best one
# or two scores; your `best_k` then finds the best groups.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A mask of the kept groups: `torch.zeros_like(worth, dtype=torch.bool).scatter(-1, kept, True)`, (T, groups). With `[...,
# None]` it reaches all experts of a group: `grouped.masked_fill(~mask[..., None], -torch.inf)`, then `.flatten(-2)`.
#
# </details>


# %%
@exercise("2.4")
def limit_groups(scores, n_groups, groups_kept, group_score="max"):
    """Scores with -inf for the experts outside of each token's best groups."""
    ### BEGIN SOLUTION
    grouped = scores.unflatten(-1, (n_groups, -1))
    worth = grouped.topk(1 if group_score == "max" else 2, dim=-1).values.sum(-1)
    kept = best_k(worth, groups_kept)
    mask = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, kept, True)
    return grouped.masked_fill(~mask[..., None], -torch.inf).flatten(-2)
    ### END SOLUTION


# %% [markdown]
# ### A bias that only selects
#
# DeepSeek-V3 adds a **selection bias** to the scores, a number per expert, to send more or fewer tokens there (equation
# 16). It chooses, groups and experts; it never weighs. **Predict** who is chosen, and with which weights:

# %%
scores, bias = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([0.0, 0.0, 0.3])
chosen = best_k(scores + bias, 2)
print("chosen:", chosen.tolist(), "  bare weights:", weigh(scores, chosen, normalise=False))

# %% [markdown]
# Expert 2 comes first by its bias, and counts by its score. Now all steps, into a record:
#
# | part of `Routing` | shape | |
# |---|---|---|
# | `router_logits` | (T, E) | as they came; from a `Router` fp32 |
# | `router_scores` | (T, E) | fp32, without the bias |
# | `topk_weights` | (T, K) | fp32 |
# | `topk_experts` | (T, K) | ids, the best choice first, of equals the lowest |
#
# ### Exercise 2.5 · the whole route
#
# ●●○ · 8 minutes · about eight lines · Score in fp32; add the bias, if there is one; limit groups, if `config.n_groups >
# 1`; choose; weigh. Return `Routing(logits, scores, weights, experts)`.
#
# <details><summary>Hint 1</summary>
#
# Every step is written: `score(router_logits.float(), config.score)`, `limit_groups`, `best_k`, `weigh`. Keep two things
# apart: `scores`, and what you choose by.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The config has `top_k`, `score`, `normalise`, `scaling_factor`, `n_groups`, `groups_kept` and `group_score`: each is
# handed to one of the steps.
#
# </details>


# %%
@exercise("2.5")
def route(router_logits, config, selection_bias=None):
    """Logits (T, E) to a Routing; the bias (E,) selects and never weighs.

    `config` is a RouterConfig, by default softmax and normalised. Its own `selection_bias`
    only says whether a Router keeps a bias: here the argument counts.
    """
    ### BEGIN SOLUTION
    scores = score(router_logits.float(), config.score)
    choosing = scores if selection_bias is None else scores + selection_bias
    if config.n_groups > 1:
        choosing = limit_groups(
            choosing, config.n_groups, config.groups_kept, config.group_score
        )
    experts = best_k(choosing, config.top_k)
    weights = weigh(scores, experts, config.normalise, config.scaling_factor)
    return Routing(router_logits, scores, weights, experts)
    ### END SOLUTION


# %% [markdown]
# **Check it against the package's router**, by DeepSeek-V3's rule and sizes, on 500 tokens:

# %%
from moe_lab.presets import MOE_FAMILIES
from moe_lab.routing import Router

sizes = {
    "n_experts": 256,
    "top_k": 8,
    "n_groups": 8,
    "groups_kept": 4,
    "scaling_factor": 2.5,
}
deepseek = RouterConfig(d_model=64, **sizes, **MOE_FAMILIES["deepseek_v3"])
torch.manual_seed(0)
router, tokens = Router(deepseek), torch.rand(500, 64) - 0.5
router.selection_bias.copy_(torch.rand(256) / 10)  # an untrained one is zero

logits = router.logits(tokens)  # the linear layer alone
mine, theirs = route(logits, deepseek, router.selection_bias), router(tokens)
print("experts equal:", torch.equal(mine.topk_experts, theirs.topk_experts))
print("weights equal:", torch.allclose(mine.topk_weights, theirs.topk_weights))

# %% [markdown]
# Did the limit hold?

# %%
machines = torch.nn.functional.one_hot(mine.topk_experts // 32, 8).amax(1).sum(1)  # (T,)
print("most machines that a token visits:", int(machines.max()))

# %% [markdown]
# And the bias. Give one expert more and more of it: who chooses it, and how much does it count?

# %%
rule = RouterConfig(d_model=1, n_experts=8, top_k=2, score="sigmoid")
logits, bias = random_logits(1000), torch.zeros(8)
for extra in (0.0, 0.2, 1.0):
    bias[3] = extra
    routing = route(logits, rule, bias)
    chosen = routing.topk_experts == 3
    mean = routing.topk_weights[chosen].mean()
    print(
        f"bias {extra}: {chosen.sum():>4} of 1000 tokens choose it, mean weight {mean:.2f}"
    )

# %% [markdown]
# More tokens choose it, and it counts less: its weight is made of its score. Notebook 05 moves such biases.
#
# ## 8 Does it learn?
#
# Eight kinds of question, eight **frozen** rooms. For every kind one room knows the answer, the others say
# anything. Only the registrar learns, from how wrong the weighted answer was.


# %%
def learn(config, noise=lambda step: 0.0, seed=0, steps=300):
    """Per cent of the questions whose right room has the largest logit, step by step."""
    torch.manual_seed(seed)
    kinds, right = torch.randn(8, 16), torch.randn(8, 16)  # the questions, their answers
    rooms = torch.randn(8, 8, 16)  # what each room says to each kind
    home = torch.randperm(8)  # the room that is right, for each kind
    rooms[home, torch.arange(8)] = right
    router = Router(config)
    optimizer, hits = torch.optim.Adam(router.parameters(), lr=0.02), []
    for step in range(steps):
        kind = torch.randint(8, (64,))
        logits = router.logits(kinds[kind] + 0.3 * torch.randn(64, 16))
        hits.append(100 * (logits.argmax(-1) == home[kind]).float().mean().item())
        routing = route(logits + noise(step) * torch.randn(64, 8), config)
        answers = rooms[routing.topk_experts, kind[:, None]]  # (T, K, D)
        y = (routing.topk_weights[..., None] * answers).sum(1)
        optimizer.zero_grad()
        (y - right[kind]).square().mean().backward()
        optimizer.step()
    return hits


# %% [markdown]
# Noise on the logits makes her try other rooms. It begins at 2 and fades: it is **annealed**. **Predict** the order of
# these five registrars.


# %%
def fading(step):
    """The size of the noise at a step."""
    return max(0.0, 2 - step / 100)


rule = RouterConfig(d_model=16, n_experts=8, top_k=2)
registrars = {  # `but` copies a rule with a change
    "k = 1\nnormalised": [rule.but(top_k=1)],
    "k = 2\nno noise": [rule],
    "all 8": [rule.but(top_k=8)],
    "k = 1\nbare": [rule.but(top_k=1, normalise=False)],
    "k = 2\nnoise": [rule, fading],
}
schools = {
    name: [learn(*how, seed=n) for n in range(5)] for name, how in registrars.items()
}
ends = {
    name: torch.tensor(five)[:, -50:].mean(1).tolist() for name, five in schools.items()
}

# %%
viz.lines(
    {
        "one school": (
            [i for i in range(5) for _ in range(5)],
            [end for five in ends.values() for end in five],
        ),
        "mean": (range(5), [sum(five) / 5 for five in ends.values()]),
    },
    title="Who finds the right room? Five schools each, last 50 of 300 steps",
    x="registrar",
    y="right room ranked first (%)",
    joined=False,
    ticks=list(ends),
    levels={"chance": 12.5},
    alt="Points for five schools and their mean. Asking all rooms, or two with fading noise, "
    "finds the right room nearly always. One room with its bare probability gets far, two "
    "rooms without noise less far; both differ much from school to school. One room with a "
    "normalised weight stays near chance.",
)

# %% [markdown]
# Two rooms asked are two compared: the right one, once passed over, is not heard, unless noise brings it in. With a bare
# probability, a bad answer lowers one logit and lifts all others: she explores unasked. Normalised and alone, she learns
# nothing.

# %%
mean = {name: sum(five) / 5 for name, five in ends.items()}
print("k = 1, normalised: near chance on average:", mean["k = 1\nnormalised"] < 30)
print("k = 2 without noise: stuck on the way:    ", 30 < mean["k = 2\nno noise"] < 80)
print("k = 2 with fading noise: nearly all right:", mean["k = 2\nnoise"] > 90)

# %% [markdown]
# In real models the rooms learn, too: who is asked becomes good at it. There noise buys little: Switch's log
# perplexity (lower is better) is 1.471 without, 1.468 with input jitter
# ([appendix C](https://arxiv.org/abs/2101.03961)).
#
# ### Temperature and noise (*optional*)
#
# Alone a temperature keeps the choice. **Predict:** and with noise on the logits?

# %%
torch.manual_seed(0)
logits, noise = torch.randn(2, 5000, 64)
settled = best_k(logits, 8)


def swapped(experts):
    """Per cent of the chosen experts that are not among the settled ones."""
    strange = (experts[:, :, None] != settled[:, None]).all(-1)
    return 100 * strange.float().mean().item()


temperatures = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]
alone = [swapped(best_k(logits / t, 8)) for t in temperatures]
noisy = [swapped(best_k(logits / t + noise, 8)) for t in temperatures]
print("experts swapped by temperature alone:", max(alone), "%")

# %%
viz.lines(
    {"with noise": (temperatures, noisy), "alone": (temperatures, alone)},
    title="Dividing logits by a temperature (64 experts, k = 8)",
    x="temperature",
    y="chosen experts swapped (%)",
    log_x=True,
    markers=True,
    levels={"chance": 87.5},
    alt="Alone the temperature swaps nothing. With noise the share rises from about a tenth at "
    "temperature one eighth towards chance, 87.5 per cent, at 8.",
)

# %% [markdown]
# Temperature needs noise to matter: twice of it acts as twice the noise.
#
# | noise | where | source |
# |---|---|---|
# | noisy top-k | on the logits, of a learned size | [Shazeer 2017](https://arxiv.org/abs/1701.06538), equation 4 |
# | input jitter | the router's input times U(1 − ε, 1 + ε) | [Switch 2021](https://arxiv.org/abs/2101.03961), appendix C |
# | temperature, annealed | begins with all experts, sharpens to few | [EvoMoE 2021](https://arxiv.org/abs/2112.14397) |
# | chance | the second expert is dropped at random, a light one more often | [GShard 2020](https://arxiv.org/abs/2006.16668), section 2.2 |
#
# ## 9 Near random at the start (*optional*)
#
# An untrained router is a random matrix. Here is one in notebook 01's model, layer 2:

# %%
from moe_lab.data import load_corpus, validation_windows
from moe_lab.lm import LM
from moe_lab.presets import MOE_BASELINE

corpus = load_corpus()
held_out = [
    validation_windows(text, context=64, limit=8)[0] for text in corpus.val.values()
]
probe = torch.cat(held_out)  # (32, 64) bytes
torch.manual_seed(0)
model = LM(MOE_BASELINE)


@torch.no_grad()
def chosen_pairs():
    """(T, 2), the experts that each probe token chooses now, the lower id first."""
    _, routings = model(probe)  # the model's logits, and a Routing for each layer
    return routings[-1].topk_experts.sort(-1).values


at_start = chosen_pairs()
at_start.shape

# %% [markdown]
# **Predict:** do equal bytes take equal pairs?

# %%
pair = 8 * at_start[:, 0] + at_start[:, 1]


def favourites(data):
    """Per cent of the tokens that take the most frequent pair of their byte."""
    counts = [pair[data == byte].bincount().max() for byte in data.unique()]
    return 100 * int(sum(counts)) / len(data)


shuffled = probe.flatten()[torch.randperm(2048)]
print(f"take their byte's favourite pair: {favourites(probe.flatten()):.0f} %")
print(f"the same with shuffled bytes:     {favourites(shuffled):.0f} %")

# %% [markdown]
# Random, but no coin: equal bytes begin as equal embeddings, and a linear map keeps neighbours together. Now train, and
# ask the same tokens after each step.

# %%
from moe_lab.config import TrainConfig
from moe_lab.train import train

torch.manual_seed(0)
model = LM(MOE_BASELINE)  # the same once more, untrained
pairs = [chosen_pairs()]
_ = train(
    model, corpus.train, TrainConfig(steps=100), lambda step: pairs.append(chosen_pairs())
)

# %%
load = torch.stack([100 * now.flatten().bincount(minlength=8) / 2048 for now in pairs])
moved = 100 * (pairs[0] != pairs[-1]).any(-1).float().mean().item()
viz.heatmap(
    load.T,
    title=f"The first 100 steps, layer 2: in the end {moved:.0f} % have another pair",
    x="step",
    y="expert",
    colour="tokens that chose it (%)",
    rows=[str(expert) for expert in range(8)],
    alt="Eight rows of shades. All experts begin with some of the tokens; between steps 10 and "
    "30 the shades change quickly, and then they stay: some dark, some almost white.",
)

# %% [markdown]
# The routes swing, then settle, unevenly: some experts have hardly anything to do. That is notebook 05.
#
# ## 10 How stable is a route? (*optional*)
#
# Disturb the router's input a little. **Predict:** does a larger k make the chosen set more stable, or less?

# %%
torch.manual_seed(0)
x, w = torch.randn(10_000, 64), torch.randn(64, 64) / 8  # 10,000 tokens, 64 experts
calm = x @ w.T
disturbed = {d: (x + d / 100 * torch.randn_like(x)) @ w.T for d in (0.1, 0.3, 1, 3, 10)}


def compare(k, logits):
    """Per cent of the tokens with another set, and of the weight that was on dropped experts."""
    rule = RouterConfig(d_model=64, n_experts=64, top_k=k)
    # dense: (T, E), zero where an expert is not chosen
    before, after = route(calm, rule).dense_weights, route(logits, rule).dense_weights
    dropped = (before > 0) & (after == 0)
    return 100 * dropped.any(-1).float().mean(), 100 * (before * dropped).sum(-1).mean()


compared = {k: [compare(k, logits) for logits in disturbed.values()] for k in (1, 2, 8, 32)}
viz.lines(
    {
        f"k = {k}": (list(disturbed), [sets for sets, _ in pairs])
        for k, pairs in compared.items()
    },
    title="Which sets change when the input is disturbed? (64 experts)",
    x="disturbance of the input (%)",
    y="tokens with another set (%)",
    log_x=True,
    markers=True,
    alt="Four rising curves. At every disturbance, the larger k is, the more tokens change "
    "their set.",
)

# %% [markdown]
# Less, up to half of the experts: the border is crowded. But who stands there has the smallest **weight**. How much
# weight did the dropped experts have?

# %%
viz.lines(
    {
        f"k = {k}": (list(disturbed), [weight for _, weight in pairs])
        for k, pairs in compared.items()
    },
    title="How much weight goes with the dropped experts? (64 experts)",
    x="disturbance of the input (%)",
    y="weight of the dropped experts (%)",
    log_x=True,
    markers=True,
    alt="The same four curves in the opposite order: at every disturbance, the larger k is, the "
    "less weight the dropped experts had.",
)

# %% [markdown]
# The opposite order: with k = 1 few change, but wholly.
#
# Which tokens will change? A token's **margin** is the gap between its last chosen logit and the next. **Predict:** of
# the tokens whose margin is over four disturbances, how many?

# %%
best = calm.sort(dim=-1, descending=True).values
# k = 8; an input disturbed by 1 % moves a logit by about 0.01, the unit here
margin = (best[:, 7] - best[:, 8]) / 0.01
before, after = best_k(calm, 8).sort(-1).values, best_k(disturbed[1], 8).sort(-1).values
changed = (before != after).any(-1)

edges = {"0 to ½": (0, 0.5), "½ to 1": (0.5, 1), "1 to 2": (1, 2), "2 to 4": (2, 4)}
edges["over 4"] = (4, math.inf)
inside = {name: (margin >= low) & (margin < high) for name, (low, high) in edges.items()}
shares = {name: 100 * changed[rows].float().mean().item() for name, rows in inside.items()}
print(f"margin over four disturbances: {shares['over 4']:.1f} % change")

# %%
viz.bars(
    shares,
    title="Sets that change, by their margin (k = 8)",
    x="margin, in disturbances of 1 %",
    y="tokens with another set (%)",
    show="{:.0f} %".format,
    alt="Five bars that fall quickly with the margin: nearly half of the tokens with the "
    "smallest margins change their set, none of those whose margin is over four disturbances.",
)

# %% [markdown]
# A large margin is safe, a small one only may change. Who compares two implementations looks at the margins where sets
# differ.
#
# ## 11 What it costs
#
# A router is E · D parameters and 2 · E · D FLOPs a token. **Predict** its share of Qwen3-30B: 128 experts in each of 48
# layers.

# %%
from moe_lab.accounting import count_parameters
from moe_lab.presets import REAL_MOE_MODELS

for name, config in REAL_MOE_MODELS.items():
    total, active = count_parameters(config), count_parameters(config, active=True)
    shares = (
        f"{total.share('router'):.3%} of all   {active.share('router'):.2%} of the active"
    )
    print(f"{name:<14} {total.router:>11,} parameters in routers   {shares}")

# %% [markdown]
# Next to nothing. ("Active": what one token uses.) Its decisions cost more: tokens travel (notebook 04).
#
# ## 12 Experts that choose (*optional*)
#
# Now each expert takes the C tokens that score it highest ([Zhou et al. 2022](https://arxiv.org/abs/2202.09368), equation
# 2). The record:
#
# | part of `ExpertChoice` | shape | |
# |---|---|---|
# | `router_scores` | (T, E) | softmax over the experts, fp32 |
# | `weights` | (E, C) | the scores of the chosen tokens |
# | `tokens` | (E, C) | each expert's tokens, the best first, of equals the earliest |
#
# ### Exercise 2.6 · experts that choose
#
# ●●○ · 6 minutes · three lines · Return `ExpertChoice(scores, weights, tokens)`, where every expert has its `capacity`
# best tokens.
#
# <details><summary>Hint 1</summary>
#
# Your `best_k` chooses along the last axis. What has to stand there? `scores.T` is (E, T).
#
# </details>
# <details><summary>Hint 2</summary>
#
# `scores.T.gather(-1, tokens)` are the weights.
#
# </details>


# %%
@exercise("2.6")
def expert_choice(router_logits, capacity):
    """Logits (T, E) to an ExpertChoice, in which every expert takes `capacity` tokens."""
    ### BEGIN SOLUTION
    scores = score(router_logits.float())
    tokens = best_k(scores.T, capacity)
    return ExpertChoice(scores, scores.T.gather(-1, tokens), tokens)
    ### END SOLUTION


# %%
logits = random_logits(12, seed=4)
tokens_choose = route(
    logits, RouterConfig(d_model=1, n_experts=8, top_k=2, normalise=False)
)
experts_choose = expert_choice(logits, capacity=3)
taken = torch.zeros(8, 12).scatter(
    1, experts_choose.tokens, experts_choose.weights
)  # (E, T)
counts = tokens_choose.tokens_per_expert  # (E,)
print("tokens per expert when tokens choose: ", counts.tolist())
print("experts per token when experts choose:", (taken > 0).sum(0).tolist())

# %%
viz.heatmaps(
    {
        "each token takes 2 experts": tokens_choose.dense_weights.T,
        "each expert takes 3 tokens": taken,
    },
    title="The same scores, chosen from either side",
    x="token",
    y="expert",
    colour="weight",
    alt="Two grids of eight experts and twelve tokens. Left, every token has two experts, and the "
    "experts are unequally busy. Right, every expert has three tokens, and the tokens have "
    "one, two or three experts.",
)

# %% [markdown]
# Even loads, uneven tokens. And a price: **predict** how many earlier tokens are routed otherwise when the last one
# changes.

# %%
changed = logits.clone()
changed[-1] = -logits[-1]
rule = RouterConfig(d_model=1, n_experts=8, top_k=2)
by_tokens = [route(z, rule).dense_weights[:-1] > 0 for z in (logits, changed)]
taken = [expert_choice(z, 3).tokens for z in (logits, changed)]
by_experts = [torch.zeros(8, 12).scatter(1, tokens, 1).T[:-1] for tokens in taken]
for name, (before, after) in {
    "tokens choose ": by_tokens,
    "experts choose": by_experts,
}.items():
    print(name, int((before != after).any(-1).sum()), "of 11 earlier tokens changed")

# %% [markdown]
# A model that writes from left to right has no later tokens yet; the authors name this limit (section 6).
#
# ## What real models do
#
# | model | score | choice | weights | source |
# |---|---|---|---|---|
# | Shazeer 2017 | logits + noise | k | softmax of the chosen | [paper](https://arxiv.org/abs/1701.06538), equations 3 to 5 |
# | GShard 2020 | softmax | 2, the second by chance | normalised | [paper](https://arxiv.org/abs/2006.16668), algorithm 1 |
# | Switch 2021 | softmax | 1, input jitter | bare | [paper](https://arxiv.org/abs/2101.03961), section 2.1 |
# | Mixtral 2024 | logits | 2 of 8 | softmax of the chosen | [paper](https://arxiv.org/abs/2401.04088), section 2.1 |
# | OLMoE 2024 | softmax | 8 of 64 | bare | [paper](https://arxiv.org/abs/2409.02060), section 2 |
# | DeepSeek-V2 2024 | softmax | 6 of 160, in 3 of 8 groups | bare, × 16 | [paper](https://arxiv.org/abs/2405.04434), section 2.2; [config](https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/configs/config_236B.json) |
# | DeepSeek-V3 2024 | sigmoid | 8 of 256 with bias, in 4 of 8 groups | normalised, × 2.5 | [paper](https://arxiv.org/abs/2412.19437), section 2.1.2; [config](https://github.com/deepseek-ai/DeepSeek-V3/blob/main/inference/configs/config_671B.json) |
# | gpt-oss-120b 2025 | logits, linear bias | 4 of 128 | softmax of the chosen | [code](https://github.com/openai/gpt-oss/blob/main/gpt_oss/torch/model.py) |
# | Llama 4 Scout 2025 | sigmoid | 1 of 16 | bare, on the expert's input | [code](https://github.com/meta-llama/llama-models/blob/main/models/llama4/moe.py) |
#
# ## Recap
#
# - A choice has no slope, a weight has: a router learns through the weights of the chosen.
# - Normalised weights compare the chosen. One alone learns nothing.
# - Bias and groups decide who is chosen, not how much they count.

# %%
show_progress("02")

# %% [markdown]
# **Next:** [03 · Top-k MoE](03_topk_moe.ipynb): what does a layer of experts compute, and what does it cost?
