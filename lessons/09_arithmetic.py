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
#   title: The arithmetic of MoE
#   minutes: 90
#   seconds: 60
#   hardware: CPU
# ---

# %% [markdown]
# # 09 · The arithmetic of MoE
#
# **Which of the claims people repeat about MoE are true?**
#
# `CPU` · 90 minutes · prerequisites: notebooks 01 to 03
#
# At the end **you will have built** a calculator that counts every matrix of DeepSeek-V3 from a page of sizes, and says what it
# reads to write one token. With it you will settle what articles claim, and see how a wrong number may have come about.
#
# What is marked *optional* comes on top: run its cells, and read it another time.

# %%
import math
import textwrap
from itertools import product

import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_lab import accounting, viz
from moe_lab.attention import MLA, Attention, Cache
from moe_lab.config import LMConfig, MLAConfig, MoEConfig
from moe_lab.course import exercise, show_progress
from moe_lab.presets import PRESETS

V3 = PRESETS["DeepSeek-V3"].config
print(f"{V3.n_layers} layers, {V3.n_moe_layers} of them with {V3.moe.n_experts} experts")

# %% [markdown]
# ## Predict first
#
# In most layers of DeepSeek-V3 a token goes to 8 of 256 experts. **How many billion parameters has the model, and how many
# does a token use? At one byte each, how many GB does a step read that writes one token for one user, and one for each of 32
# users? How many GPUs of 80 GB hold it?**

# %%
my_guess = {
    "billions, total": None,
    "billions, active": None,
    "GB a step reads, 1 user": None,
    "GB a step reads, 32 users": None,
    "GPUs of 80 GB": None,
}


def said(name):
    """What you guessed, to stand beside what comes out."""
    return "no guess" if my_guess.get(name) is None else f"you said {my_guess[name]}"


# %% [markdown]
# ## 1 Four numbers behind "size"
#
# A model small enough to see: two layers, in each a token goes to 2 of 8 experts. **Predict:** which share of its parameters
# does a token use?

# %%
toy = LMConfig(
    vocab_size=10,
    d_model=4,
    n_layers=2,
    n_heads=2,
    d_ff=3,
    moe=MoEConfig(d_model=4, d_ff=3, n_experts=8, top_k=2),
)
total = accounting.count_parameters(toy)
active = accounting.count_parameters(toy, active=True)
print(total, active, sep="\n\nof these a token uses:\n\n")

# %% [markdown]
# One half, not a quarter: only the experts are spared. So four numbers are mixed up when people speak of size:
#
# | number | what it counts | what it tells |
# |---|---|---|
# | total | every learned number | memory |
# | active | what one token uses: all but the E − k experts that it leaves out | what some model cards print |
# | active without the embedding | of that table a token looks up one row; the rest takes part in products | FLOPs, and bytes read for a token |
# | k/E | the share of the routed experts alone | nothing by itself |

# %%
print("total                       ", total.total)
print("active                      ", active.total, f"{active.total / total.total:.1%}")
print("active without the embedding", active.without_embedding)
print("k/E                         ", f"{toy.moe.top_k / toy.moe.n_experts:.1%}")

# %% [markdown]
# ## 2 One FFN, or one expert
#
# A SwiGLU ([Shazeer 2020](https://arxiv.org/abs/2002.05202)) has three matrices: gate and up lead from D numbers to F
# neurons, down leads back. Experts of current models are SwiGLUs. Switch's are ReLU MLPs without a gate.
#
# ### Exercise 9.1 · one FFN, or one expert
#
# ●○○ · 3 minutes · one or two lines
#
# `d_model` is D, `d_ff` is F, `kind` is `"swiglu"` or `"relu"`. No biases. Return an int.
#
# <details><summary>Hint 1</summary>
#
# How many matrices has each kind? Each is D by F, or F by D.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `matrices = 3 if kind == "swiglu" else 2`
#
# </details>


# %%
@exercise("9.1")
def ffn_parameters(d_model, d_ff, kind="swiglu"):
    """Parameters of one FFN of F neurons, or of one expert."""
    ### BEGIN SOLUTION
    matrices = {"swiglu": 3, "relu": 2}[kind]
    return matrices * d_model * d_ff
    ### END SOLUTION


# %% [markdown]
# **Check it** on DeepSeek-V3: an expert has D = 7,168 and F = 2,048. **Predict** how many billion its 58 layers of 256
# experts hold before anything else is counted.

# %%
expert = ffn_parameters(7168, 2048)
print(f"one expert {expert:,}   all of them {58 * 256 * expert:,}")
print(f"one FFN of Llama-7B {ffn_parameters(4096, 11_008):,}")

# %% [markdown]
# ## 3 Attention, before it is counted
#
# The rest is mostly attention, in two kinds.
#
# **Grouped queries** (GQA, [Ainslie et al. 2023](https://arxiv.org/abs/2305.13245)): each query head has its own d_head
# numbers, but several of them share one head of keys and values. Here 4 query heads share 2. Together they may be wider than
# the token: 16 numbers from 8.


# %%
def show_matrices(module):
    """Every matrix of a module: rows (what it gives) by columns (what it reads)."""
    for name, weight in module.named_parameters():
        if weight.ndim == 2:
            print(f"{name:<14}{tuple(weight.shape)}")


torch.manual_seed(0)
grouped = LMConfig(d_model=8, n_layers=1, n_heads=4, n_kv_heads=2, d_head=4, d_ff=8)
show_matrices(Attention(grouped))

# %% [markdown]
# While a text is written, keys and values of all earlier tokens are needed again and again. They are kept, in the **KV
# cache**. After six tokens:

# %%
x = torch.rand(1, 6, 8)  # one sequence, six tokens, D = 8
cache = Cache()
Attention(grouped)(x, cache)
for name, kept in zip(("keys", "values"), cache.kept, strict=True):
    print(f"{name:<7}{tuple(kept.shape)}   (sequence, heads, tokens, d_head)")
print("numbers kept per token:", cache.n_bytes // (4 * 6))  # 4 bytes each, six tokens

# %% [markdown]
# **Latent attention** (MLA, [DeepSeek-V2](https://arxiv.org/abs/2405.04434), section 2.1) keeps less. A token t is pressed into
# one short vector, its **latent** $c_t$. From it each head h reads its key and its value:
#
# $$c_t = \mathrm{norm}(W_{DKV}\, x_t) \qquad k_{t,h} = \left[\, W_{UK,h}\, c_t \,;\, k^R_t \,\right] \qquad v_{t,h} = W_{UV,h}\, c_t$$
#
# $k^R_t$ is a short key straight from the token, the same for all heads, **turned** by RoPE: by an angle that tells its
# position. Find both in the rows:

# %%
latent = LMConfig(
    d_model=8,
    n_layers=1,
    n_heads=2,
    d_ff=8,
    mla=MLAConfig(kv_rank=3, d_nope=4, d_rope=2, d_value=5),
)
mla = MLA(latent)
show_matrices(mla)

# %% [markdown]
# `w_dkv` gives 5 numbers: 3 of the latent, 2 of the turned key. `w_ukv` reads the latent alone, and gives each of 2 heads 4
# numbers of a key and 5 of a value. A query has 4 + 2, to meet both parts of a key. **Predict** what is kept per token.

# %%
cache = Cache()
mla(x, cache)
for name, kept in zip(("latent", "turned key"), cache.kept, strict=True):
    print(f"{name:<11}{tuple(kept.shape)}   (sequence, tokens, numbers)")
print("numbers kept per token:", cache.n_bytes // (4 * 6))  # 4 bytes each, six tokens

# %% [markdown]
# Five, for any number of heads; two heads' own keys and values would be 22. (*Optional:* must each step read them from the
# latent again? No: a query meets $W_{UK}\,c$ as $W_{UK}^\top$ times the query meets $c$. So the matrix is **absorbed** into
# the query. Same result:)

# %%
with torch.no_grad():
    plain, absorbed = mla(x), mla(x, absorb=True)
print("absorbed equals not absorbed:", torch.allclose(plain, absorbed, atol=1e-5))

# %% [markdown]
# A turn between $W_{UK}$ and the query would be another one for each position, and no single matrix could be absorbed. Hence
# the turned part stays outside.
#
# ### Exercise 9.2 · attention, grouped or latent
#
# ●●○ · 10 minutes · six to nine lines
#
# Count one layer's matrices. Norms are left out. With `config.mla` None:
#
# | matrix | reads | gives |
# |---|---|---|
# | `w_q` | a token, `d_model` numbers | the queries of `n_heads` heads, `d_head` each |
# | `w_k`, `w_v` | a token | keys, and values, of `n_kv_heads` heads |
# | `w_o` | what all query heads found | `d_model` numbers |
#
# With `config.mla`, sizes as `config.mla.kv_rank`, but for `config.n_heads`:
#
# | matrix | reads | gives |
# |---|---|---|
# | `w_dkv` | a token | the latent, `kv_rank`, and one turned key, `d_rope` |
# | `w_ukv` | the latent | for each head `d_nope` numbers of a key and `d_value` of a value |
# | `w_q`, if `q_rank` is None | a token | for each head a query, `d_nope + d_rope` |
# | `w_dq`, `w_uq` if not | a token; then the `q_rank` numbers made of it | `q_rank` numbers; then the queries |
# | `w_o` | the values of all heads | `d_model` numbers |
#
# <details><summary>Hint 1</summary>
#
# A matrix has (what it gives) · (what it reads) parameters. Write the grouped case first and return.
#
# </details>
# <details><summary>Hint 2</summary>
#
# In the latent case name `queries = config.n_heads * (mla.d_nope + mla.d_rope)`. Then `w_dkv` is
# `d * (mla.kv_rank + mla.d_rope)`, and so on down the table.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The detour of queries: `d * mla.q_rank + mla.q_rank * queries`.
#
# </details>


# %%
@exercise("9.2")
def attention_parameters(config):
    """Parameters of one layer's attention matrices, grouped or latent."""
    ### BEGIN SOLUTION
    d, heads, mla = config.d_model, config.n_heads, config.mla
    if mla is None:
        return 2 * d * config.d_head * (heads + config.n_kv_heads)
    queries = heads * (mla.d_nope + mla.d_rope)
    count = d * (mla.kv_rank + mla.d_rope)
    count += mla.kv_rank * heads * (mla.d_nope + mla.d_value)
    count += d * queries if mla.q_rank is None else mla.q_rank * (d + queries)
    return count + heads * mla.d_value * d
    ### END SOLUTION


# %% [markdown]
# **Check it against the module**, at DeepSeek-V3's sizes, on torch's `meta` device: shapes without numbers. Do the detours
# over short vectors save weights, too? 128 heads of 128 numbers with keys and values of their own would take the last line.

# %%
print(V3.mla)
with torch.device("meta"):
    real = MLA(V3)
print(f"counted {attention_parameters(V3):,}")
print(f"in the module {sum(w.numel() for w in real.parameters() if w.ndim == 2):,}")
print(f"all heads with their own {4 * 7168 * 128 * 128:,}")

# %% [markdown]
# ## 4 A whole model
#
# Now all of it. A shared expert works for every token, the routed ones for those that choose them.
#
# | part | how often | size of one |
# |---|---|---|
# | embedding, head | once each; once together if `tied_embeddings` | `vocab_size` · D |
# | attention | in every one of `n_layers` layers | 9.2 |
# | dense FFN | in the layers without experts | 9.1, F is `d_ff` |
# | router | in `n_moe_layers` layers | `moe.n_experts` · D |
# | routed experts | `moe.n_experts` in each of these; a token uses `moe.top_k` | 9.1, F is `moe.d_ff` |
# | shared experts | in each of these | 9.1, F is `moe.d_ff_shared`: all of them together |

# %%
for name in ("vocab_size", "tied_embeddings", "n_layers", "n_moe_layers", "d_ff"):
    print(f"{name:<18}{getattr(V3, name)!s:>8}")
for name in ("n_experts", "top_k", "d_ff", "d_ff_shared"):
    print(f"moe.{name:<14}{getattr(V3.moe, name):>8}")

# %% [markdown]
# ### Exercise 9.3 · a whole model, total and active
#
# ●●○ · 8 minutes · about eight lines
#
# All matrices of `config`, as an int; with `active=True` those that one token uses. Both tables count in full, norms and biases
# not at all. Every FFN is a SwiGLU, and every model here has experts.
#
# <details><summary>Hint 1</summary>
#
# One layer of experts first: `experts * ffn_parameters(d, moe.d_ff) + ffn_parameters(d, moe.d_ff_shared) + …`, where
# `experts` is top_k or n_experts. The router scores all experts, so it counts in full.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The sum: tables, `n_layers` times attention, `n_moe_layers` times that layer, `n_layers - n_moe_layers` times the dense FFN.
#
# </details>


# %%
@exercise("9.3")
def model_parameters(config, active=False):
    """All matrices of a model with experts, or with active=True those that one token uses."""
    ### BEGIN SOLUTION
    d, moe = config.d_model, config.moe
    experts = moe.top_k if active else moe.n_experts
    layer = d * moe.n_experts + ffn_parameters(d, moe.d_ff_shared)
    layer += experts * ffn_parameters(d, moe.d_ff)
    count = config.vocab_size * d * (1 if config.tied_embeddings else 2)
    count += config.n_layers * attention_parameters(config) + config.n_moe_layers * layer
    return count + (config.n_layers - config.n_moe_layers) * ffn_parameters(d, config.d_ff)
    ### END SOLUTION


# %% [markdown]
# **Check it** against what makers publish. The second column is `moe_lab`'s count, which also has norms and biases.

# %%
shown = ["Mixtral 8x7B", "Mixtral 8x22B", "DeepSeek-V2", "DeepSeek-V3", "Kimi-K2"]
shown += ["Qwen3-30B-A3B", "OLMoE-1B-7B", "gpt-oss-120b"]
print(f"{'':<15}{'your matrices':>18}{'all':>19}   published")
for name in shown:
    preset = PRESETS[name]
    exact = accounting.count_parameters(preset.config).total
    print(
        f"{name:<15}{model_parameters(preset.config):>18,}{exact:>19,}   {preset.stated[0]}"
    )

# %%
v3_total = accounting.count_parameters(V3).total
v3_active = accounting.count_parameters(V3, active=True)
print(f"DeepSeek-V3: {v3_total / 1e9:.1f} B ({said('billions, total')})")
print(f"active: {v3_active.total / 1e9:.2f} B, {v3_active.total / v3_total:.1%}")
print(f"without the embedding: {v3_active.without_embedding / 1e9:.2f} B")
print(f"({said('billions, active')})")

# %% [markdown]
# V3's card says 37 B: the second convention. Which one do the others print, with the embedding (A) or without it (B)?

# %%
for name in shown:
    config, stated = PRESETS[name].config, PRESETS[name].stated[1]
    count = accounting.count_parameters(config, active=True)
    both = f"A {count.total / 1e9:>6.2f} B   B {count.without_embedding / 1e9:>6.2f} B"
    print(f"{name:<15}{both}   published {stated}")

# %% [markdown]
# OLMoE counts it, gpt-oss, Kimi-K2 and V3 do not; Qwen3's 3.3 is 3.35 cut off; for Mixtral and V2 both round to what they
# print. So before you compare two cards, ask. **Predict:** which models use the smallest share of what they hold?

# %%
viz.draw_active_against_total()

# %% [markdown]
# The further below the line “all active”, the sparser. And where do the parameters sit?

# %%
viz.draw_where_parameters_sit(("Mixtral 8x7B", "Qwen3-30B-A3B", "DeepSeek-V3", "Kimi-K2"))

# %% [markdown]
# Experts are nearly all that is held, and much less of what is active; in V3 nearly a third of that is attention.
#
# ## 5 FLOPs at 4K
#
# Compute follows what is active; and attention compares tokens, which takes no parameters. **Predict:** V3 is a hundred
# times as large as Llama-7B. How many times as much does one of its layers cost, for 4,096 tokens?

# %%
llama = PRESETS["Llama-7B"].config
v3_layer, llama_layer = (accounting.layer_flops(model, 4096) for model in (V3, llama))
print(f"parameters: {v3_total / accounting.count_parameters(llama).total:.1f} times")
print(f"a layer's FLOPs: {v3_layer.total / llama_layer.total:.2f} times")
v3_pass, llama_pass = (accounting.count_flops(model, 4096) for model in (V3, llama))
print(f"all layers and the head: {v3_pass.total / llama_pass.total:.2f} times")

# %% [markdown]
# ### Exercise 9.4 · FLOPs of one layer (*optional*)
#
# ●●○ · 6 minutes · two or three lines
#
# A sequence of `tokens`; each sees itself and those before. `active` are the layer's active parameters. In each of `n_heads` heads a
# pair multiplies a query by a key, `d_key` numbers, and adds a weighted value, `d_value` numbers. A multiplication with its
# addition is two FLOPs.
#
# <details><summary>Hint 1</summary>
#
# Matrices: 2 · tokens · active.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Pairs: the first token sees one position, the last S. Together S (S + 1) / 2; use `//`.
#
# </details>


# %%
@exercise("9.4")
def layer_flops(active, n_heads, d_key, d_value, tokens):
    """FLOPs of one layer on a sequence, causal."""
    ### BEGIN SOLUTION
    pairs = tokens * (tokens + 1) // 2
    scores = 2 * n_heads * pairs * (d_key + d_value)
    return 2 * tokens * active + scores
    ### END SOLUTION


# %% [markdown]
# **Check it against torch's counter**, on V3's attention. It counts every pair, also those that are masked.

# %%
S = 512
with FlopCounterMode(display=False) as counter, torch.no_grad():
    real(torch.zeros(1, S, 7168, device="meta"))
mine = layer_flops(attention_parameters(V3), 128, 192, 128, S)
masked = 2 * 128 * (192 + 128) * (S * S - S * (S + 1) // 2)
print(f"torch {counter.get_total_flops():,}   counted + masked pairs {mine + masked:,}")

# %% [markdown]
# ## 6 What memory has to hold
#
# Memory follows the total. Weights take 2 bytes a parameter in bf16, 1 in fp8. Training adds gradients and Adam's
# states: 16 bytes a parameter ([Rajbhandari et al. 2020](https://arxiv.org/abs/1910.02054), section 3.1), active or not.

# %%
released = accounting.fp8_checkpoint_bytes(V3)  # its scales and its bf16 parts with it
for what, held in {
    "as released, mostly fp8": released,
    "in bf16": accounting.weight_bytes(V3),
    "in training": accounting.training_bytes(V3).total,
}.items():
    print(f"{what:<25}{held / 1e9:>9,.1f} GB   {math.ceil(held / 80e9):>4} GPUs of 80 GB")
print(f"({said('GPUs of 80 GB')}, as released)")

# %% [markdown]
# That is before a single token. Then each sequence adds its cache: in V3 512 + 64 numbers per token and layer, of 2 bytes.
# **Predict** how many GB 131,072 tokens take. Below it: the same shape if all 128 heads kept their own keys and values (MHA), if
# they shared 8 (GQA-8), 4, or one (MQA).

# %%
viz.draw_caches()

# %% [markdown]
# Less than eight shared heads, more than one. So "nine tenths saved" says nothing without a baseline.
#
# ### Exercise 9.5 · what attention keeps (*optional*)
#
# ●○○ · 4 minutes · two to four lines
#
# The cache of one sequence of `tokens` over all `config.n_layers` layers, in bf16: bytes, an int. No windows.
#
# <details><summary>Hint 1</summary>
#
# Section 3 showed what is kept: keys and values of `n_kv_heads` heads, or with `config.mla` a latent and one turned key.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Numbers per token and layer: `2 * n_kv_heads * d_head`, or `mla.kv_rank + mla.d_rope`.
#
# </details>


# %%
@exercise("9.5")
def cache_bytes(config, tokens):
    """Bytes of one sequence's KV cache in bf16."""
    ### BEGIN SOLUTION
    numbers = 2 * config.n_kv_heads * config.d_head
    if config.mla:
        numbers = config.mla.kv_rank + config.mla.d_rope
    return 2 * numbers * config.n_layers * tokens
    ### END SOLUTION


# %%
for name in ("DeepSeek-V3", "Llama 3.1 405B", "Mixtral 8x7B", "Qwen3-30B-A3B"):
    kept = cache_bytes(PRESETS[name].config, 1)
    print(f"{name:<15}{kept:>8,} bytes per token{131_072 * kept / 1e9:>7.2f} GB at 131,072")

# %% [markdown]
# ## 7 What a step reads
#
# A prompt is read in one go (**prefill**). Then each step writes one token per sequence (**decode**), and reads every weight that it
# needs, once, however many sequences wait for it. A **batch** is B tokens, each with k experts of E. By hand: B = 2,
# k = 1, E = 4, all 16 outcomes.

# %%
outcomes = list(product(range(4), repeat=2))
touched = [len(set(outcome)) for outcome in outcomes]
print("experts touched:", touched)
print("on average", sum(touched) / len(outcomes))

# %% [markdown]
# Not 2: they meet in four outcomes of 16. Now in general, if tokens choose independently and all experts equally often.
#
# ### Exercise 9.6 · how many experts a batch touches
#
# ●●○ · 5 minutes · one or two lines
#
# The average number of different experts that `batch` tokens choose, each `top_k` different ones of `n_experts`: a float.
#
# <details><summary>Hint 1</summary>
#
# Watch one expert. With which probability does one token miss it? And all B of them?
#
# </details>
# <details><summary>Hint 2</summary>
#
# One token misses it with probability 1 − k/E. All miss it with that to the power B. Otherwise it is touched; and there are E of
# them.
#
# </details>


# %%
@exercise("9.6")
def experts_touched(n_experts, top_k, batch):
    """How many experts of a layer a batch of tokens touches, on average."""
    ### BEGIN SOLUTION
    missed = (1 - top_k / n_experts) ** batch
    return n_experts * (1 - missed)
    ### END SOLUTION


# %% [markdown]
# **Check it by trying:** let tokens choose 8 of 256 blindly, 200 times.

# %%
torch.manual_seed(0)
for batch in (1, 8, 32, 256):
    chosen = torch.rand(200, batch, 256).topk(8).indices.flatten(1)
    tried = sum(len(set(row)) for row in chosen.tolist()) / 200
    print(
        f"B {batch:>3}   tried {tried:>5.1f}   formula {experts_touched(256, 8, batch):>5.1f}"
    )

# %%
viz.draw_experts_touched()

# %% [markdown]
# Real tokens are alike, so they touch somewhat fewer. Now the weights: all that is active but the routed experts, and of
# these what the batch touches, in each layer.


# %%
def weights_read(config, batch):
    """Parameters that a decode step reads: each weight that some token needs, once."""
    moe, d = config.moe, config.d_model
    all_tokens_need = model_parameters(config, active=True) - config.vocab_size * d
    all_tokens_need -= config.n_moe_layers * moe.top_k * ffn_parameters(d, moe.d_ff)
    touched = experts_touched(moe.n_experts, moe.top_k, batch)
    return all_tokens_need + config.n_moe_layers * touched * ffn_parameters(d, moe.d_ff)


for batch in (1, 32, 256):
    gb = weights_read(V3, batch) / 1e9
    print(f"B {batch:>3}: {gb:>6.1f} GB in fp8, {gb / batch:>5.1f} for each token")
for users in ("1 user", "32 users"):
    print(f"{users}: {said(f'GB a step reads, {users}')}")

# %%
viz.draw_decode_reads()

# %% [markdown]
# For 32 users V3 reads twelve times as much as for one; a dense model of 37 B no more. Is reading what takes the
# time? An H200 does 989·10¹² bf16 operations and reads 4.8·10¹² bytes a second: 206 a byte. Work with fewer, left of the
# corner, waits for memory:

# %%
viz.draw_rooflines()

# %% [markdown]
# Long prompts compute, decoding waits. (No single H200 holds V3: as many as do share this work evenly.) The dense model
# gains from a batch at once, until caches (GQA-8) are what it reads. V3 starts higher, for MLA computes more per byte,
# gains late. How many tokens does an expert see?

# %%
for batch in (32, 512, 8192):
    print(f"B {batch:>5}: tokens for each of V3's experts: {batch * 8 / 256:g}")

# %% [markdown]
# ## 8 What training costs (*optional*)
#
# Training takes 6 N D FLOPs ([Kaplan et al. 2020](https://arxiv.org/abs/2001.08361), section 2.1).
#
# ### Exercise 9.7 · what training costs (*optional*)
#
# ●○○ · 4 minutes · two lines
#
# | argument | |
# |---|---|
# | `active`, `tokens` | N and D |
# | `rate` | FLOPs per second that one GPU reaches |
# | `dollars_per_hour` | of one GPU |
#
# Return GPU hours, then dollars.
#
# <details><summary>Hint 1</summary>
#
# FLOPs over rate gives seconds of one GPU.
#
# </details>
# <details><summary>Hint 2</summary>
#
# An hour has 3,600 seconds, whoever shares the work.
#
# </details>


# %%
@exercise("9.7")
def training_cost(active, tokens, rate, dollars_per_hour):
    """GPU hours and dollars of a training run."""
    ### BEGIN SOLUTION
    hours = 6 * active * tokens / rate / 3600
    return hours, hours * dollars_per_hour
    ### END SOLUTION


# %% [markdown]
# V3 saw 14.8 T tokens in 2,664,000 H800 hours, and its makers assume $2 for each
# ([table 1](https://arxiv.org/abs/2412.19437)). Llama 3.1 405B took 30.84 million H100 hours
# ([model card](https://github.com/meta-llama/llama-models/blob/main/models/llama3_1/MODEL_CARD.md)) for 15.6 T
# ([Llama team 2024](https://arxiv.org/abs/2407.21783), section 1). Let a GPU reach 340·10¹² FLOPs per second:

# %%
runs = {"DeepSeek-V3": (14.8e12, 2.664), "Llama 3.1 405B": (15.6e12, 30.84)}
for name, (tokens, stated) in runs.items():
    count = accounting.count_parameters(PRESETS[name].config, active=True)
    hours, dollars = training_cost(count.without_embedding, tokens, 340e12, 2.0)
    print(
        f"{name:<15}{hours / 1e6:>6.2f} M hours, stated {stated}; ${dollars / 1e6:.1f} M at $2"
    )

# %% [markdown]
# The rate was chosen to fit V3's pre-training. That it fits the other, too, says: bills differ by active parameters and tokens.
#
# ## 9 The claims
#
# What five articles say, in our words. A claim is settled by code that *computes*, by *recorded* runs or a *shown* cell of
# this course, by arithmetic on *stated* figures, by a *cited* source; or it is *open*:

# %%
from moe_lab.claims import load_claims, show

ledger = load_claims()
print(len(ledger), "claims; what settles them:\n")
print(ledger.summary())

# %% [markdown]
# Verdicts are *true*, *roughly* (the right idea, a number or the scope is off), *misleading* (true words, wrong conclusion),
# *false*, and *undisclosed* (nobody but the owner knows). **Predict** the verdicts of these twelve:

# %%
asked = ["S0.1", "S0.6", "S0.11", "S1.1", "S1.8", "S2.1"]
asked += ["S2.3", "S2.13", "S3.4", "S3.9", "S4.23", "S4.24"]
for claim_id in asked:
    print(textwrap.fill(f"{claim_id:<6} {ledger[claim_id].claim}", 88))

# %%
my_verdicts = {
    "S0.1": "",
    "S0.6": "",
    "S0.11": "",
    "S1.1": "",
    "S1.8": "",
    "S2.1": "",
    "S2.3": "",
    "S2.13": "",
    "S3.4": "",
    "S3.9": "",
    "S4.23": "",
    "S4.24": "",
}

# %% [markdown]
# **The first article** (S0) breaks down what V3's training cost. Its first claim, and the lines that settle it (MTP: a module
# beside the model that predicts one token further):

# %%
ledger["S0.1"].check()

# %% [markdown]
# How may the 473 have come about? Two matrices in place of three in every expert, experts in all 61 layers, one table. With
# your own functions:

# %%
D, all_layers = V3.d_model, V3.n_layers
one_layer = attention_parameters(V3) + 256 * D + 257 * ffn_parameters(D, 2048, "relu")
wrong = V3.vocab_size * D + all_layers * one_layer
print(f"{wrong / 1e9:.1f} B instead of {v3_total / 1e9:.1f} B")
print(f"{ledger['S0.1'].verdict}; your verdict: {my_verdicts.get('S0.1') or 'no guess'}")

# %% [markdown]
# That is a **reconstruction**, not a fact: the article does not say how it counted. But one forgotten matrix, three layers
# overlooked, and one table for two are all it takes. The same slips would make 5.16 B of Llama-7B's 6.74 (claim S0.2; the
# article says 5.2).


# %%
def settle(*claim_ids):
    """What the lines of some claims give or a source says, both verdicts, and why."""
    indented = {"initial_indent": "   ", "subsequent_indent": "   "}
    for claim in (ledger[claim_id] for claim_id in claim_ids):
        print(textwrap.fill(f"{claim.id}  {claim.claim}", 88))
        for check in claim.check():
            line = f"{show(check.got):>24}  {check.line.what}"
            print(textwrap.fill(line, 88, subsequent_indent=" " * 26))
        if claim.cited:
            print(textwrap.fill(f"cited: {claim.cited}", 88, **indented))
        guess = my_verdicts.get(claim.id)
        print(
            f"   verdict: {claim.verdict}   ({f'you said {guess}' if guess else 'no guess'})"
        )
        print(textwrap.fill(claim.why, 88, **indented))
        print()


settle("S0.6", "S0.11")

# %% [markdown]
# S0.11 is the costliest error: people size a machine by it, and file a bug
# ([ollama #10546](https://github.com/ollama/ollama/issues/10546)).
#
# **The second article** (S1) sets R1 against V3, dense against sparse.

# %%
settle("S1.1", "S1.8")

# %% [markdown]
# R1 is V3, trained further ([its README](https://github.com/deepseek-ai/DeepSeek-R1)). And where nobody says anything, nothing
# is computed: a plausible number would be no better than a guess.
#
# **The third article** (S2) is about serving.

# %%
settle("S2.1", "S2.3", "S2.13")

# %% [markdown]
# S2.3 and S2.13 are the treacherous kind: something true, then a conclusion that is not. What follows the active size is
# FLOPs, and bytes for a single user.
#
# **The last two** (S3, S4) are primers.

# %%
settle("S3.4", "S3.9")

# %% [markdown]
# Both take one case for all, and the first is outdated.

# %%
settle("S4.23", "S4.24")

# %% [markdown]
# The first stands as it is: it is what makes V3's attention so large a part. The second is refuted by a single node of eight
# H200, which hold 1,128 GB.

# %%
guessed = {name: guess.strip().lower() for name, guess in my_verdicts.items() if guess}
right = sum(guess == ledger[name].verdict for name, guess in guessed.items())
print(f"{right} of your {len(guessed)} verdicts are the ledger's")

# %% [markdown]
# ### All of them (*optional*)
#
# Ask for any: `ledger["S2.8"]`, or some: `ledger.where(verdict="misleading")`, `where(article="S4")`. Of what is open the ledger says no more than which
# way its author leans:

# %%
ledger["S2.8"]

# %%
ledger.where(kind="open")

# %% [markdown]
# ## 10 Dense or sparse?
#
# Four questions decide a deployment. (Quality is one more; notebook 10 will measure it.)
#
# **Is there memory?** Weights by the total, then a cache for every sequence. Here 32 of 32,768 tokens, weights as released:

# %%
from bisect import bisect_left

from moe_lab.roofline import GPUS, decode

caches = 32 * accounting.cache_bytes(V3, 32_768)
print(f"weights {released / 1e9:.0f} GB, caches {caches / 1e9:.0f} GB")
for gpu in GPUS.values():
    n = math.ceil((released + caches) / gpu.memory)
    print(f"{gpu.name:<10}{gpu.memory / 1e9:>5.0f} GB   at least {n}")

# %% [markdown]
# **What batch?** The makers call Mixtral 8x22B "faster than any dense 70B model"
# ([Mistral AI 2024](https://mistral.ai/news/mixtral-8x22b)). **Predict:** up to which batch does it read less than Llama 3 70B?

# %%
mixtral, llama_70b = (PRESETS[name].config for name in ("Mixtral 8x22B", "Llama 3 70B"))
dense = accounting.count_parameters(llama_70b)
print(f"to hold {model_parameters(mixtral) / 1e9:.0f} B and {dense.total / 1e9:.0f} B")
for batch in (1, 2, 3, 8, 64):
    sparse = weights_read(mixtral, batch) / 1e9
    print(
        f"B {batch:>2}: {sparse:>6.1f} and {dense.without_embedding / 1e9:.1f} billion read"
    )

# %% [markdown]
# Two. From three on it reads more, and computes less at any batch. So is it slower ever after? Behind each sequence now lie 4,096
# tokens, and all is bf16. Times are floors at the rates of one H200; as many as hold a model share its work. Left Mixtral, right
# Llama:

# %%
h200, both = GPUS["H200"], (mixtral, llama_70b)
print(f"{'B':>5}{'ms a step':>20}{'tokens a second':>20}{'H200s that hold it':>21}")
for batch in (1, 2, 3, 64, 256, 512, 2048):
    steps = [decode(model, batch, 4096) for model in both]
    rows = [[f"{1000 * step.seconds(h200):.0f}" for step in steps]]
    rows += [[f"{step.tokens_per_second(h200, batch):,.0f}" for step in steps]]
    held = [
        accounting.weight_bytes(m) + batch * accounting.cache_bytes(m, 4096) for m in both
    ]
    rows += [[str(math.ceil(size / h200.memory)) for size in held]]
    print(f"{batch:>5}" + "".join(f"{' | '.join(pair):>20}" for pair in rows))

# %% [markdown]
# It loses its lead at three and wins it back between 256 and 512: there all its experts are read anyway, and what grows
# are caches, of 56 layers against 80, or compute. **Predict** where, with these caches and with none:


# %%
def is_faster(batch, context):
    """Whether Mixtral's step is the shorter one."""
    times = [decode(model, batch, context).seconds(h200) for model in both]
    return times[0] < times[1]


for context in (0, 4096):  # it changes once in either range, so that halving finds where
    lost = bisect_left(range(1, 64), True, key=lambda b: not is_faster(b, context)) + 1
    again = bisect_left(range(64, 2048), True, key=lambda b: is_faster(b, context)) + 64
    print(
        f"{context:>5} tokens behind: slower from {lost} on, faster again from {again} on"
    )

# %% [markdown]
# **When is its memory worth it?** For one or two users, and for hundreds: then caches outweigh weights. In between it is paid for
# twice, to hold and to read (claim S2.10).

# %%
caches = [accounting.cache_bytes(model, 4096) for model in both]
weights = [accounting.weight_bytes(model) for model in both]
equal = (weights[0] - weights[1]) / (caches[1] - caches[0])
print(f"weights {weights[0] / 1e9:.0f} and {weights[1] / 1e9:.0f} GB")
print(f"a sequence's cache {caches[0] / 1e9:.2f} and {caches[1] / 1e9:.2f} GB")
print(f"from {math.ceil(equal)} sequences on the sparse one takes less memory")

# %% [markdown]
# **What GPU?** (*optional*) To keep it computing, a weight that is read once must serve enough tokens: on an H200 206, in fp8 too
# (half the bytes, twice the rate). An expert sees B · k/E, so B is E/k times that. Caches come on top:

# %%
for name in ("H100", "H200", "MI300X"):
    busy = GPUS[name].busy_rows("fp8")
    per_model = {"dense": 1, "Mixtral 8x22B": 8 / 2, "DeepSeek-V3": 256 / 8}
    needs = "   ".join(
        f"{model} {busy * times:>5,.0f}" for model, times in per_model.items()
    )
    print(f"{name:<7}tokens in flight: {needs}")

# %% [markdown]
# **Dense or sparse?** Sparse pays with memory instead of compute:
#
# | your case | look at | choose |
# |---|---|---|
# | one user, much memory | active bytes | sparse: it reads like a small model |
# | one user, little memory | total bytes | dense, or a small MoE |
# | some tens of users, one machine | touched experts | dense, if speed counts: a sparse one reads most of its weights for few tokens each |
# | hundreds or thousands, many GPUs | tokens per expert | sparse: compute and caches count, and compute follows the active size |
# | long texts | cache per token | the attention, before the experts |
#
# **Move the sliders.** What do more experts change at a batch of 1, and of 64? What does a larger top-k?

# %%
viz.explore_arithmetic()

# %% [markdown]
# ## What real models do
#
# | model | choice | source |
# |---|---|---|
# | DeepSeek-V3 (2024) | decoding on 320 GPUs: 256 hold one expert of a layer each, 64 the shared one and copies of busy ones | [DeepSeek-AI](https://arxiv.org/abs/2412.19437), section 3.4.2 |
# | gpt-oss-120b (2025) | experts in 4 bits, so that one GPU of 80 GB holds it | [OpenAI](https://arxiv.org/abs/2508.10925), section 2.1 |
# | Kimi-K2 (2025) | more experts than V3, and half its attention heads | [README](https://github.com/MoonshotAI/Kimi-K2) |
# | Llama 3.1 405B (2024) | dense, for stable training | [Llama team](https://arxiv.org/abs/2407.21783), section 1 |

# %%
oss = PRESETS["gpt-oss-120b"].config
print(f"gpt-oss-120b as released: {accounting.mxfp4_checkpoint_bytes(oss) / 1e9:.1f} GB")

# %% [markdown]
# ## Recap
#
# - Compute follows the active parameters, memory the total, and bytes read per step what the batch touches.
# - k/E is about routed experts alone: a token uses 3.1 % of V3's, and 5.6 % of V3.
# - Percentages need a baseline, FLOPs a convention, and "size" a word that says which.

# %%
show_progress("09")

# %% [markdown]
# **Next:** 10, which trains an MoE language model: what does it win at scale, and what do experts learn?
