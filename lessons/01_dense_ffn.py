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
#   title: The dense FFN
#   minutes: 60
#   seconds: 110
#   hardware: CPU
# ---

# %% [markdown]
# # 01 · The dense FFN
#
# **Where do a transformer's parameters and FLOPs sit?**
#
# `CPU` · 60 minutes · prerequisites: notebook 00; PyTorch tensors and modules
#
# At the end **you will have built** both kinds of feed-forward network by hand, counted two real models to the last
# parameter, and trained the dense language model that every later notebook has to beat. And you will have seen why
# people wanted to compute only a part of it.
#
# Sections marked *optional* go past the hour: run their cells, and read them another time.

# %%
import math
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from moe_lab import viz
from moe_lab.course import exercise, show_progress
from moe_lab.data import decode, encode, load_corpus
from moe_lab.lm import LM, generate, watch_hidden
from moe_lab.presets import BASELINE_TRAINING, DENSE_BASELINE

torch.set_num_threads(1)  # models this small are fastest on one thread

# %% [markdown]
# ## Predict first
#
# Llama-7B is 32 blocks of attention and feed-forward network (FFN), between an embedding table and an output head.
# **What share of its parameters sits in the FFNs?** Put your guess into the next cell. Section 5 will tell.

# %%
my_guess = 50  # per cent

# %% [markdown]
# ## 1 Primer: a token's way through a decoder (*optional*)
#
# If you know transformers, run these cells and go to section 2. Each token owns a row of numbers, the **residual
# stream**. Every part reads it and adds something to it.

# %%
viz.draw_block()

# %% [markdown]
# **Tokens.** Our models read bytes: 256 possible tokens, no tokenizer.

# %%
text = "the router"
tokens = encode(text)
names = viz.letters(text)  # for the figures, where a space must be seen
tokens

# %% [markdown]
# **Embedding.** Each token picks its row of a table of 256 rows, D numbers wide. This model is new: all its numbers
# are still random.

# %%
torch.manual_seed(0)
model = LM(DENSE_BASELINE.but(conv_width=0))  # section 8 tells what conv_width is
x = model.embedding(tokens[None])  # (B, S, D): one sequence, ten tokens, 64 numbers each
x.shape

# %%
viz.heatmap(
    x[0, :, :24].detach(),
    title="What the embedding gives: one row per token",
    x="first 24 of 64 dimensions",
    y="token",
    rows=names,
    colour="value",
    signed=True,
    alt="Ten rows, one per token of 'the router', of random positive and negative "
    "values. Rows of equal letters are equal.",
)

# %% [markdown]
# **Norm.** Before each part, a token's numbers are divided by their root mean square, then scaled by learned weights
# (RMSNorm, [Zhang and Sennrich 2019](https://arxiv.org/abs/1910.07467)):
#
# $$\text{norm}(x)_i = g_i\, \frac{x_i}{\sqrt{\frac{1}{D}\sum_j x_j^2 + \epsilon}}$$

# %%
block = model.blocks[0]
normed = block.attention_norm(x)
sizes = {
    name: v[0].pow(2).mean(-1).sqrt().tolist()
    for name, v in {"before": x, "after": normed}.items()
}
viz.lines(
    {name: (range(len(text)), values) for name, values in sizes.items()},
    title="The norm gives every token the same size",
    x="token",
    y="root mean square",
    joined=False,
    ticks=names,
    alt="Before the norm the tokens' sizes differ around 1; after it all are exactly 1.",
)

# %% [markdown]
# **Attention.** Each token asks (a query) which tokens up to itself matter (their keys), and takes a weighted mean of
# what they offer (their values). Several heads do so side by side; a fourth matrix, the output, mixes what they found.
# RoPE ([Su et al. 2021](https://arxiv.org/abs/2104.09864)) turns queries and keys by their position. One head's weights:

# %%
from moe_lab.attention import rotary_angles, rotate

attention, length = block.attention, len(tokens)
heads, d_head = attention.n_heads, attention.d_head
q, k = (w(normed)[0].view(length, heads, d_head) for w in (attention.w_q, attention.w_k))
angles = rotary_angles(length, d_head, attention.rope_theta)
q, k = rotate(q.transpose(0, 1), angles), rotate(k.transpose(0, 1), angles)
scores = q @ k.transpose(1, 2) / math.sqrt(d_head)  # (heads, S, S)
future = torch.ones(length, length).triu(1).bool()
weights = scores.masked_fill(future, -math.inf).softmax(-1)

viz.heatmap(
    weights[0].detach(),
    title="Head 0: who listens to whom",
    x="token that is listened to",
    y="token that listens",
    rows=names,
    columns=names,
    colour="weight",
    alt="A lower triangle: every token gives weights only to itself and to tokens "
    "before it; each row sums to one.",
)

# %% [markdown]
# **FFN.** It works on every token alone: out to F neurons, a nonlinearity, back to D numbers. This is the part that
# an MoE replaces, and the subject of this notebook.

# %%
after_attention = x + block.attention(normed)
hidden = block.ffn.hidden(block.ffn_norm(after_attention))  # (B, S, F)
viz.heatmap(
    hidden[0, :, :48].detach(),
    title="Inside the FFN: neurons of each token",
    x="first 48 of 128 neurons",
    y="token",
    rows=names,
    colour="activation",
    signed=True,
    alt="Ten rows of small positive and negative activations, one row per token; no "
    "neuron is exactly zero.",
)

# %% [markdown]
# **The block** is two lines: each part reads a normalised copy, and what it finds is added back.

# %%
after_ffn = after_attention + block.ffn(block.ffn_norm(after_attention))
y, _ = block(x)  # the second result is for blocks with experts
torch.allclose(after_ffn, y, atol=1e-6)

# %% [markdown]
# **Head.** After the last block, one more norm and one matrix turn D numbers into 256 scores: softmax makes them a
# distribution over the next byte. An untrained model should know nothing, which is 8 bits of surprise.

# %%
logits, _ = model(tokens[None])
log_probabilities = logits[0, -1].log_softmax(-1)
bits = -log_probabilities.mean() / math.log(2)
print(f"mean surprise over all possible next bytes: {bits:.1f} bits")

# %% [markdown]
# ## 2 The MLP: two matrices
#
# One token, two numbers, three neurons: small enough to follow with a pencil. **Predict** the two numbers of `y`
# before you run it.

# %%
x_toy = torch.tensor([[1.0, -1.0]])  # one token, D = 2
w_up = torch.tensor(
    [[2.0, 1.0], [1.0, 2.0], [-1.0, -3.0]]
)  # (F, D): three neurons read two numbers
w_down = torch.tensor([[1.0, 1.0, -1.0], [0.0, 1.0, 2.0]])  # (D, F): and write two

before = x_toy @ w_up.T
neurons = F.relu(before)
print("x W_up^T  ", before.tolist())
print("relu      ", neurons.tolist())
print("y         ", (neurons @ w_down.T).tolist())

# %% [markdown]
# In a formula, after [Vaswani et al. 2017](https://arxiv.org/abs/1706.03762), equation 2, without the biases that
# current models leave out:
#
# $$\text{MLP}(x) = \text{relu}(x\, W_\text{up}^\top)\, W_\text{down}^\top$$
#
# The shapes are those of `nn.Linear`: $W_\text{up}$ is (F, D), $W_\text{down}$ is (D, F).
#
# ### Exercise 1.1 · the two-matrix MLP
#
# ●○○ · 4 minutes · one line
#
# <details><summary>Hint 1</summary>
#
# Start from the toy case: it holds both products. Leading dimensions (batch, sequence) need no special care with `@`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `F.relu(...)` goes around the first product only.
#
# </details>


# %%
@exercise("1.1")
def mlp(x, w_up, w_down):
    """(..., D) to (..., D) with ReLU on F neurons; w_up is (F, D), w_down is (D, F)."""
    ### BEGIN SOLUTION
    return F.relu(x @ w_up.T) @ w_down.T
    ### END SOLUTION


# %% [markdown]
# **Check it against torch**, output and gradients: the same weights in an `nn.Sequential`.

# %%
up, down = torch.nn.Linear(6, 10, bias=False), torch.nn.Linear(10, 6, bias=False)
theirs = torch.nn.Sequential(up, torch.nn.ReLU(), down)
mine = [
    up.weight.detach().clone().requires_grad_(),
    down.weight.detach().clone().requires_grad_(),
]
inputs = torch.randn(4, 6)

y_mine, y_theirs = mlp(inputs, *mine), theirs(inputs)
y_mine.square().sum().backward()
y_theirs.square().sum().backward()
print("outputs equal:  ", torch.allclose(y_mine, y_theirs, atol=1e-6))
print("gradients equal:", torch.allclose(mine[0].grad, up.weight.grad, atol=1e-5))

# %% [markdown]
# ## 3 SwiGLU: a gate on every neuron
#
# Llama and its many relatives use three matrices. One of them makes a **gate**: a factor for every neuron, near zero
# where its input is negative, and about as large as its input where that is positive.

# %%
viz.draw_ffns()

# %% [markdown]
# From [Shazeer 2020](https://arxiv.org/abs/2002.05202), equation 6, with $\text{silu}(z) = z\,\sigma(z)$ and ⊙ the
# product neuron by neuron:
#
# $$\text{SwiGLU}(x) = \big(\text{silu}(x\, W_\text{gate}^\top) \odot x\, W_\text{up}^\top\big)\, W_\text{down}^\top$$
#
# ### Exercise 1.2 · SwiGLU
#
# ●○○ · 5 minutes · one to three lines
#
# <details><summary>Hint 1</summary>
#
# Follow the picture from left to right: two products with `x`, one of them through `F.silu`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Multiply the two branches with `*`, then apply `w_down` as in the MLP.
#
# </details>


# %%
@exercise("1.2")
def swiglu(x, w_gate, w_up, w_down):
    """(..., D) to (..., D); w_gate and w_up are (F, D), w_down is (D, F)."""
    ### BEGIN SOLUTION
    gate = F.silu(x @ w_gate.T)
    return (gate * (x @ w_up.T)) @ w_down.T
    ### END SOLUTION


# %% [markdown]
# **Check it inside the model**: the FFN of the block that you took apart above is a SwiGLU.

# %%
inputs = torch.randn(5, 64)
y = swiglu(inputs, block.ffn.w_gate.weight, block.ffn.w_up.weight, block.ffn.w_down.weight)
torch.allclose(y, block.ffn(inputs), atol=1e-5)

# %% [markdown]
# ## 4 Where odd widths come from
#
# An MLP of width 4 D has $2 \cdot 4D^2 = 8D^2$ parameters. Three matrices cost the same when each is two thirds as
# wide:
#
# $$3 \cdot D \cdot \tfrac{8}{3} D = 8 D^2$$
#
# For Llama-7B, with D = 4096, that makes the number below. But its FFN is 11,008 wide.

# %%
8 / 3 * 4096

# %% [markdown]
# [Meta's code](https://github.com/meta-llama/llama3/blob/main/llama/model.py) takes two thirds of 4 D, cut to an
# integer; multiplies by a factor, cut again; and rounds **up** to a multiple that suits the hardware.
#
# ### Exercise 1.3 · where 11,008 comes from
#
# ●○○ · 5 minutes · two to three lines
#
# <details><summary>Hint 1</summary>
#
# `int(...)` cuts to an integer: `int(8 * d_model / 3)`, then `int(multiplier * ...)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Rounding n up to a multiple of m: `math.ceil(n / m) * m`.
#
# </details>


# %%
@exercise("1.3")
def ffn_width(d_model, multiple_of, multiplier=1.0):
    """LLaMA's d_ff: two thirds of 4 D, times a multiplier, rounded up to a multiple."""
    ### BEGIN SOLUTION
    width = int(multiplier * int(8 * d_model / 3))
    return math.ceil(width / multiple_of) * multiple_of
    ### END SOLUTION


# %%
for name, rule in {
    "Llama-7B": (4096, 256),
    "Llama-13B": (5120, 256),
    "Llama 3 8B": (4096, 1024, 1.3),
    "Llama 3 70B": (8192, 4096, 1.3),
    "Llama 3.1 405B": (16_384, 4096, 1.2),
}.items():
    print(f"{name:<15} d_model {rule[0]:>6,}   d_ff {ffn_width(*rule):>6,}")

# %% [markdown]
# ## 5 Where the parameters sit
#
# | part | learned numbers |
# |---|---|
# | embedding; head | V · D each |
# | attention, per layer | query and output: D · n_heads · d_head each; key and value: D · n_kv_heads · d_head each |
# | SwiGLU, per layer | 3 · D · F |
# | norms | D each: two per layer, one at the end |
#
# Llama 3 70B has 64 heads of queries, but groups of eight share one head of keys and values (GQA,
# [Ainslie et al. 2023](https://arxiv.org/abs/2305.13245)). Its sizes:

# %%
from moe_lab.accounting import Parameters
from moe_lab.presets import REAL_MODELS

sizes = ["d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff", "vocab_size"]
for name in [*sizes, "tied_embeddings"]:
    print(f"{name:<16}{getattr(REAL_MODELS['Llama 3 70B'], name)}")

# %% [markdown]
# ### Exercise 1.4 · every parameter of a Llama
#
# ●●○ · 8 minutes · about eight lines
#
# Return `Parameters(embedding=…, attention=…, ffn=…, norms=…, head=…)`, each summed over all layers. The sizes are
# `config.d_model`, `config.n_kv_heads` and so on, named as above. (`Parameters` has more parts, for later; they stay 0.)
#
# <details><summary>Hint 1</summary>
#
# One layer's attention: D · d_head · (2 n_heads + 2 n_kv_heads).
#
# </details>
# <details><summary>Hint 2</summary>
#
# These models do not tie embedding and head: count V · D twice. Norms: (2 n_layers + 1) · D.
#
# </details>


# %%
@exercise("1.4")
def count_parameters(config):
    """The learned numbers of a Llama, part by part."""
    ### BEGIN SOLUTION
    d, layers = config.d_model, config.n_layers
    return Parameters(
        embedding=config.vocab_size * d,
        attention=layers * 2 * d * config.d_head * (config.n_heads + config.n_kv_heads),
        ffn=layers * 3 * d * config.d_ff,
        norms=(2 * layers + 1) * d,
        head=config.vocab_size * d,
    )
    ### END SOLUTION


# %% [markdown]
# **Check it against the real thing.** On torch's `meta` device a model has shapes but no numbers, so that 70 billion
# parameters fit everywhere.

# %%
for name, config in REAL_MODELS.items():
    with torch.device("meta"):
        real = LM(config)
    there = sum(weight.numel() for weight in real.parameters())
    print(
        f"{name:<12} counted {count_parameters(config).total:>14,}   in the model {there:,}"
    )

# %%
viz.stacked(
    {name: count_parameters(config).by_part() for name, config in REAL_MODELS.items()},
    title="Most parameters sit in the FFNs",
    alt="Two bars. Llama-7B: attention 32 per cent, FFN 64. Llama 3 70B: attention 17, "
    "FFN 80. Tables take the rest.",
)

# %%
share = count_parameters(REAL_MODELS["Llama-7B"]).share("ffn")
print(f"You said {my_guess} %. It is {share:.1%}.")

# %% [markdown]
# ## 6 Where the FLOPs sit
#
# A matrix costs two FLOPs per parameter and token: one multiplication, one addition. The embedding is a look-up and
# costs none; norms, softmax and activations are left out, as is usual. Attention also compares tokens, without any
# parameters.

# %%
from moe_lab.accounting import Flops

d_head = 128
print(f"a pair, one head: query · key {2 * d_head} + weight · value {2 * d_head} FLOPs")

# %% [markdown]
# ### Exercise 1.5 · every FLOP of a forward pass
#
# ●●○ · 8 minutes · about eight lines
#
# Return `Flops(attention_projections=…, attention_scores=…, ffn=…, head=…)` for the whole sequence and all layers. A
# token is compared with itself and all before it, in each of the `n_heads` heads.
#
# <details><summary>Hint 1</summary>
#
# Three of the four are 2 · tokens · parameters, and `count_parameters(config)` knows the parameters.
#
# </details>
# <details><summary>Hint 2</summary>
#
# S tokens make S (S + 1) / 2 pairs. Each pair costs 4 · d_head FLOPs, per head and layer.
#
# </details>


# %%
@exercise("1.5")
def count_flops(config, tokens):
    """FLOPs of a forward pass over one sequence, part by part, causal attention."""
    ### BEGIN SOLUTION
    parameters = count_parameters(config)
    pairs = tokens * (tokens + 1) // 2
    return Flops(
        attention_projections=2 * tokens * parameters.attention,
        attention_scores=4 * pairs * config.d_head * config.n_heads * config.n_layers,
        ffn=2 * tokens * parameters.ffn,
        head=2 * tokens * parameters.head,
    )
    ### END SOLUTION


# %% [markdown]
# **Check it against torch's own counter.** It sees every pair being computed and only then masked, so it should find
# more in the scores, and the same everywhere else.

# %%
S, llama = 512, REAL_MODELS["Llama-7B"]
with torch.device("meta"):
    real, ids = LM(llama), torch.zeros(1, S, dtype=torch.long)
with FlopCounterMode(display=False) as counter, torch.no_grad():
    real(ids)
mine = count_flops(llama, S)
masked = 4 * (S * S - S * (S + 1) // 2) * llama.d_model * llama.n_layers
print(
    f"torch {counter.get_total_flops():,}   counted + masked pairs {mine.total + masked:,}"
)

# %% [markdown]
# **Predict:** the scores grow with the square of the context. From which length on does attention cost Llama-7B more
# than its FFNs?

# %%
lengths = [2**n for n in range(9, 18)]
parts = [count_flops(llama, length) for length in lengths]
attention = [
    100 * (p.share("attention_projections") + p.share("attention_scores")) for p in parts
]
viz.lines(
    {
        "FFN": (lengths, [100 * p.share("ffn") for p in parts]),
        "attention": (lengths, attention),
    },
    title="Llama-7B: who does the work?",
    x="context (tokens)",
    y="share of FLOPs (%)",
    log_x=True,
    markers=True,
    alt="The FFN's share falls from about 65 per cent at 512 tokens and meets "
    "attention's between 16,000 and 17,000.",
)

# %% [markdown]
# The exact answer:


# %%
def attention_leads(tokens):
    """Whether attention, projections and scores, costs Llama-7B more than its FFNs."""
    flops = count_flops(llama, tokens)
    return flops.attention_projections + flops.attention_scores > flops.ffn


print(f"from {next(n for n in range(1, 10**6) if attention_leads(n)):,} tokens on")

# %% [markdown]
# **Move the sliders** (here with a context of 4,096 tokens): double `d_ff`; double `d_model`; halve the layers. Two of
# them change the FFN's share of the parameters, one hardly does. Which?

# %%
from moe_lab.viz.explorer import SizeExplorer

SizeExplorer()

# %% [markdown]
# Both widths move the shares, in opposite directions. Layers scale everything but the two tables:

# %%
llama_sizes = {"d_model": 4096, "d_ff": 11_008, "n_layers": 32}
for change in ({}, {"d_ff": 22_016}, {"d_model": 8192}, {"n_layers": 16}):
    share = count_parameters(SizeExplorer.config(**llama_sizes | change)).share("ffn")
    print(f"{share:.0%} of the parameters in the FFN, with {change or 'nothing changed'}")

# %% [markdown]
# ## 7 What doubling d_ff costs (*optional*)
#
# Parameters and FLOPs double by the formula. Time and memory have to be measured. Memory here means what the forward
# pass keeps for the backward pass. **Predict** both factors.

# %%
from moe_lab.ffn import SwiGLU

batch = torch.randn(512, 256, requires_grad=True)
narrow, wide = SwiGLU(256, 1024), SwiGLU(256, 2048)


def kept_bytes(ffn):
    """Bytes that a forward pass keeps for the backward pass, weights not counted."""
    kept, own = {}, {weight.data_ptr() for weight in ffn.parameters()}
    # torch calls the first function with every tensor that it keeps, the second to take it out
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.setdefault(t.data_ptr(), t), t)[1], lambda t: t
    ):
        ffn(batch)
    return sum(tensor.nbytes for pointer, tensor in kept.items() if pointer not in own)


memory = kept_bytes(wide) / kept_bytes(narrow)
print(f"memory kept: x {memory:.2f}")


# %%
def seconds(ffn):
    """Seconds of one forward and backward pass."""
    start = time.perf_counter()
    ffn(batch).sum().backward()
    return time.perf_counter() - start


rounds = [
    (seconds(narrow), seconds(wide)) for _ in range(15)
]  # taken in turns: noise meets both
times = [sorted(column)[len(column) // 2] for column in zip(*rounds, strict=True)]
viz.bars(
    {"parameters": 2, "FLOPs": 2, "memory kept": memory, "time here": times[1] / times[0]},
    title="Twice the d_ff: what grows, and by how much",
    y="factor",
    alt="Four bars near two: parameters and FLOPs exactly two, memory a little below, "
    "and the time measured here.",
    level=("twice", 2),
)

# %% [markdown]
# Memory stays a little below two: the input is kept once, whatever the width. Time is up to the machine. Either way,
# whoever widens a dense FFN pays in everything, for every token.
#
# ## 8 The model to beat
#
# Time to train, on four kinds of text: English prose, Python, arithmetic, and 22 languages.

# %%
corpus = load_corpus()
for domain, held_out in corpus.val.items():
    sample = decode(held_out[:48]).replace("\n", "⏎")
    print(f"{domain:<11}{len(corpus.train[domain]):>8,} bytes   {sample}")

# %% [markdown]
# The baseline is small: 2 layers, D = 64, F = 128. One addition helps a model this small: a **short convolution** mixes
# each embedding with the two before it. Everything else is a Llama in miniature.

# %%
shown = {
    DENSE_BASELINE: ("d_model", "n_layers", "n_heads", "d_ff", "conv_width"),
    BASELINE_TRAINING: ("steps", "batch_size", "context", "learning_rate", "warmup_steps"),
}
for config, fields in shown.items():
    print("\n".join(f"{name:<16}{getattr(config, name)}" for name in fields), "\n")

# %% [markdown]
# 500 steps, each on 16 windows of 64 bytes. The learning rate rises for 20 steps, then falls along a cosine. This
# takes well under a minute.

# %%
from moe_lab.train import evaluate, mean_bits, train


def tell(step):
    """A sign of life every hundred steps."""
    if (step.index + 1) % 100 == 0:
        print(f"step {step.index + 1}")


torch.manual_seed(0)
baseline = LM(DENSE_BASELINE)
history = train(baseline, corpus.train, BASELINE_TRAINING, tell)

# %%
window = 20
smooth = [
    sum(s.bits_per_byte for s in history[i : i + window]) / window
    for i in range(len(history) - window + 1)
]
viz.lines(
    {"training": (range(window, len(history) + 1), smooth)},
    title="The baseline learns: mean over the last 20 steps",
    x="step",
    y="bits per byte",
    levels={"knows nothing": 8},
    alt="A curve falls steeply from eight bits per byte in the first hundred steps, "
    "then ever more slowly.",
)

# %% [markdown]
# The figure of merit is the surprise on held-out text, each domain counted once. Five seeds gave 2.58 to 2.60; this
# cell checks that your run agrees.

# %%
held_out = evaluate(baseline, corpus.val)
print("mean within 2.59 ± 0.05 bits per byte:", abs(mean_bits(held_out) - 2.59) < 0.05)
viz.bars(
    held_out,
    title="The dense baseline on held-out text",
    y="bits per byte (lower is better)",
    alt="Four bars between two and three bits per byte, one per domain, with a dotted "
    "line at their mean.",
    level=("mean", mean_bits(held_out)),
)

# %% [markdown]
# And this is how it talks, each prompt continued by 60 bytes. (The text differs between machines.)

# %% tags=["nbval-ignore-output"]
for seed, prompt in enumerate(("She was ", "    def ", "12+34=", "Article ")):
    print(repr(decode(generate(baseline, encode(prompt), 60, seed=seed))))

# %% [markdown]
# Words, sums and lines have about the right shape, and no sense. **2.59 bits per byte is the number to beat.**
#
# ## 9 The FFN as a memory (*optional*)
#
# [Geva et al. 2021](https://arxiv.org/abs/2012.14913): a row of $W_\text{up}$ is a **key** that some contexts match;
# a column of $W_\text{down}$ is the **value** then written. We train a ReLU MLP with as many parameters, for half as long.

# %%
RELU = DENSE_BASELINE.but(ffn="relu", d_ff=192)  # 2 · 192 = 3 · 128
torch.manual_seed(0)
relu_model = LM(RELU)
_ = train(relu_model, corpus.train, BASELINE_TRAINING.but(steps=250), tell)

# %% [markdown]
# Now let both models read 256 held-out windows, and keep what every neuron holds.

# %%
from moe_lab.data import validation_windows

windows = torch.cat(
    [
        validation_windows(held_out, context=64, limit=64)[0]
        for held_out in corpus.val.values()
    ]
)


@torch.no_grad()
def neurons_of(model):
    """What every neuron holds on the windows: one (windows, S, F) tensor a layer."""
    seen = []
    with watch_hidden(model, lambda layer, hidden: seen.append(hidden)):
        model(windows)
    return seen


relu_neurons, swiglu_neurons = neurons_of(relu_model), neurons_of(baseline)
print([tuple(layer.shape) for layer in relu_neurons])

# %% [markdown]
# **Keys.** For the neurons of the last layer that fire hardest: the contexts that made them fire. Look at the last
# byte of each, the one just read. (Trained, so it differs between machines.)

# %% tags=["nbval-ignore-output"]
last = relu_neurons[-1]  # (windows, S, F)
loudest = last.flatten(0, 1).amax(0).topk(5).indices.tolist()


def contexts(neuron, count=6, before=7):
    """The bytes up to where the neuron fires hardest."""
    best = last[:, before:, neuron].flatten().topk(count).indices
    rows, columns = best // (64 - before), best % (64 - before) + before
    return [
        decode(windows[r, c - before : c + 1]) for r, c in zip(rows, columns, strict=True)
    ]


for neuron in loudest:
    print(f"neuron {neuron:>3}:", "  ".join(repr(found) for found in contexts(neuron)))

# %% [markdown]
# **Values.** A value is a direction in the residual stream. The head turns it into bytes that become likelier when
# the neuron fires.

# %% tags=["nbval-ignore-output"]
w_down = relu_model.blocks[-1].ffn.w_down.weight  # (D, F)
promoted = relu_model.head.weight @ (relu_model.norm.weight[:, None] * w_down)  # (V, F)
for neuron in loudest:
    likelier = promoted[:, neuron].topk(8).indices.tolist()
    print(
        f"neuron {neuron:>3} makes likelier:",
        " ".join(repr(chr(byte)) for byte in likelier),
    )

# %% [markdown]
# Some neurons read like a rule, others like nothing at all. What fires a neuron hardest is an anecdote; now measure.
#
# ## 10 Which neurons fire for which bytes?
#
# **Predict:** in the trained ReLU MLP, which share of the neurons is exactly zero for a token? And in SwiGLU?

# %%
zeros = {
    f"{name}\nlayer {layer}": 100 * (hidden == 0).float().mean().item()
    for name, layers in {"ReLU": relu_neurons, "SwiGLU": swiglu_neurons}.items()
    for layer, hidden in enumerate(layers)
}
print(
    "ReLU: most neurons are zero:  ",
    all(v > 50 for name, v in zeros.items() if "ReLU" in name),
)
print(
    "SwiGLU: no neuron is zero:    ",
    all(v < 0.01 for name, v in zeros.items() if "SwiGLU" in name),
)
viz.bars(
    zeros,
    title="Neurons that are exactly zero",
    y="share of neurons (%)",
    show="{:.0f} %".format,
    alt="Both ReLU layers have clearly more than half of their neurons at zero; both "
    "SwiGLU layers have none.",
)

# %% [markdown]
# Which neurons these are depends on the byte. A row of this picture is a byte, a column is a neuron of the last ReLU
# layer. Bytes of one kind, such as the digits, share neurons.

# %%
chosen = "eat .,(=_0123\n"
rate = [(last[windows == ord(letter)] > 0).float().mean(0) for letter in chosen]
viz.heatmap(
    torch.stack(rate)[:, :64],
    title="How often a neuron fires, by the byte just read",
    x="first 64 of 192 neurons",
    y="byte",
    rows=viz.letters(chosen),
    colour="share of times it fires",
    alt="A patchy picture: most cells are white, and bytes of one kind, such as the "
    "digits, share their dark neurons.",
)

# %% [markdown]
# SwiGLU's neurons are never zero. But are they all needed? Keep only each token's strongest, and see what is lost. With
# $h$ for what enters $W_\text{down}$, a neuron's **strength** is how much it writes: $|h_i|$ times the length of its
# column in $W_\text{down}$.
#
# ### Exercise 1.6 · keep each token's strongest neurons
#
# ●●● · 10 minutes · about four lines · keep `round(share * F)` neurons, at least one
#
# <details><summary>Hint 1</summary>
#
# `w_down.norm(dim=0)` gives the length of every column, (F,). `topk` along the last axis finds the strongest.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.zeros_like(hidden).scatter(-1, indices, values)` puts values back in their places; `hidden.gather(-1, indices)`
# reads them.
#
# </details>


# %%
@exercise("1.6")
def keep_strongest(hidden, w_down, share):
    """hidden (..., F) with all but each token's strongest neurons set to zero."""
    ### BEGIN SOLUTION
    strength = hidden.abs() * w_down.norm(dim=0)
    count = max(1, round(share * hidden.shape[-1]))
    kept = strength.topk(count, dim=-1).indices
    return torch.zeros_like(hidden).scatter(-1, kept, hidden.gather(-1, kept))
    ### END SOLUTION


# %% [markdown]
# Three ways of keeping a share: each token's **own** strongest; the same **fixed** set for all tokens, the strongest
# on average; and a **random** one. **Predict** which share each can spare.

# %%
torch.manual_seed(0)
norms = [block.ffn.w_down.weight.detach().norm(dim=0) for block in baseline.blocks]
mean_strength = [
    (h.abs() * n).mean((0, 1)) for h, n in zip(swiglu_neurons, norms, strict=True)
]
random_strength = [torch.rand(n.shape) for n in norms]


def fixed(strength):
    """Keeps the neurons that are first in one ranking, for every token."""
    ranks = [layer.argsort(descending=True).argsort() for layer in strength]
    return lambda layer, hidden, share: (
        hidden * (ranks[layer] < round(share * hidden.shape[-1]))
    )


def own(layer, hidden, share):
    """Keeps each token's strongest neurons."""
    return keep_strongest(hidden, baseline.blocks[layer].ffn.w_down.weight, share)


ways = {"own": own, "fixed": fixed(mean_strength), "random": fixed(random_strength)}


# %%
def bits_with(way, share):
    """The baseline's held-out bits per byte when only a share of the neurons is kept."""
    with watch_hidden(baseline, lambda layer, hidden: way(layer, hidden, share)):
        return mean_bits(evaluate(baseline, corpus.val, limit=64))


shares = [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
kept = {name: [bits_with(way, share) for share in shares] for name, way in ways.items()}
viz.lines(
    {name: ([100 * share for share in shares], values) for name, values in kept.items()},
    title="How many neurons does a token need?",
    x="neurons kept (%)",
    y="bits per byte (lower is better)",
    log_x=True,
    markers=True,
    alt="Keeping each token's own strongest neurons costs next to nothing down to a "
    "quarter; fixed or random sets "
    "cost much from the start.",
)

# %% [markdown]
# Is that fair? The fixed sets were cut out of a model that had been trained with all its neurons. So train one that is
# narrow from the start, with a quarter of the width.

# %%
torch.manual_seed(0)
narrow = LM(DENSE_BASELINE.but(d_ff=DENSE_BASELINE.d_ff // 4))
_ = train(narrow, corpus.train, BASELINE_TRAINING, tell)

# %%
lost = {name: values[2] - values[0] for name, values in kept.items()}
lost["narrow from the start"] = (
    mean_bits(evaluate(narrow, corpus.val, limit=64)) - kept["own"][0]
)
print("own quarter: less than 0.05 bits lost:   ", lost["own"] < 0.05)
print(
    "narrow from the start loses more:        ", lost["narrow from the start"] > lost["own"]
)
print("a fixed quarter loses over ten times more:", lost["fixed"] > 10 * lost["own"])
viz.bars(
    lost,
    title="A quarter of the neurons: what it costs",
    y="bits per byte lost (lower is better)",
    show="+{:.2f}".format,
    alt="Each token's own quarter loses least; a model narrow from the start loses more; "
    "fixed and random quarters of the trained model lose far more.",
)

# %% [markdown]
# In this small model a token needs a quarter of the FFN, but each token **another** quarter. Then why compute all of it?
# Because the strong neurons were known only after computing them all. Something cheap has to choose *before*: a
# **router**.

# %%
viz.draw_dense_to_moe()

# %% [markdown]
# ## What real models do
#
# | model | FFN | D → F | source |
# |---|---|---|---|
# | Transformer (2017) | ReLU | 512 → 2,048 | [Vaswani et al.](https://arxiv.org/abs/1706.03762), table 3 |
# | Llama-7B (2023) | SwiGLU | 4,096 → 11,008 | [Touvron et al.](https://arxiv.org/abs/2302.13971); released config |
# | Llama 3 70B (2024) | SwiGLU | 8,192 → 28,672 | [Llama 3](https://arxiv.org/abs/2407.21783), table 3 |
#
# ## Recap
#
# - An FFN is two matrices with an activation, or three with a gate; it works on each token alone.
# - It holds most parameters, and does most of the work up to long contexts.
# - In our small model most of it hardly matters for a given token, and which part matters changes with the token.

# %%
show_progress("01")

# %% [markdown]
# **Next:** [02 · The router](02_router.ipynb): how can a network choose, and still be trained?
