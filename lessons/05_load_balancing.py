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
#   title: Load balancing
#   minutes: 60
#   seconds: 90
#   hardware: CPU
# ---

# %% [markdown]
# # 05 · Load balancing
#
# **Why does routing collapse, and what does each cure cost?**
#
# `CPU` · 60 minutes · prerequisites: notebooks 01 to 04
#
# At the end **you will have built** what keeps experts busy in real models: MaxVio, the balance loss, the z-loss, the
# loss-free bias, and experts that choose. You will have watched a router collapse, and read what each cure costs.
#
# Most runs here are **recorded**, with three or five seeds; some you repeat, with a seed of your own. Sections marked
# *optional* go past the hour.

# %%
import torch

from moe_lab import balance, bench, viz
from moe_lab.accounting import count_flops, count_parameters
from moe_lab.config import RouterConfig
from moe_lab.course import exercise, show_progress
from moe_lab.data import load_corpus, validation_batch
from moe_lab.experiments import Variant, describe, load_results, measure_routing, run_once
from moe_lab.lm import LM
from moe_lab.presets import BASELINE_TRAINING, MOE_BASELINE
from moe_lab.routing import best_k, route, score
from moe_lab.train import Trainer, train

torch.set_num_threads(1)
corpus = load_corpus()
MY_SEED = 3  # recorded are 0, 1 and 2

# %% [markdown]
# ## Predict first
#
# A router sends every token to one of **16 experts**, and nothing keeps these evenly busy. After 200 steps: **how many
# times its even share does the fullest expert of layer 2 get? And by how many bits per byte is this model worse than one
# whose experts are evenly busy?** Section 2 will tell.

# %%
my_times, my_bits = 2, 0.5

# %% [markdown]
# ## 1 What experts win
#
# Notebook 03 left a question: does the MoE beat notebook 01's dense model? Recorded are 500 steps of each model, five
# seeds. *Frozen*: the router stays as it was drawn, at random.

# %%
wins = load_results("moe_against_dense")
print(describe("moe_against_dense"))
dense, _ = wins.configs("dense, equal active")
for name in wins.variants:
    model_config, _ = wins.configs(name)
    times = count_flops(model_config, 64).total / count_flops(dense, 64).total
    print(
        f"{name:<21}{count_parameters(model_config).total:>8,} parameters, FLOPs × {times:.2f}"
    )

# %% [markdown]
# **Predict** their order.

# %%
viz.bands(
    wins,
    {name: name for name in wins.variants},
    x="model",
    y="bits per byte (lower is better)",
    title="Held-out text after 500 steps: a dot a seed, a line their mean",
    alt="The dense model of equal active size is worst in every seed. The MoE, the MoE with a "
    "frozen router and the top-1 MoE lie close together below it. The dense model of equal "
    "total size is a little lower still.",
)

# %%
base = wins.values("dense, equal active", "mean")
for name in wins.variants[1:]:
    gains = [b - own for b, own in zip(base, wins.values(name, "mean"), strict=True)]
    print(f"{name:<21}{min(gains):.3f} to {max(gains):.3f} bits better, seed by seed")

# %% [markdown]
# At equal FLOPs the MoE wins in every seed. But so does the **frozen** router, by as much: at this size the gain comes
# from more weights, not from what the router learnt. (At scale a fixed hash does well, too:
# [Roller et al. 2021](https://arxiv.org/abs/2106.04426).) All weights at work win a little more, at 2.4 times the FLOPs.
# In seconds?

# %% tags=["nbval-ignore-output"]
names = ("dense, equal active", "MoE", "dense, equal total")
trainers = {
    name: Trainer(LM(wins.configs(name)[0]), corpus.train, BASELINE_TRAINING)
    for name in names
}
timings = bench.compare({name: one.step for name, one in trainers.items()}, rounds=15)
for name in names:  # lower quartiles: steadier
    print(f"{name:<21}a step takes × {timings[name].low / timings[names[0]].low:.1f}")

# %% [markdown]
# Eight small products take longer than a large one. In the same seconds the dense model takes more steps. How many does it
# need to catch up? Recorded, too, are three times the steps:

# %%
longer = load_results("longer_training")
short, long = (results.band("dense, equal active")[1] for results in (wins, longer))
gain = short - wins.band("MoE")[1]
print(f"three times the steps: the dense model wins {short - long:.2f} bits")
print(f"at that pace × {3 ** (gain / (short - long)):.2f} steps win the MoE's {gain:.3f}")

# %% [markdown]
# Hold that against how much longer the MoE's step took: at equal seconds little is left, or nothing. This is a gain at
# equal **FLOPs**.
#
# ### Three times as long (*optional*)
#
# **Predict:** does the frozen router keep up?

# %%
viz.bands(
    longer,
    {name: name for name in longer.variants},
    x="model",
    y="bits per byte (lower is better)",
    title="Held-out text after 1,500 steps",
    alt="The dense model is at 2.32 in every seed. The MoE with a frozen router is at 2.27, the "
    "MoE at 2.26, the MoE with a balance loss at 2.25.",
)

# %%
for name in ("MoE, frozen router", "MoE, switch 0.01"):
    pairs = zip(longer.values(name, "mean"), longer.values("MoE", "mean"), strict=True)
    print(f"{name:<19}against MoE:", *(f"{own - moe:+.3f}" for own, moe in pairs))

# %% [markdown]
# It keeps most of the gain. Learning to route begins to pay, by up to 0.01 bits; so does balance (*switch 0.01*: section 4).
#
# ## 2 Collapse
#
# How uneven is a load? $n_i$ tokens are on expert i, their mean is $\bar n = T k / E$
# ([Wang et al. 2024](https://arxiv.org/abs/2408.15664), equation 4):
#
# $$\text{MaxVio} = \frac{\max_i n_i}{\bar n} - 1$$
#
# ### Exercise 5.1 · MaxVio
#
# ●○○ · 3 minutes · one line · `tokens_per_expert` (E,): counts, int64. Return a number.
#
# <details><summary>Hint 1</summary>
#
# The mean runs over all E experts, empty ones too. torch takes no mean of integers: `.float()` first.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `n.max() / n.mean()` is how many times its even share the fullest has. An even load has to give 0.
#
# </details>


# %%
@exercise("5.1")
def max_violation(tokens_per_expert):
    """How far the fullest expert is above the mean, as a share of the mean."""
    ### BEGIN SOLUTION
    n = tokens_per_expert.float()
    return n.max() / n.mean() - 1
    ### END SOLUTION


# %%
for counts in ([4, 4, 4, 4], [6, 5, 3, 2], [5, 5, 6, 0], [0, 0, 16, 0]):
    print(counts, f"MaxVio {max_violation(torch.tensor(counts)):.2f}")

# %% [markdown]
# 0 is even, E − 1 is everything on one. MaxVio asks about the fullest only, for whom all others wait; the empty expert of
# the third load costs it nothing.
#
# Now a model that collapses:

# %%
cures = load_results("balance")
model_config, training = cures.configs("no cure")
layers, moe = model_config.n_layers, model_config.moe
print(f"{layers} layers, {moe.top_k} of {moe.n_experts} experts of width {moe.d_ff}")
print(
    f"{training.steps} steps; the routers learn {training.router_rate:g} × as fast as the rest"
)

# %% [markdown]
# Ten times as fast, so that 200 steps show what otherwise takes longer. Train it:

# %%
torch.manual_seed(MY_SEED)
model = LM(model_config)
watch = viz.LiveTraining("No cure", n_layers=layers, steps=training.steps)
history = train(model, corpus.train, training.but(seed=MY_SEED), watch)
watch.picture()

# %%
mine = viz.record_of(model_config, history)
viz.draw_load(
    mine,
    layer=1,
    title="No cure: who does the work in layer 2",
    alt="Sixteen experts over 200 steps. At first all are near an even share. Within the "
    "first 30 steps one expert takes most of the tokens and keeps them; most others get "
    "next to nothing until the end.",
)

# %% [markdown]
# Is this your run's bad luck? Lay it over the recorded ones:

# %%
viz.violation_band(
    cures,
    {"no cure, recorded": "no cure"},
    layer=1,
    live=mine,
    title="MaxVio of layer 2, each point over ten steps",
    alt="MaxVio rises from below 4 to around 10 within 30 to 40 steps and stays there, in all "
    "recorded seeds and in the run of now.",
)

# %%
probe = validation_batch(corpus.val, context=64, limit=64)
mine_at_end = measure_routing(model, probe)[1]["max_violation"]
least, _, most = cures.band("no cure", "max_violation", layer=1)
print(f"recorded, on held-out text: MaxVio {least:.1f} to {most:.1f}")
print("mine is no less than half of that:", least / 2 < mine_at_end)

# %% [markdown]
# **Why?** An expert that gets tokens learns from them; one that gets none learns nothing (notebook 03). The chosen becomes
# the better choice **because** it was chosen. Chance starts it: **predict** whether the recorded seeds agree on the winner.

# %%
for run in cures.of("no cure"):
    load = run["curve"][-1]["load"][1]
    print(f"seed {run['seed']}: the fullest of layer 2 is expert {load.index(max(load))}")

# %% [markdown]
# **What does it cost?** Where full experts drop what they cannot take (notebook 04): most of the work. And in loss? *switch
# 0.1* is a model with even experts: section 4.

# %%
for name in ("no cure", "switch 0.1"):
    lost, bits = cures.band(name, "dropped", layer=1), cures.band(name)
    print(
        f"{name}: a capacity of 1.25 would drop {lost[0]:.0%} to {lost[2]:.0%} in layer 2;"
    )
    print(f"  with nothing dropped, {bits[0]:.2f} to {bits[2]:.2f} bits per byte")
print(f"You said {my_times} times and {my_bits} bits.")
print(
    f"Recorded: {least + 1:.0f} to {most + 1:.0f} times, and no difference the seeds could show."
)

# %% [markdown]
# The loss hardly moves, at this size: most experts were not needed. What collapse wastes is memory, time (all wait for
# the fullest), or tokens.
#
# ### And if they are dropped? (*optional*)
#
# Recorded too, with a capacity of 1.25 in both layers:

# %%
drops = load_results("capacity")
viz.bands(
    drops,
    {name: name for name in drops.variants},
    x="model",
    y="bits per byte (lower is better)",
    title="Does collapse cost more when full experts drop tokens?",
    alt="With nothing dropped the collapsed and the balanced model lie together at 2.87. With a "
    "capacity both are worse: the collapsed one at 3.02, the balanced one at 2.98.",
)

# %% [markdown]
# Now collapse costs something, in every seed:

# %%
both = (
    drops.values(f"{name}, capacity 1.25", "mean") for name in ("no cure", "switch 0.1")
)
print("bits per byte:", *(f"{bad - good:+.3f}" for bad, good in zip(*both, strict=True)))
print("In a larger model?", describe("capacity", "moe_100m"))

# %% [markdown]
# (The balanced model pays, too: held-out batches are of one domain each, and what is even over all domains is not even
# over one.)
#
# ## 3 A loss that asks for balance
#
# Five tokens, each with two of four experts. Two questions about each expert: what **share of the choices** did it get, and
# what was its **mean probability**?

# %%
scores = torch.tensor(
    [
        [0.40, 0.30, 0.20, 0.10],
        [0.50, 0.25, 0.15, 0.10],
        [0.30, 0.40, 0.10, 0.20],
        [0.55, 0.15, 0.20, 0.10],
        [0.35, 0.30, 0.15, 0.20],
    ]
)
rule = RouterConfig(d_model=1, n_experts=4, top_k=2)
toy = route(scores.log(), rule)
print("topk_experts", toy.topk_experts.tolist())

# %% [markdown]
# $$f_i = \frac{n_i}{k\,T} \qquad\qquad P_i = \frac1T \sum_t p_{t,i}$$
#
# $p_t$: a token's scores over their sum. **Predict** both for expert 3.
#
# ### Exercise 5.2 · f and P
#
# ●●○ · 7 minutes · four to six lines
#
# Return `f, P`, both (E,). `mask` (T,) is True for tokens that count, False for padding; None: all do. Use
# `routing.topk_experts` (T, K), `.router_scores` (T, E), `.n_experts`.
#
# <details><summary>Hint 1</summary>
#
# With a mask, take only its rows of both tables: `routing.topk_experts[mask]`. Then forget it.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.bincount(ids.flatten(), minlength=E)` counts. There are `ids.numel()` choices.
#
# </details>
# <details><summary>Hint 3</summary>
#
# Sigmoid scores do not sum to one: divide each row by its sum (`keepdim=True`), then take the mean over the tokens.
#
# </details>


# %%
@exercise("5.2")
def shares(routing, mask=None):
    """f and P, (E,) each: the shares of the choices, and the mean probabilities."""
    ### BEGIN SOLUTION
    ids, scores = routing.topk_experts, routing.router_scores
    if mask is not None:
        ids, scores = ids[mask], scores[mask]
    f = torch.bincount(ids.flatten(), minlength=routing.n_experts) / ids.numel()
    return f, (scores / scores.sum(-1, keepdim=True)).mean(0)
    ### END SOLUTION


# %%
viz.draw_shares(
    *shares(toy),
    title="Five tokens, two of four experts each",
    alt="Expert 0 has f 0.50 and P 0.42, expert 1 0.40 and 0.28, expert 2 0.10 and 0.16. "
    "Expert 3 has no choices, and a mean probability of 0.14.",
)

# %% [markdown]
# Nobody chose expert 3, but by its probability it can come back. The **balance loss**
# ([Fedus et al. 2021](https://arxiv.org/abs/2101.03961), equation 4; here with the 1/k):
#
# $$\alpha \cdot E \sum_i f_i\, P_i \qquad \text{in each layer}$$
#
# f counts: a constant. The gradient goes through **P**.
#
# ### Exercise 5.3 · the balance loss
#
# ●●○ · 6 minutes · about five lines
#
# `routings` holds one per layer. Return the sum over layers of $E \sum f_i P_i$, a 0-d tensor, without α.
#
# <details><summary>Hint 1</summary>
#
# Call your `shares` for each layer, with the mask.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `routing.n_experts * (f * P).sum()` is one layer's. Add it to what the layers before gave.
#
# </details>


# %%
@exercise("5.3")
def balance_loss(routings, mask=None):
    """The sum over layers of E · Σ f P."""
    ### BEGIN SOLUTION
    total = torch.zeros(())
    for routing in routings:
        f, mean_probabilities = shares(routing, mask)
        total = total + routing.n_experts * (f * mean_probabilities).sum()
    return total
    ### END SOLUTION


# %% [markdown]
# **Predict** from the bars above: which two experts' logits will training raise?

# %%
logits = scores.log().requires_grad_()
loss = balance_loss([route(logits, rule)])
loss.backward()
print(f"loss {loss.item():.4f}; an even load would give 1")
print("gradient, summed over tokens:", [round(g, 4) for g in logits.grad.sum(0).tolist()])

# %% [markdown]
# Training steps against the gradient: 2 and 3 rise, the two with the least f. A fuller expert is pushed down harder.
#
# **Does a loss of 1 prove balance? Is 1 the least?** Two experts, k = 1. **Predict** both losses.

# %%
near_tie = torch.tensor([[0.501, 0.499]] * 3)
one_moved = torch.tensor([[0.501, 0.499], [0.501, 0.499], [1e-6, 1 - 1e-6]])
for name, p in {"all at (.501, .499)": near_tie, "one of three moved": one_moved}.items():
    one = route(p.log(), RouterConfig(d_model=1, n_experts=2, top_k=1, normalise=False))
    print(
        f"{name:<21}tokens {one.tokens_per_expert.tolist()}, loss {balance_loss([one]):.3f}"
    )

# %% [markdown]
# No, and no. Three tokens of three on one expert give 1.002: P looks even. Two to one gives 0.889, **below** 1. So watch
# the counts, not the loss.
#
# ### What others call this loss (*optional*)
#
# The same two layers, k = 2, in two sequences: five names, five numbers.

# %%
torch.manual_seed(0)
tilted = [
    torch.rand(12, 4) + torch.tensor([1.0, 0.5, 0, 0]).roll(shift) for shift in (0, 2)
]
two_layers = [route(2 * z, rule) for z in tilted]
ours = balance_loss(two_layers).item()
for name, convention in balance.CONVENTIONS.items():
    value = convention.loss(two_layers, 2).item()
    print(f"{name:<20}{value:.3f}, × {value / ours:.2f}   {convention.differs}")

# %% [markdown]
# A mean over layers is a factor: α can be converted. First choices, pooled layers, single sequences are **other
# losses**: pooled, two layers that favour different experts look even.
#
# | code | of L even layers | α = 0.01 of Switch is there |
# |---|---|---|
# | [Switch](https://arxiv.org/abs/2101.03961), [Megatron-LM](https://github.com/NVIDIA/Megatron-LM/blob/main/megatron/core/transformer/moe/moe_utils.py) | L | 0.01 |
# | [GShard](https://arxiv.org/abs/2006.16668), [DeepSpeed](https://github.com/deepspeedai/DeepSpeed/blob/master/deepspeed/moe/sharded_moe.py) (k = 2) | L, of first choices | no factor |
# | [MegaBlocks](https://github.com/databricks/megablocks/blob/main/megablocks/layers/moe.py) | 1 | 0.01 · L |
# | [transformers](https://github.com/huggingface/transformers/blob/main/src/transformers/models/mixtral/modeling_mixtral.py) | k, layers pooled | no factor; with one layer 0.01 / k |
# | [DeepSeek-V3](https://arxiv.org/abs/2412.19437), equations 17 to 20 | L, each sequence by itself | no factor |
#
# ## 4 How much of it?
#
# Choose α (0.0001, 0.001, 0.01, 0.1, 1 or 10), and train with your seed:

# %%
alpha = 0.1
name = f"switch {alpha:g}"
with_loss = run_once(Variant(name, *cures.configs(name)), corpus, MY_SEED)
viz.violation_band(
    cures,
    {"no cure": "no cure", f"α = {alpha:g}": name},
    layer=1,
    live=with_loss,
    title="MaxVio of layer 2, with and without the balance loss",
    alt="Without a cure MaxVio stays near 10. With the loss it rises at first, then falls; "
    "with α of 0.1, below 1.",
)

# %%
mine_now = with_loss["layers"][1]["max_violation"]
low, _, high = cures.band(name, "max_violation", layer=1)
print("mine is within a factor of 3 of the recorded:", low / 3 < mine_now < 3 * high)
low, _, high = cures.band(name)
print("so are my bits per byte, within 0.1:", low - 0.1 < with_loss["mean"] < high + 0.1)

# %% [markdown]
# Now all six, three seeds each. The last measure is **I(domain; expert | byte)**: what the choice tells about the text's
# domain, when the byte itself is known. A router that looks at bytes alone has 0. Counting few tokens gives too much: grey
# is the same with domains shuffled. **Predict** all three curves.

# %%
alphas = {"0": "no cure"} | {
    f"{a:g}": f"switch {a:g}" for a in (1e-4, 1e-3, 0.01, 0.1, 1, 10)
}
LOAD = viz.Panel(measure="max_violation", layer=1, y="MaxVio", log=True)
BITS = viz.Panel(measure="mean", y="bits per byte")
TELLS = viz.Panel(measure="information", layer=1, y="I (bits)", shuffled=True)
viz.sweep(
    cures,
    alphas,
    [LOAD, BITS, TELLS],
    live=with_loss,
    x="α",
    title="What the balance loss buys and costs (load and I of layer 2)",
    alt="MaxVio falls from about 10 without the loss to 1.3 at 0.01, 0.5 at 0.1 and 0.1 from 1 on. "
    "Bits per byte stay level up to 0.1, then rise by about 0.04 at 1 and 0.24 at 10. "
    "Information rises from 0.06 to 0.17 bits at 0.1, and falls to half of that from 1 on.",
)

# %% [markdown]
# Too little: the router stays collapsed, and one expert for all tells little. At 0.01 and 0.1 the load evens out, and the
# choices tell most. From 1 on experts **blur**: they serve everybody alike. And in bits per byte, seed by seed?

# %%
base = cures.values("no cure", "mean")
for a in (0.01, 0.1, 1, 10):
    own = cures.values(f"switch {a:g}", "mean")
    print(f"α = {a:<5g}", *(f"{o - b:+.3f}" for o, b in zip(own, base, strict=True)))

# %% [markdown]
# Up to 0.1 nothing that three seeds could show; at 1 a price in every seed, at 10 a high one. (Layer 1 has no such hump:
# section 10.)
#
# ## 5 The z-loss is no balancer
#
# It keeps logits small ([Zoph et al. 2022](https://arxiv.org/abs/2202.08906), equation 5), for large ones are rounded
# coarsely in bf16:
#
# $$\frac1T \sum_t \Big( \log \sum_i e^{z_{t,i}} \Big)^2$$
#
# ### Exercise 5.4 · the z-loss
#
# ●○○ · 3 minutes · one line · from `routing.router_logits` (T, E) to a 0-d tensor.
#
# <details><summary>Hint 1</summary>
#
# First one number a token, then its square, then the mean.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `logsumexp(-1)` is safe where `exp().sum(-1).log()` overflows.
#
# </details>


# %%
@exercise("5.4")
def z_loss(routing):
    """The mean over tokens of the squared logsumexp of the logits."""
    ### BEGIN SOLUTION
    return routing.router_logits.logsumexp(-1).square().mean()
    ### END SOLUTION


# %% [markdown]
# Add the same number to all logits of a token: **predict** what that does to the choice, to the balance loss, and to the
# z-loss.

# %%
for shift in (0.0, 2.0, -4.0):
    moved = route(scores.log() + shift, rule)
    same = torch.equal(moved.topk_experts, toy.topk_experts)
    values = f"balance {balance_loss([moved]):.3f}, z-loss {z_loss(moved):.3f}"
    print(f"logits {shift:+.0f}: the same choice {same}; {values}")

# %% [markdown]
# It sees what no choice depends on, and not who is chosen. **Predict** MaxVio in training.

# %%
coefficients = {"0": "no cure"} | {f"{c:g}": f"z-loss {c:g}" for c in (1e-3, 0.01, 0.1)}
viz.sweep(
    cures,
    coefficients,
    [
        viz.Panel(measure="mean_logsumexp", layer=1, y="logsumexp"),
        viz.Panel(measure="max_violation", layer=1, y="MaxVio", level=("all on one", 15)),
        BITS,
    ],
    x="coefficient of the z-loss",
    title="The z-loss in training (layer 2)",
    alt="The logsumexp falls from about 30 to nearly 0. MaxVio does not fall with it: it stays "
    "between 7 and 12 at a coefficient of 0.001 and is 15, all on one expert, above that. "
    "Bits per byte rise only a little.",
)

# %% [markdown]
# Logits shrink as promised; the load gets no better. With these fast routers it even ends on **one** expert of 16, and
# that costs a few hundredths of a bit: section 2 again.
#
# ## 6 A bias in place of a loss
#
# **Loss-free**: a bias for each expert takes part in choosing, and moves after each step
# ([Wang et al. 2024](https://arxiv.org/abs/2408.15664), algorithm 1):
#
# $$b_i \leftarrow b_i + \gamma \cdot \operatorname{sign}(\bar n - n_i)$$

# %%
n = toy.tokens_per_expert.float()
print("counts", n.int().tolist(), "mean", n.mean().item())
print("the biases move by γ times", torch.sign(n.mean() - n).int().tolist())

# %% [markdown]
# No loss, no gradient: nothing pulls at the model.
#
# ### Exercise 5.5 · one step of the loss-free bias
#
# ●●○ · 7 minutes · about five lines
#
# From `scores` (T, E) and the bias (E,), return weights (T, K), experts (T, K), and the next bias (E,). Choose with
# `best_k(scores + selection_bias, top_k)`; a weight is its expert's bare score.
#
# <details><summary>Hint 1</summary>
#
# `scores.gather(-1, experts)` reads the weights. What must not be in them?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Counts: `bincount` with `minlength`, as floats. `torch.sign` is 0 for an expert exactly at the mean. Return a new
# tensor, do not change the bias in place.
#
# </details>


# %%
@exercise("5.5")
def biased_step(scores, selection_bias, top_k, rate):
    """Weights (T, K), experts (T, K), and the bias (E,) for the next step."""
    ### BEGIN SOLUTION
    experts = best_k(scores + selection_bias, top_k)
    weights = scores.gather(-1, experts)
    n = torch.bincount(experts.flatten(), minlength=len(selection_bias)).float()
    return weights, experts, selection_bias + rate * torch.sign(n.mean() - n)
    ### END SOLUTION


# %% [markdown]
# (`moe_lab` keeps its halves apart: `route` and `balance.update_bias`.) **Try it** on a router that does not learn: 16
# experts, some liked better, 512 new tokens a step, k = 1. **Predict** which γ ends best.


# %%
def settle(rate, kind="softmax", size=1.0, steps=250):
    """MaxVio step by step, while the bias moves and the router stays as it is."""
    torch.manual_seed(0)
    bias, liked, found = torch.zeros(16), torch.linspace(1.5, -1.5, 16), []
    for _ in range(steps):
        scores = score(size * (torch.randn(512, 16) + liked), kind)
        _, experts, bias = biased_step(scores, bias, 1, rate)
        found.append(float(max_violation(torch.bincount(experts.flatten(), minlength=16))))
    return found


rates = (1e-4, 1e-3, 1e-2, 1e-1)
runs = {rate: torch.tensor(settle(rate)).view(-1, 10).mean(1) for rate in rates}

# %%
viz.lines(
    {f"γ = {rate:g}": (range(10, 251, 10), found) for rate, found in runs.items()},
    title="The bias on a router that stays as it is (softmax scores)",
    x="step",
    y="MaxVio, mean of 10 steps",
    alt="With a step of 0.0001 MaxVio stays above 3. With 0.001 it falls slowly, to about a "
    "quarter. With 0.01 it falls within 30 steps and stays below 1. With 0.1 it swings around 3.",
)

# %% [markdown]
# Too small a γ does not arrive, too large a γ jumps over the goal, again and again. γ is a step **in units of the scores**.
# What if the logits are 8 times as large, as a fast router's become?

# %%
ends = {
    f"{kind}, logits × {size}": [sum(settle(rate, kind, size)[-50:]) / 50 for rate in rates]
    for kind in ("softmax", "sigmoid")
    for size in (1, 8)
}
viz.lines(
    {name: (range(4), values) for name, values in ends.items()},
    title="Where the bias ends: mean MaxVio of the last 50 steps",
    x="γ",
    y="MaxVio",
    ticks=[f"{rate:g}" for rate in rates],
    markers=True,
    alt="With logits of ordinary size both scores reach a MaxVio below a half at 0.001, and do "
    "worse at 0.1. With logits eight times as large softmax stays above 3 at every γ, and gets "
    "worse with it; sigmoid stays around 2 to 3.",
)

# %%
print("ordinary logits, best γ below 0.5:", min(ends["softmax, logits × 1"]) < 0.5)
print("large logits, softmax, no γ below 2:", min(ends["softmax, logits × 8"]) > 2)

# %% [markdown]
# Large logits make softmax scores of nearly 0 and 1. A bias below that gap moves nobody, one above it **everybody at
# once**. Now recorded trainings, first with routers as fast as the rest:

# %%
slow = load_results("slow_router")
by_rate = {
    f"{kind} {rate or 0:g}": f"{kind} bias {rate:g}" if rate else none
    for kind, none in (("softmax", "no cure"), ("sigmoid", "sigmoid, no cure"))
    for rate in (None, *rates)
}
viz.sweep(
    slow,
    by_rate,
    [LOAD, BITS],
    x="scores, and γ of the bias (0: no cure)",
    title="The loss-free bias, routers as fast as the rest (layer 2)",
    alt="Without a cure MaxVio of layer 2 is about 4, with softmax and with sigmoid scores. With "
    "both it hardly falls at a step of 0.0001, is 1 or less on average at 0.001 and 0.01, and rises "
    "again at 0.1. Bits per byte are worse at 0.1, and otherwise differ no more than the seeds do.",
)

# %%
viz.sweep(
    cures,
    by_rate,
    [LOAD, BITS],
    x="scores, and γ of the bias (0: no cure)",
    title="The same, routers ten times as fast",
    alt="With softmax scores no step brings MaxVio of layer 2 below 4, and steps of 0.01 and 0.1 "
    "leave it above 10 and cost about 0.1 bits per byte. With sigmoid scores 0.01 is best, "
    "between 2 and 6, and costs 0.05 bits per byte.",
)

# %% [markdown]
# At ordinary speed the bias works with both scores, at the γ that the simulation found: 0.001 and 0.01. With fast routers it
# fails with softmax, and with sigmoid only 0.01 helps. Its bill in bits, seed by seed:

# %%
for speed, results in {"as fast as the rest": slow, "ten times as fast": cures}.items():
    for kind, none in {"softmax": "no cure", "sigmoid": "sigmoid, no cure"}.items():
        with_bias, without = (
            results.values(v, "mean") for v in (f"{kind} bias 0.01", none)
        )
        paid = (f"{w - o:+.3f}" for w, o in zip(with_bias, without, strict=True))
        print(f"routers {speed:<21}{kind}, γ = 0.01:", *paid)

# %% [markdown]
# The name says loss-free, not free: where the bias has to fight, the model pays.
#
# ## 7 Balanced over what? (*optional*)
#
# Balanced over **each sequence** ([DeepSeek-V3](https://arxiv.org/abs/2412.19437), equations 17 to 20), a page of Python has
# to visit all experts. A **micro-batch**, here of two sequences, is nearly as strict. **Global-batch** takes the counts of
# all ([Qiu et al. 2025](https://arxiv.org/abs/2501.11873)). **Predict** the order of I.

# %%
over = {
    "batch": "switch",
    "global": "global batch",
    "micro": "micro-batch",
    "sequence": "sequence",
}
viz.sweep(
    cures,
    {f"{name} {a:g}": f"{loss} {a:g}" for a in (0.1, 1) for name, loss in over.items()},
    [viz.Panel(measure="max_violation", layer=1, y="MaxVio"), BITS, TELLS],
    x="balanced over the …, and α",
    title="The fewer tokens have to be balanced, the dearer (layer 2)",
    alt="At equal α all four balance about alike. Bits per byte rise from the whole batch and the "
    "global batch over micro-batches to sequences, slightly at 0.1 and by about 0.14 at 1. "
    "Information at 0.1 falls in the same order, from 0.16 to 0.1.",
)

# %% [markdown]
# Global-batch is the batch's loss again, as it should be. The stricter the demand, the more it costs, and the less the
# choices tell at 0.1. Seed by seed, a sequence against the batch:

# %%
for a in (0.1, 1):
    pairs = zip(
        cures.values(f"sequence {a:g}", "mean"),
        cures.values(f"switch {a:g}", "mean"),
        strict=True,
    )
    print(f"α = {a:<4g}", *(f"{own - batch:+.3f}" for own, batch in pairs), "bits per byte")

# %% [markdown]
# Qiu et al. report the same at up to 42.8 B parameters.
#
# ## 8 Experts that choose
#
# Each expert takes the C = T·k / E tokens that score it highest
# ([Zhou et al. 2022](https://arxiv.org/abs/2202.09368), section 3.2).
#
# ### Exercise 5.6 · experts that choose
#
# ●●○ · 5 minutes · two or three lines
#
# Return (T, E) bool: True where the expert takes the token. Each takes `capacity`, of equal scores the earliest.
#
# <details><summary>Hint 1</summary>
#
# Sort every column: `argsort(dim=0, descending=True, stable=True)` lists each expert's tokens, best first.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Keep the first `capacity` rows, and write True there into zeros: `scatter(0, tokens, True)`.
#
# </details>


# %%
@exercise("5.6")
def expert_choice_mask(router_scores, capacity):
    """(T, E) bool: which expert takes which token, each its `capacity` best."""
    ### BEGIN SOLUTION
    tokens = router_scores.argsort(dim=0, descending=True, stable=True)[:capacity]
    return torch.zeros_like(router_scores, dtype=torch.bool).scatter(0, tokens, True)
    ### END SOLUTION


# %%
torch.manual_seed(0)
some = (3 * torch.rand(24, 8)).softmax(-1)
mask = expert_choice_mask(some, capacity=6)  # T = 24, k = 2, E = 8
print("tokens per expert:", mask.sum(0).tolist())
print("experts per token:", mask.sum(1).tolist())

# %% [markdown]
# Even to the last token, with no loss and no bias. Tokens get unequal numbers; some may get none. Now the catch. A
# language model must not see what comes later. Overwrite every text from byte 32 on with spaces: **predict** how many
# predictions **before** 32 change, when tokens choose, and when experts do.

# %%
text = validation_batch(corpus.val, context=64, limit=4).inputs  # 16 sequences
edited = text.clone()
edited[:, 32:] = ord(" ")
changed = {}
for name, choice in {"token choice": False, "expert choice": True}.items():
    torch.manual_seed(0)
    lm = LM(MOE_BASELINE.but(moe=MOE_BASELINE.moe.but(expert_choice=choice))).eval()
    with torch.no_grad():
        gap = (lm(text)[0] - lm(edited)[0]).abs().amax(-1)  # (B, S)
    changed[name] = 100 * (gap > 1e-5).float().mean(0)

# %%
viz.heatmap(
    torch.stack(list(changed.values())),
    title="Whose predictions change when bytes from 32 on are edited?",
    x="position",
    y="",
    rows=list(changed),
    colour="of 16 texts (%)",
    alt="Two rows of 64 positions. With token choice nothing changes before position 32, and "
    "everything from there on. With expert choice most of the earlier positions change as well.",
)

# %%
early = {name: percent[:32].mean() for name, percent in changed.items()}
print(
    "token choice, earlier predictions that change: none:", bool(early["token choice"] == 0)
)
print("expert choice: more than half:", bool(early["expert choice"] > 50))

# %% [markdown]
# A seat that a later token takes is lost to an earlier one. Writing byte by byte there is no later token; the authors name
# this (section 6). [Mixture-of-Depths](https://arxiv.org/abs/2404.02258) trains a predictor to stand in. And is it
# worth it here?

# %%
for name in ("no cure", "switch 0.1", "expert choice"):
    runs = cures.of(name)
    end = sum(run["curve"][-1]["bits_per_byte"] for run in runs) / len(runs)
    print(f"{name:<14}training {end:.2f}, held out {cures.band(name)[1]:.2f} bits per byte")

# %% [markdown]
# Not here. And held-out batches are of one domain each, training's are mixed: what an expert takes depends on the
# **company**.
#
# ## 9 Does routing settle? (*optional*)
#
# **Churn**: the share of tokens whose experts change within 25 steps. It falls during training. Has the router made up its
# mind, or is it the learning rate? **Predict** the second curve.

# %%
settling = load_results("churn")
viz.curve_band(
    settling,
    {"cosine to zero": "cosine to zero", "constant rate": "constant"},
    key="churn",
    layer=1,
    x="step",
    y="churn (share of tokens)",
    title="Who changes experts within 25 steps (layer 2)?",
    alt="Both curves fall together from about 0.6 at step 50 to a third at step 150. From there "
    "on the cosine's falls to nearly 0, and the constant rate's stays near 0.3.",
)

# %%
for name in settling.variants:
    last = [run["curve"][-1]["churn"][1] for run in settling.of(name)]
    print(f"{name:<15}at the end {min(last):.1%} to {max(last):.1%} of the tokens")

# %% [markdown]
# Up to step 200 both settle alike. Then one goes on moving a quarter of the tokens, and under the cosine nobody moves: much
# of that calm is the learning rate.
#
# ## 10 All cures, and their bills
#
# **Choose** a cure, its strength, and a layer: load over the steps, and how the run ended. Look for the cheapest with
# MaxVio below 1 in layer 2.

# %%
viz.CureExplorer(cures)

# %%
even = [v for v in cures.variants if cures.band(v, "max_violation", layer=1)[2] < 1]
for name in sorted(even, key=lambda name: cures.band(name)[1])[:5]:
    print(f"{name:<17}{cures.band(name)[1]:.3f} bits per byte")
print(f"{'no cure':<17}{cures.band('no cure')[1]:.3f}")

# %% [markdown]
# For routers this fast, losses.
#
# ### What it costs
#
# | cure | parameters | FLOPs | what else |
# |---|---|---|---|
# | balance loss | none | E · T | pulls at the model; an α to find |
# | global-batch | none | E · T | E counts a layer between all ranks, before the backward pass |
# | z-loss | none | E · T | balances nothing |
# | bias | E a layer, not trained | E · T | E counts a layer between ranks, once a step; a γ to find |
# | expert choice | none | a sort of T for each expert | the future, and the batch |
# | a capacity | none | fewer | tokens |
#
# ## What real models do
#
# | model | cure | source |
# |---|---|---|
# | Shazeer 2017 | losses on the spread of weights and of loads; noise | [paper](https://arxiv.org/abs/1701.06538), section 4 |
# | Switch 2021 | balance loss, α = 0.01, found among 0.1 to 0.00001 | [paper](https://arxiv.org/abs/2101.03961), section 2.2 |
# | ST-MoE 2022 | balance loss 0.01, z-loss 0.001 | [paper](https://arxiv.org/abs/2202.08906) |
# | OLMoE 2024 | balance loss 0.01, z-loss 0.001 | [paper](https://arxiv.org/abs/2409.02060) |
# | DeepSeek-V2 2024 | three losses: experts, devices, communication | [paper](https://arxiv.org/abs/2405.04434), section 2.2.3 |
# | DeepSeek-V3 2024 | bias, γ = 0.001 for 14.3 T tokens, then 0; sequence-wise, α = 0.0001 | [paper](https://arxiv.org/abs/2412.19437), section 4.2 |
# | Qwen3 2025 | global-batch balance loss | [report](https://arxiv.org/abs/2505.09388), section 2 |
#
# ## Recap
#
# - Chosen experts learn, and are chosen again: routing collapses. Counts show it, the loss hardly does.
# - f counts, P carries the gradient. A balance loss near 1 proves nothing.
# - Every cure can be too weak or too strong.
# - Experts that choose are even, and see the future.

# %%
show_progress("05")

# %% [markdown]
# **Next:** 06 · Shared experts: why cut experts finer, and keep some always on?
