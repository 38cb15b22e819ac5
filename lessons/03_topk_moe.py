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
#   title: Top-k MoE
#   minutes: 60
#   seconds: 60
#   hardware: CPU
# ---

# %% [markdown]
# # 03 · Top-k MoE
#
# **What does a layer of experts compute, and what does it cost?**
#
# `CPU` · 60 minutes · prerequisites: notebooks 01 and 02
#
# At the end **you will have built** a mixture-of-experts (MoE) layer three times: as its definition, as a loop over
# experts, and as a module that equals Mixtral's, gradients included. And you will read a model card as a bill: what
# memory has to hold, and what a token pays for.
#
# What is marked *optional* goes past the hour: run its cells, and read it another time.

# %%
import dataclasses

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe_lab import viz
from moe_lab.config import MoEConfig, RouterConfig
from moe_lab.course import exercise, show_progress
from moe_lab.experts import Experts
from moe_lab.routing import Router, route

torch.set_num_threads(1)  # layers this small are fastest on one thread

# %% [markdown]
# ## Predict first
#
# Mixtral 8x7B has eight experts in every layer, and each token goes to two of them. **How many billion parameters does
# it have, and what share of them does one token use?** Put your guess into the next cell. Section 7 will tell.

# %%
my_total, my_share = 56, 25  # billions, per cent

# %% [markdown]
# ## 1 Eight tokens by hand
#
# Any function of a token can be an **expert**. Take tokens of two numbers, and experts that are 2 × 2 matrices:
# one doubles a token, one swaps its numbers, one negates it, one adds its numbers up. The letters: **T** tokens of **D**
# numbers each, **E** experts, of which each token chooses **k** (in shapes: K).

# %%
x = torch.tensor([[1.0, 0], [0, 1], [2, 1], [1, 2], [3, 0], [0, 3], [1, 1], [2, 2]])
w = torch.tensor(
    [[[2.0, 0], [0, 2]], [[0, 1], [1, 0]], [[-1, 0], [0, -1]], [[1, 1], [1, 1]]]
)


def toy_expert(e, rows):
    """What expert e makes of some tokens, (..., D) to (..., D)."""
    return rows @ w[e].T


for e in range(4):
    print(f"expert {e} makes of token 2, {x[2].tolist()}: {toy_expert(e, x[2]).tolist()}")

# %% [markdown]
# The **router** of notebook 02 scores all experts, keeps each token's best two, and divides their scores by their sum.
# Let these be its scores, a row for every token:

# %%
scores = torch.tensor(
    [
        [0.6, 0.2, 0.1, 0.1],
        [0.2, 0.6, 0.1, 0.1],
        [0.5, 0.1, 0.3, 0.1],
        [0.1, 0.3, 0.5, 0.1],
        [0.3, 0.5, 0.1, 0.1],
        [0.2, 0.1, 0.6, 0.1],
        [0.1, 0.6, 0.2, 0.1],
        [0.3, 0.1, 0.5, 0.1],
    ]
)
routing = route(scores.log(), RouterConfig(d_model=2, n_experts=4, top_k=2))
print("topk_experts", routing.topk_experts.tolist())

# %% [markdown]
# `topk_experts` (T, K) holds the chosen ids. A token's choices stand in **slots**, the best in slot 0; `topk_weights`
# (T, K) holds their weights. Written as a table with a column for every expert, these are the **dense weights** (T, E):
# zero wherever an expert was not chosen.

# %%
viz.heatmap(
    routing.dense_weights,
    title="Each token has two weights, and they sum to one",
    x="expert",
    y="token",
    columns=list("0123"),
    rows=list("01234567"),
    colour="weight",
    numbers=True,
    alt="Eight rows of four weights, two of them not zero in each row. The column of "
    "expert 3 is all zero.",
)

# %% [markdown]
# This is where the tokens go. Expert 3 stays empty: that happens, and a layer has to survive it.

# %%
viz.draw_visits(routing)

# %% [markdown]
# **Predict**, with a pencil, what the layer gives for token 0. It is [1, 0], and goes to expert 0, which doubles, with
# weight 0.75, and to expert 1, which swaps, with weight 0.25.

# %%
doubled, swapped = toy_expert(0, x[0]), toy_expert(1, x[0])
print("expert 0 gives", doubled.tolist(), "  expert 1 gives", swapped.tolist())
print("token 0 becomes", (0.75 * doubled + 0.25 * swapped).tolist())

# %% [markdown]
# ## 2 The definition
#
# [Shazeer et al. 2017](https://arxiv.org/abs/1701.06538), equation 1. $G(x)$ is a token's row of dense weights:
#
# $$y = \sum_{e} G(x)_e\; \mathrm{expert}_e(x)$$
#
# Every expert works on every token, and most results are multiplied by zero: slow, and the truth for all that is faster.
#
# ### Exercise 3.1 · the definition
#
# ●○○ · 5 minutes · about three lines
#
# `routing.dense_weights` is (T, E), `routing.n_experts` is E, and `expert(e, x)` gives what expert e makes of tokens.
#
# <details><summary>Hint 1</summary>
#
# The sum over e is a loop that adds to `torch.zeros_like(x)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Column e of the dense weights, kept as a column: `routing.dense_weights[:, e, None]`, (T, 1). It multiplies (T, D).
#
# </details>


# %%
@exercise("3.1")
def moe_reference(x, routing, expert):
    """Every expert on every token, times its dense weight, summed; (T, D) to (T, D)."""
    ### BEGIN SOLUTION
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        y = y + routing.dense_weights[:, e, None] * expert(e, x)
    return y
    ### END SOLUTION


# %% [markdown]
# Token 0 should be what your pencil found:

# %%
y = moe_reference(x, routing, toy_expert)
for t, (token, result) in enumerate(
    zip(x.tolist(), y.round(decimals=3).tolist(), strict=True)
):
    print(f"token {t}: {token} becomes {result}")

# %% [markdown]
# ## 3 The loop over experts
#
# Four experts worked on eight tokens: 32 visits, of which 16 were multiplied by zero. Turn it round: each expert **picks**
# the tokens that chose it, **works** on these alone, **weighs** the results and **adds** them back. One turn:

# %%
viz.draw_visits(routing, highlight=0)

# %% [markdown]
# Picking is one line. It gives two lists of equal length: which tokens chose expert 0, and in which of their slots.

# %%
tokens, slots = torch.where(routing.topk_experts == 0)
print("tokens", tokens.tolist())
print("slots ", slots.tolist())

# %% [markdown]
# ### Exercise 3.2 · the loop over experts
#
# ●●○ · 8 minutes · about five lines
#
# As 3.1, in another way: an expert must see only the tokens that chose it. An expert nobody chose may be skipped, or
# called with no rows. Use `topk_experts` and `topk_weights`, both (T, K).
#
# <details><summary>Hint 1</summary>
#
# `x[tokens]` are the rows to work on; `expert(e, x[tokens])` gives as many rows.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A row's weight stands in its token's row and its slot's column: `routing.topk_weights[tokens, slots, None]`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `y.index_add(0, tokens, rows)` adds row i to `y[tokens[i]]` and returns the result.
#
# </details>


# %%
@exercise("3.2")
def moe_loop(x, routing, expert):
    """Each expert on the tokens that chose it, weighed and added back; (T, D) to (T, D)."""
    ### BEGIN SOLUTION
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        weights = routing.topk_weights[tokens, slots, None]
        y = y.index_add(0, tokens, weights * expert(e, x[tokens]))
    return y
    ### END SOLUTION


# %% [markdown]
# **Check it** on real experts, SwiGLUs, at awkward sizes: 37 tokens, three of seven experts each. `Experts`
# keeps their weights; `experts.one(e, x)` is what expert e computes.

# %%
torch.manual_seed(0)
config = MoEConfig(d_model=12, d_ff=20, n_experts=7, top_k=3)
router, experts = Router(config), Experts(config)
many = torch.randn(37, 12)
choice = router(many)


def counted(e, rows):
    """What expert e makes of some tokens, with a note of how many they are."""
    seen.append(rows.numel() // 12)
    return experts.one(e, rows)


results = []
for version in (moe_reference, moe_loop):
    seen = []
    results.append(version(many, choice, counted))
    print(f"{version.__name__:<14}{sum(seen):>4} rows of work")
print("equal:", torch.allclose(*results, atol=1e-5))

# %% [markdown]
# **Break it.** A well-read tutorial once overwrote where it should have added
# ([makeMoE #2](https://github.com/AviSoori1x/makeMoE/issues/2)). **Predict:** how many of our eight tokens come out
# wrong? And with one expert each?

# %%
for k in (2, 1):
    chosen = route(scores.log(), RouterConfig(d_model=2, n_experts=4, top_k=k))
    y = torch.zeros_like(x)
    for e in range(4):
        tokens, slots = torch.where(chosen.topk_experts == e)
        y[tokens] = chosen.topk_weights[tokens, slots, None] * toy_expert(e, x[tokens])
    right = torch.isclose(y, moe_reference(x, chosen, toy_expert)).all(1)
    print(f"top-{k}: {(~right).sum().item()} of 8 tokens are wrong")

# %% [markdown]
# All of them: the expert of the higher id wipes out the other. With k = 1 the bug hides. (`y[tokens] += …` is safe
# only because no token chooses an expert twice.)

# %% [markdown]
# ## 4 Top-1, top-2, top-8
#
# Released models differ in k, and in whether weights sum to one.
#
# | model | experts of a token | weights | source |
# |---|---|---|---|
# | Switch-Base-128 | 1 of 128 | the score itself | [Fedus et al. 2021](https://arxiv.org/abs/2101.03961), section 2.1 |
# | Mixtral 8x7B | 2 of 8 | divided by their sum | [Jiang et al. 2024](https://arxiv.org/abs/2401.04088), section 2.1 |
# | OLMoE-1B-7B | 8 of 64 | the scores themselves | [Muennighoff et al. 2024](https://arxiv.org/abs/2409.02060), section 2 |
# | Qwen3-30B-A3B | 8 of 128 | divided by their sum | [Qwen team 2025](https://arxiv.org/abs/2505.09388), section 2 |
#
# **Predict**, for each of the four, what the weights of a fresh router sum to.

# %%
rules = {
    "Switch\n1 of 128": {"n_experts": 128, "top_k": 1, "normalise": False},
    "Mixtral\n2 of 8": {"n_experts": 8, "top_k": 2},
    "OLMoE\n8 of 64": {"n_experts": 64, "top_k": 8, "normalise": False},
    "Qwen3\n8 of 128": {"n_experts": 128, "top_k": 8},
}
torch.manual_seed(0)
fresh = {
    name: route(torch.randn(1000, rule["n_experts"]), RouterConfig(d_model=1, **rule))
    for name, rule in rules.items()
}
viz.bars(
    {name: choice.topk_weights.sum(1).mean().item() for name, choice in fresh.items()},
    title="What a token's weights sum to, logits from N(0, 1)",
    y="sum of the weights",
    alt="Mixtral's and Qwen3's weights sum to one. OLMoE's sum to less than half, "
    "Switch's single weight is smaller still.",
)

# %% [markdown]
# Only division by the sum makes it one. It is the layer's volume: of equal experts, a layer whose weights sum to one is
# that expert; one with raw scores only whispers.
#
# ## 5 What comes back: the gradient
#
# Token t's output is a sum of weight times expert; $dy_t$ is the loss's gradient there. Let it be ones. For token 0:

# %%
dy = torch.ones(8, 2)
for k, e in enumerate(routing.topk_experts[0].tolist()):
    weight, made = routing.topk_weights[0, k].item(), toy_expert(e, x[0]).tolist()
    print(f"slot {k}: expert {e} made {made}, weight {weight:.2f}, dy {dy[0].tolist()}")

# %% [markdown]
# Call what the expert in slot k makes of token t $o_{t,k}$. Each factor's gradient holds the other:
#
# $$do_{t,k} = w_{t,k}\; dy_t \qquad\qquad dw_{t,k} = \langle dy_t,\; o_{t,k} \rangle$$
#
# An expert gets $dy$ times its weight. A weight gets one number: how far its expert points **up the loss**.
#
# ### Exercise 3.3 · the gradient of a weight
#
# ●●○ · 8 minutes · two lines, by hand
#
# Return $dw$, (T, K), in the order of slots; `dy` is (T, D).
#
# <details><summary>Hint 1</summary>
#
# For one expert: `(dy * expert(e, x)).sum(-1)` is its dot product with every token's dy, (T,).
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.stack(…, dim=1)` makes (T, E) of all experts' numbers; `.gather(1, routing.topk_experts)` picks what was
# chosen, in order.
#
# </details>


# %%
@exercise("3.3")
def weight_gradient(dy, x, routing, expert):
    """From dy (T, D), the gradient with respect to routing.topk_weights, (T, K)."""
    ### BEGIN SOLUTION
    every = [(dy * expert(e, x)).sum(-1) for e in range(routing.n_experts)]
    return torch.stack(every, dim=1).gather(1, routing.topk_experts)
    ### END SOLUTION


# %% [markdown]
# **Check it against autograd.** **Predict** token 0 first, from the numbers above.

# %%
weights = routing.topk_weights.clone().requires_grad_()
moe_loop(x, dataclasses.replace(routing, topk_weights=weights), toy_expert).backward(dy)
by_hand = weight_gradient(dy, x, routing, toy_expert)
print("token 0:", by_hand[0].tolist())
print("equal to autograd's:", torch.allclose(by_hand, weights.grad))

# %% [markdown]
# Autograd takes $dw$ on through the router. **Predict** the signs of token 0's four logit gradients, normalised and
# not. Mind experts 2 and 3, which it did not choose.

# %%
for normalise in (True, False):
    logits = scores.log().requires_grad_()
    how = RouterConfig(d_model=2, n_experts=4, top_k=2, normalise=normalise)
    moe_loop(x, route(logits, how), toy_expert).backward(dy)
    print(f"normalise={normalise!s:<6}", [round(g, 4) for g in logits.grad[0].tolist()])

# %% [markdown]
# Training steps *against* these. Normalised, the chosen compete: expert 0 pointed further up the loss, so its logit will
# fall and expert 1's rise. With raw scores the unchosen logits move too, but only because all scores share a sum: nobody
# computed what those experts would say.
#
# **Predict** the gradient of expert 3's **matrix**, to which no token went.

# %%
w.requires_grad_()
moe_loop(x, routing, toy_expert).backward(dy)
for e, gradient in enumerate(w.grad.round(decimals=3).tolist()):
    print(f"expert {e}: {gradient}")
w = w.detach()

# %% [markdown]
# Zero, as it should be.
#
# ### Where it is None (*optional*)
#
# With one module per expert, a loop that **skips** the empty ones leaves `None`.

# %%
modules = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(4))
for e, module in enumerate(modules):
    tokens = torch.where(routing.topk_experts == e)[0]
    if len(tokens) > 0:
        module(x[tokens]).sum().backward()
print([("None" if module.weight.grad is None else "there") for module in modules])

# %% [markdown]
# An optimizer passes `None` over. In data-parallel training, an expert empty on one machine only drifts apart
# ([NeMo Automodel #2995](https://github.com/NVIDIA-NeMo/Automodel/pull/2995)). Our experts share one tensor: zeros.
#
# ## 6 The whole layer
#
# ### Exercise 3.4 · the whole layer
#
# ●●○ · 7 minutes · three to four lines
#
# A batch is **B** sequences of **S** tokens. Router and loop take a list, (T, D) with T = B · S. Return `y`, (B, S, D),
# then the routing.
#
# <details><summary>Hint 1</summary>
#
# `x.reshape(-1, x.shape[-1])` lists the tokens; `.view_as(x)` undoes it.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `self.router(tokens)` gives the routing; `self.experts.one` is what `moe_loop` calls an expert.
#
# </details>


# %%
@exercise("3.4")
class MoE(nn.Module):
    """A layer of top-k experts: route, work, combine.

    self.router(tokens) gives their Routing, self.experts.one(e, rows) is expert e.
    """

    def __init__(self, config):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)

    def forward(self, x):
        """(B, S, D) to y (B, S, D), and the Routing of its B · S tokens."""
        ### BEGIN SOLUTION
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.router(tokens)
        y = moe_loop(tokens, routing, self.experts.one)
        return y.view_as(x), routing
        ### END SOLUTION


# %% [markdown]
# **Check it against Mixtral.** `MixtralSparseMoeBlock` of Hugging Face's transformers is the layer inside the released
# model. We need it for this check alone; without it, the check says that it did not run.

# %%
try:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
except ImportError:
    MixtralSparseMoeBlock = None
    print("transformers is not installed, so the next two cells will not run their check.")
    print("To see it: pip install 'transformers>=5,<6', then restart the kernel.")

# %% [markdown]
# Give Mixtral's block the weights of your layer. Both keep the experts' matrices in two tensors, gate and up together. What
# Mixtral calls `gate.weight` is its router.


# %%
def as_mixtral(layer, config):
    """Mixtral's block with the weights of a layer."""
    theirs = MixtralConfig(
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_local_experts=config.n_experts,
        num_experts_per_tok=config.top_k,
    )
    theirs._experts_implementation = "eager"  # its loop over experts
    block = MixtralSparseMoeBlock(theirs)
    ours = layer.state_dict()
    names = {"gate.weight": "router.weight"}
    names |= {"experts.gate_up_proj": "experts.w_in", "experts.down_proj": "experts.w_down"}
    block.load_state_dict({their: ours[our] for their, our in names.items()})
    return block


if MixtralSparseMoeBlock:
    torch.manual_seed(1)
    small = MoEConfig(d_model=16, d_ff=28, n_experts=8, top_k=2)
    layer = MoE(small)
    for name, parameter in as_mixtral(layer, small).named_parameters():
        print(f"{name:<22}{tuple(parameter.shape)}")
else:
    print("Not run: transformers is not installed.")

# %% [markdown]
# The same tokens and the same $dy$ into both. Then compare the outputs, and the gradient of every weight.

# %%
if MixtralSparseMoeBlock:
    layer.zero_grad()
    block = as_mixtral(layer, small)
    sequences, dy_16 = torch.randn(2, 3, 11, 16)  # each: three sequences of eleven
    mine, theirs = layer(sequences)[0], block(sequences)
    mine.backward(dy_16)
    theirs.backward(dy_16)
    print("outputs:", torch.allclose(mine, theirs, atol=1e-5))
    pairs = zip(layer.named_parameters(), block.parameters(), strict=True)
    for (name, ours), their in pairs:
        print(f"gradient of {name}:", torch.allclose(ours.grad, their.grad, atol=1e-4))
else:
    print("Not run: transformers is not installed.")

# %% [markdown]
# It is Mixtral's. [Its class](https://github.com/huggingface/transformers/blob/main/src/transformers/models/mixtral/modeling_mixtral.py),
# told to be eager, loops, too; its default is a grouped product.

# %% [markdown]
# ## 7 What it costs: parameters
#
# | part of a layer | parameters | of these a token uses |
# |---|---|---|
# | router | E · D | all: it scores every expert |
# | routed experts, SwiGLU | E · 3 · D · F | k · 3 · D · F |
# | shared experts, if any, SwiGLU | 3 · D · F_shared | all: every token visits them |
# | shared gate, if any | D: it weighs the shared experts, per token | all |
#
# **Total** is all, **active** what one token uses. ReLU experts, shared ones too, have 2 matrices.
#
# ### Exercise 3.5 · total and active parameters
#
# ●●○ · 6 minutes · about four lines
#
# `moe` has `d_model`, `d_ff` (F), `n_experts`, `top_k`, `expert` ("swiglu" or "relu"), `d_ff_shared`
# (F_shared) and `shared_gate` (True or False).
#
# <details><summary>Hint 1</summary>
#
# Two numbers first: how many matrices an expert has, and how many routed experts count.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A shared expert has as many matrices as a routed one; `d_ff_shared` takes the place of `d_ff`.
#
# </details>


# %%
@exercise("3.5")
def moe_parameters(moe, *, active=False):
    """All parameters of one layer, or with active=True those a token uses: an int.

    moe.d_ff_shared is the width of all shared experts together, 0 where there are none.
    """
    ### BEGIN SOLUTION
    matrices = 3 if moe.expert == "swiglu" else 2
    n_experts = moe.top_k if active else moe.n_experts
    experts = matrices * moe.d_model * (n_experts * moe.d_ff + moe.d_ff_shared)
    return moe.n_experts * moe.d_model + experts + (moe.d_model if moe.shared_gate else 0)
    ### END SOLUTION


# %% [markdown]
# Around the layers stands what you counted in notebook 01: embedding, attention, norms, head. Four released models to the
# last digit, to compare with what their authors publish:
#
# | model | published total | active | source |
# |---|---|---|---|
# | Mixtral 8x7B | 46.7 B | 12.9 B | [Mistral AI 2023](https://mistral.ai/news/mixtral-of-experts) |
# | Mixtral 8x22B | 141 B | 39 B | [Mistral AI 2024](https://mistral.ai/news/mixtral-8x22b) |
# | OLMoE-1B-7B | 6.9 B | 1.3 B | [Muennighoff et al. 2024](https://arxiv.org/abs/2409.02060) |
# | Qwen3-30B-A3B | 30.5 B | 3.3 B | [model card](https://huggingface.co/Qwen/Qwen3-30B-A3B) |

# %%
from moe_lab.accounting import count_parameters
from moe_lab.presets import REAL_MOE_MODELS

print(f"{'':<15}{'total':>15}{'active':>17}{'share':>8}{'k/E':>8}   your layers")
for name, model in REAL_MOE_MODELS.items():
    full, part = (count_parameters(model, active=only) for only in (False, True))
    yours = [moe_parameters(model.moe, active=only) for only in (False, True)]
    agree = [n * model.n_moe_layers for n in yours] == [
        parts.router + parts.experts for parts in (full, part)
    ]
    shares = f"{part.total / full.total:>8.1%}{model.moe.top_k / model.moe.n_experts:>8.1%}"
    verdict = "agree" if agree else "differ"
    print(f"{name:<15}{full.total:>15,}{part.total:>17,}{shares}   {verdict}")

# %%
mixtral = REAL_MOE_MODELS["Mixtral 8x7B"]
whole, used = (count_parameters(mixtral, active=only) for only in (False, True))
print(f"You said {my_total} B and {my_share} %.")
print(f"Counted: {whole.total / 1e9:.1f} B and {used.total / whole.total:.1%}.")

# %% [markdown]
# Cards differ in what *active* means. We count the whole embedding table, of which a token reads one row, as Mixtral's and
# OLMoE's do; gpt-oss's leaves it out. Qwen3's 3.3 would be 3.353 cut off.
#
# **8x7B is not 56 B.** Give Mixtral a single expert a layer:

# %%
single = count_parameters(mixtral.but(moe=mixtral.moe.but(n_experts=1, top_k=1)))
viz.bars(
    {
        "8 models of\none expert": 8 * single.total / 1e9,
        "Mixtral 8x7B": whole.total / 1e9,
        "used by\na token": used.total / 1e9,
        "a model of\none expert": single.total / 1e9,
    },
    title="What 8x7B means",
    y="parameters (billions)",
    show="{:.1f}".format,
    alt="Four bars: 57.9 billion for eight models of one expert, 46.7 for Mixtral 8x7B, "
    "12.9 used by a token, 7.2 for a model of one expert.",
)

# %% [markdown]
# The 7 B is a whole model (Mistral 7B, and a router), and only its FFNs are there eight times. Attention and tables are
# there once. For the same reason a token uses more than two eighths:

# %%
viz.stacked(
    {
        f"{name}\n{what} {parts.total / 1e9:.1f} B": parts.by_part()
        for name in ("Mixtral 8x7B", "Qwen3-30B-A3B")
        for what, parts in (
            ("total", count_parameters(REAL_MOE_MODELS[name])),
            ("active", count_parameters(REAL_MOE_MODELS[name], active=True)),
        )
    },
    title="Experts are nearly all of the total, and less of the active",
    alt="Of the total parameters, experts hold 97 per cent in Mixtral and 95 in Qwen3-30B. "
    "Of the active ones they hold 88 and 54; attention holds 10 and 27.",
)

# %% [markdown]
# ### Exercise 3.6 · read it off the card (*optional*)
#
# ●●○ · 5 minutes · one line
#
# A card gives total and active parameters, E and k. How many parameters do **all routed experts** of the model have
# together? Return it in the card's unit.
#
# <details><summary>Hint 1</summary>
#
# What does a token leave out? How many experts is that?
#
# </details>
# <details><summary>Hint 2</summary>
#
# total − active is E − k experts of every layer.
#
# </details>


# %%
@exercise("3.6")
def experts_of_card(total, active, n_experts, top_k):
    """Parameters of all routed experts, from the four numbers of a model card."""
    ### BEGIN SOLUTION
    return (total - active) * n_experts / (n_experts - top_k)
    ### END SOLUTION


# %%
from_card = experts_of_card(46.7, 12.9, 8, 2)
counted, rest = whole.experts / 1e9, (whole.total - whole.experts) / 1e9
print(f"from the card: {from_card:.2f} B in experts, {46.7 - from_card:.2f} B elsewhere")
print(f"counted:       {counted:.2f} B in experts, {rest:.2f} B elsewhere")

# %% [markdown]
# ## 8 What it costs: memory and FLOPs
#
# *"Top-2 of 8 needs a quarter of the memory."* People believe it, buy hardware for it, and file a bug: a model with "3 B
# active" wanted 20 GB ([ollama #10546](https://github.com/ollama/ollama/issues/10546)). **Measure it:** layers with k and
# F fixed, and ever more experts.


# %%
def bill(n_experts, n_tokens=100):
    """Bytes that a top-2 layer holds, and the FLOPs that torch counts for some tokens."""
    layer = MoE(MoEConfig(d_model=64, d_ff=64, n_experts=n_experts, top_k=2))
    held = sum(parameter.nbytes for parameter in layer.parameters())
    tokens = torch.randn(n_tokens, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        moe_loop(tokens, layer.router(tokens), layer.experts.one)
    return held, counter.get_total_flops()


counts = [2, 4, 8, 16, 32, 64]
held, flops = zip(*(bill(n) for n in counts), strict=True)
for n, b, f in zip(counts, held, flops, strict=True):
    print(f"E {n:>2}   {b:>9,} bytes held   {f:>9,} FLOPs for 100 tokens")

# %%
viz.growth(
    {
        "bytes held": (counts, [b / held[0] for b in held]),
        "FLOPs": (counts, [f / flops[0] for f in flops]),
    },
    title="More experts, k = 2: memory follows the total, FLOPs the active",
    x="experts E",
    y="times the value at E = 2",
    alt="Both axes are logarithmic. Bytes held grow in proportion to the experts, to 32 "
    "times at 64. FLOPs stay nearly flat, and end a sixth above where they began.",
)

# %% [markdown]
# A token pays for k experts however many there are: k/E of what running all E would cost. The sixth on top is the router.
# Every **byte** is held. Could one fetch only the experts in use? **Predict:** how many of Mixtral's eight do 16 tokens
# need?

# %%
batches = [1, 2, 4, 8, 16, 32, 64, 128]
layers = {"Mixtral, 2 of 8": (8, 2), "OLMoE, 8 of 64": (64, 8), "Qwen3, 8 of 128": (128, 8)}
torch.manual_seed(0)


def experts_in_use(n_experts, top_k, n_tokens, trials=200):
    """Mean share of experts (%) that some token chose, if tokens choose at random."""
    chosen = torch.rand(trials, n_tokens, n_experts).topk(top_k).indices.flatten(1)
    return 100 * torch.zeros(trials, n_experts).scatter(1, chosen, 1.0).mean().item()


viz.lines(
    {
        name: (batches, [experts_in_use(*sizes, n) for n in batches])
        for name, sizes in layers.items()
    },
    title="Experts of one layer that a batch of tokens needs",
    x="tokens in the batch",
    y="share of the experts (%)",
    log_x=True,
    markers=True,
    alt="With one token the share is k/E. It climbs fast: Mixtral needs nearly all of its "
    "experts from 16 tokens on, OLMoE from 32, Qwen3 from 64.",
)

# %% [markdown]
# 7.9 of 8. For n tokens that choose at random the share is $1 - (1 - k/E)^n$; real routers, less even, need somewhat fewer.
# The next token needs others, and nobody knows which before the layer is reached. So memory holds all. In training
# more so: with a gradient and AdamW's two averages, 16 bytes for every parameter, used or not.

# %%
for name, model in REAL_MOE_MODELS.items():
    total, active = (count_parameters(model, active=only).total for only in (False, True))
    print(
        f"{name:<14} bf16 weights {2 * total / 1e9:>5.0f} GB, not {2 * active / 1e9:>3.0f};"
        f"   in training {16 * total / 1e9:>5,.0f} GB"
    )

# %% [markdown]
# ## 9 Experts in notebook 01's model
#
# The course's `LM` puts `moe_lab.moe.MoE`, the tested twin of your layer, where the FFNs were. Each of its 2 layers has 8
# experts of width 64, top-2: two of them do the work of one FFN of width 128.

# %%
from moe_lab.accounting import count_flops
from moe_lab.presets import DENSE_BASELINE, MOE_BASELINE

print(f"{'':<8}{'total':>9}{'active':>9}{'FLOPs for 64 tokens':>22}")
for name, model in {"dense": DENSE_BASELINE, "MoE": MOE_BASELINE}.items():
    total, active = (count_parameters(model, active=only).total for only in (False, True))
    print(f"{name:<8}{total:>9,}{active:>9,}{count_flops(model, 64).total:>22,}")

# %% [markdown]
# More than twice the parameters; a token pays one per cent more, for the router. **Watch it route** after 1,500 steps of
# training: type a sentence and press Enter; change the layer, and `top_k`. A cell's shade is the router's score, the
# number in a frame the weight.

# %%
from moe_lab.viz.tracing import TraceExplorer

TraceExplorer()

# %% [markdown]
# Equal letters need not go the same way: convolution and attention have mixed in what came before. Try a sum, or
# another script: in layer 2 most digits share an expert, as do most bytes beyond ASCII. With `top_k` = 8 every expert
# works for every token.
#
# ### Train one yourself (*optional*)
#
# An untrained model should know nothing, which is 8 bits per byte:

# %%
from moe_lab.data import load_corpus
from moe_lab.lm import LM
from moe_lab.presets import BASELINE_TRAINING
from moe_lab.train import evaluate, mean_bits, train

corpus = load_corpus()
torch.manual_seed(0)
model = LM(MOE_BASELINE)
print(f"untrained: {mean_bits(evaluate(model, corpus.val, limit=32)):.1f} bits per byte")

# %% [markdown]
# 200 steps, with no loss but the usual one, take some ten seconds. Five seeds gave 2.80 to 2.83 on held-out text; the cell
# allows 2.7 to 2.9. Afterwards, try `TraceExplorer(model, about="200 steps")`.

# %%
history = train(model, corpus.train, BASELINE_TRAINING.but(steps=200))
window = 10
smooth = [
    sum(step.bits_per_byte for step in history[i : i + window]) / window
    for i in range(len(history) - window + 1)
]
trained = mean_bits(evaluate(model, corpus.val))
print("held out, between 2.7 and 2.9 bits per byte:", 2.7 < trained < 2.9)
viz.lines(
    {"training": (range(window, len(history) + 1), smooth)},
    title="The MoE model learns: mean over the last 10 steps",
    x="step",
    y="bits per byte",
    levels={"knows nothing": 8},
    alt="A curve falls steeply from eight bits per byte, then flattens below three.",
)

# %% [markdown]
# Whether it **beats** the dense model takes equal steps and several seeds: notebook 05.
#
# ## What real models do
#
# | model | layer | total → active | source |
# |---|---|---|---|
# | Switch-C (2021) | 1 of 2,048, ReLU | 1,571 B | [Fedus et al.](https://arxiv.org/abs/2101.03961), table 9 |
# | DeepSeek-V3 (2024) | 8 of 256, and 1 shared | 671 B → 37 B | [DeepSeek-AI](https://arxiv.org/abs/2412.19437) |
# | gpt-oss-120b (2025) | 4 of 128 | 117 B → 5.1 B | [OpenAI](https://arxiv.org/abs/2508.10925), table 1 |
#
# ## Recap
#
# - The layer is a weighted sum over each token's k experts.
# - A weight's gradient is the dot product of dy and its expert's output. An expert that nobody chose gets zero.
# - Memory follows the total parameters, FLOPs the active; k/E is about experts alone.

# %%
show_progress("03")

# %% [markdown]
# **Next:** [04 · Dispatch](04_dispatch.ipynb): how do tokens reach their experts and come back, without a loop over everything?
