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
#   title: Start here
#   minutes: 15
#   seconds: 30
#   hardware: CPU
# ---

# %% [markdown]
# # 00 · Start here
#
# **Does my machine work, and what will I be able to build?**
#
# `CPU` · 15 minutes · prerequisites: some Python; PyTorch tensors and `nn.Module`
#
# At the end of this notebook **you will have built** nothing large, but you will know that everything runs, how an
# exercise answers you, and where the course goes. Run a cell with **Shift + Enter**.

# %% [markdown]
# ## 1 Does my machine work?
#
# The doctor looks at everything that the course needs. A finding that is not fine comes with its remedy. No GPU is
# fine: every notebook runs on a CPU.

# %% tags=["nbval-ignore-output"]
from moe_lab.course.doctor import doctor

doctor()

# %% [markdown]
# ## 2 What you will build
#
# A transformer spends most of its work in feed-forward networks (FFN). A **mixture of experts** (MoE) has many of
# them, and a router that sends each token to a few. You start at the left picture and build everything in the right
# one, until it trains, runs across processes and on a GPU.

# %%
from moe_lab import viz

viz.draw_dense_to_moe()

# %% [markdown]
# Why would anyone do that? The right layer has four times the parameters of one expert, but a token pays for two
# experts only. **Predict:** DeepSeek-V3 has 671 billion parameters. How many of them does one token use?

# %%
my_guess = 300  # billion: change it before you run the next cell

# %% [markdown]
# The published figures are 671 billion in total and 37 billion activated per token
# ([DeepSeek-V3 technical report](https://arxiv.org/abs/2412.19437), abstract). In notebook 09 you will count both
# yourself, to the last digit.

# %%
total, active = 671, 37
print(
    f"You said {my_guess} billion. The report says {active}: {active / total:.1%} of all."
)

# %% [markdown]
# What do experts do with a text? By notebook 05 **you will have built and trained** a model like this one. It reads
# bytes, and in each of its two layers every byte goes to two of eight experts. Here are the four kinds of text that it
# learned from. **Predict:** will sums and prose share their experts?

# %%
from moe_lab.checkpoints import load_shipped_model

samples = {
    "prose": "is the cleverest of her family",
    "python": "if hi is None:\n    hi = len(a)",
    "arithmetic": "32+37=69\n31-22=9\n71+24=95\n",
    "languages": "Каждый человек",
}
viz.draw_text(
    samples,
    load_shipped_model("tiny_moe"),
    title="A text in the colours of its experts",
    alt="Four short texts, each in two rows, for layer 1 and layer 2. Every letter stands in "
    "the colour and with the number of its first expert. In layer 2 most digits share one "
    "expert, and most bytes of the Russian words another. Bars show that all eight experts "
    "are used, none more than twice as much as if they were used evenly.",
)

# %% [markdown]
# In layer 2 hardly: most digits go to one expert, most bytes of Russian letters (two each) to another. Nobody told the
# router. Type a sentence of your own. Then choose the *collapsed* model, whose training went wrong: nearly every byte
# goes to the same one or two experts. Why, and what helps, is notebook 05.

# %%
viz.TextExplorer()

# %% [markdown]
# ## 3 How an exercise works
#
# Language models are scored by their surprise. torch gives it in **nats** (natural logarithm); people compare models
# of bytes in **bits**. One bit is the surprise of a fair coin:
#
# $$1\ \text{bit} = \ln 2\ \text{nats}$$

# %%
import math

from moe_lab.course import exercise

print(f"a fair coin: 1 bit = {math.log(2):.3f} nats")

# %% [markdown]
# ### Exercise 0.1 · from nats to bits
#
# ●○○ · 1 minute · one line
#
# 1. Run the cell as it is: it says *not started*.
# 2. Be wrong on purpose: replace the `raise` line by `return nats * math.log(2)`. Read the answer.
# 3. Now do it right.
#
# <details><summary>Hint 1</summary>
#
# A coin's surprise is `math.log(2)` nats and 1 bit. Which operation takes the first to the second?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Divide by `math.log(2)`.
#
# </details>


# %%
@exercise("0.1")
def nats_to_bits(nats):
    """A surprise in nats, as torch gives it, in bits."""
    ### BEGIN SOLUTION
    return nats / math.log(2)
    ### END SOLUTION


# %% [markdown]
# An exercise never blocks. Solved or not, the name now holds a function that works: yours if it passes, else the
# course's own. So the notebook always runs to its end, and you can come back.

# %%
print(
    f"A model that knows nothing of bytes: {nats_to_bits(math.log(256)):.1f} bits per byte"
)

# %% [markdown]
# ## 4 The map
#
# Blue is the core, to be read in order; green goes beyond it; a pale box is still being written. A notebook takes about
# an hour. Each one starts with a question, asks you to predict, lets you build, and then checks what you built against
# the real thing.

# %%
from moe_lab.course.map import NOTEBOOKS

viz.draw_map(NOTEBOOKS)

# %% [markdown]
# | notebook | the one question it answers | builds on |
# |---|---|---|
# | [01 dense FFN](01_dense_ffn.ipynb) | where do a transformer's parameters and FLOPs sit? | 00 |
# | [02 router](02_router.ipynb) | how can a network choose, and still be trained? | 01 |
# | [03 top-k MoE](03_topk_moe.ipynb) | what does a layer of experts compute, and what does it cost? | 02 |
# | [04 dispatch](04_dispatch.ipynb) | how do tokens reach their experts and come back? | 03 |
# | [05 load balancing](05_load_balancing.ipynb) | why does routing collapse, and what does each cure cost? | 04 |
# | [06 shared experts](06_shared_experts.ipynb) | why cut experts finer, and keep some always on? | 05 |
# | [07 expert parallelism](07_expert_parallelism.ipynb) | what travels when experts live on different ranks? | 04 |
# | [08 Triton grouped GEMM](08_triton_grouped_gemm.ipynb) | how does a GPU run ragged matrix products at full speed? | 04 |
# | [09 the arithmetic of MoE](09_arithmetic.ipynb) | which popular claims about MoE are true? | 03 |
# | 10 training | what does it win at scale, and what do experts learn? | 06 |
# | 11 serving | what do memory, bandwidth and batch size do to an MoE? | 09 |
# | 12 distil, upcycle, fine-tune | how does one get from dense to sparse, and back? | 10 |
# | 13 real checkpoints | can my layer run Mixtral's and DeepSeek's weights? | 06 |
# | 14 the bug museum | ten bugs that real MoE code shipped: find each one | 06 |

# %% [markdown]
# ## Recap
#
# - The course runs on your machine, or the doctor told you what to do.
# - An exercise checks itself when you run its cell, and names the mistake it recognises.
# - A loss is given in bits per byte; 8 means that a model knows nothing.
#
# This last cell shows how far you are. Outside of notebooks, `moe-lab progress` does.

# %%
from moe_lab.course import show_progress

show_progress("00")

# %% [markdown]
# **Next:** [01 · The dense FFN](01_dense_ffn.ipynb): where do a transformer's parameters and FLOPs sit?
