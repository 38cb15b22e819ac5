"""Causal self-attention with rotary positions: grouped queries, or a latent vector; and what each keeps in a cache."""

import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.config import LMConfig, n_visible


def rotary_angles(positions: int, d_head: int, theta: float, device: torch.device | None = None) -> Tensor:
    """The angle by which RoPE turns pair i at position p, `p * theta^(-2i / d_head)`, (S, d_head / 2).

    Source: Su et al. 2021, "RoFormer", section 3.4.2.
    """
    rates = theta ** (-torch.arange(0, d_head, 2, device=device, dtype=torch.float32) / d_head)
    return torch.outer(torch.arange(positions, device=device, dtype=torch.float32), rates)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (i, i + d_head / 2) of every head by their angles, (..., S, d_head); LLaMA's half layout."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Cache:
    """What attention keeps of positions that it has seen, so that they are not computed again: tensors (..., S, width).

    One for each layer, never for two; empty at first. `forward` extends the one that it is given.
    """

    def __init__(self) -> None:
        self.kept: tuple[Tensor, ...] = ()
        self.n_seen = 0
        self._layer: weakref.ref[nn.Module] | None = None  # whose positions these are; a cache keeps no weights alive

    def extend(
        self, *new: Tensor, layer: nn.Module, window: int | None = None, chunked: bool = False
    ) -> tuple[Tensor, ...]:
        """Everything kept so far with the new positions behind it; of that what the last one sees is kept.

        Raises:
            ValueError: another layer than before, or another number of sequences or heads than what is kept.
        """
        if self._layer is not None and self._layer() is not layer:
            expected = "one for each layer, as `caches = [Cache() for _ in layers]` makes them"
            raise ValueError(f"the cache holds {self.n_seen} positions of another layer: expected {expected}.")
        if self.kept and [t.shape[:-2] for t in self.kept] != [t.shape[:-2] for t in new]:
            held, came = (tuple(tensors[0].shape[:-2]) for tensors in (self.kept, new))
            raise ValueError(f"the cache holds sequences (and heads) {held}, and these are {came}: expected the same.")
        whole = tuple(torch.cat(both, dim=-2) for both in zip(self.kept, new, strict=True)) if self.kept else new
        self._layer = weakref.ref(layer)
        self.n_seen += new[0].shape[-2]
        visible = n_visible(self.n_seen, window, chunked)
        cuts = whole[0].shape[-2] > visible
        self.kept = tuple(tensor[..., -visible:, :].clone() for tensor in whole) if cuts else whole  # a view keeps all
        return whole

    @property
    def n_bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.kept)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    chunked: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """Queries (B, H, S, d) on keys (B, KV, L, d) and values (B, KV, L, d_v), to (B, H, S, d_v).

    The queries are the last S of L positions. Each sees itself and those before it, with `window` the last so many, or
    if it is `chunked` those in its chunk; the first of the L positions begins one, as it does in a cache.
    `sinks` (H,) are scores that take part in every softmax and bring no value.
    """
    n_new, n_all = q.shape[-2], k.shape[-2]
    options = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if n_new == 1 and sinks is None:  # sees all that the window leaves; heads that share a key are as many queries
        k, v = (t[..., -n_visible(n_all, window, chunked) :, :] for t in (k, v))
        grouped = q.reshape(len(q), k.shape[1], q.shape[1] // k.shape[1], q.shape[-1])
        y = F.scaled_dot_product_attention(grouped, k, v, scale=scale)
        return y.reshape(*q.shape[:-1], v.shape[-1])
    if n_new == n_all and window is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    here = torch.arange(n_all - n_new, n_all, device=q.device)[:, None]
    there = torch.arange(n_all, device=q.device)
    window = window or n_all
    near = there // window == here // window if chunked else there > here - window
    sees = (there <= here) & near  # (S, L)
    scores = torch.zeros_like(sees, dtype=q.dtype).masked_fill(~sees, float("-inf"))
    if sinks is not None:  # one more position, whose key and value are zero
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        of_sinks = sinks.to(q.dtype)[:, None, None].expand(-1, n_new, 1)
        scores = torch.cat([scores.expand(len(sinks), -1, -1), of_sinks], dim=-1)  # (H, S, L + 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=scores, **options)


class Attention(nn.Module):
    """Grouped-query attention: `n_heads` queries share `n_kv_heads` keys and values.

    Source: Ainslie et al. 2023, "GQA". With `n_kv_heads == n_heads` it is multi-head attention. Queries and keys may be
    normalised before RoPE turns them, each head by itself (Qwen3) or all heads as one row (OLMoE).
    """

    def __init__(self, config: LMConfig, window: int | None = None) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.rope_theta, self.window, self.chunked = config.rope_theta, window, config.chunked
        self.w_q = nn.Linear(config.d_model, config.n_heads * config.d_head, bias=config.qkv_bias)
        self.w_k = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=config.qkv_bias)
        self.w_v = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=config.qkv_bias)
        self.w_o = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=config.output_bias)
        self.sinks = nn.Parameter(torch.zeros(config.n_heads)) if config.attention_sinks else None
        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            heads = (1, 1) if config.qk_norm == "head" else (config.n_heads, config.n_kv_heads)
            self.q_norm, self.k_norm = (nn.RMSNorm(n * config.d_head, eps=config.norm_eps) for n in heads)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, S, D) to (B, S, D); a position sees itself, those before it in x, and those in the cache.

        The cache keeps keys and values, 2 · n_kv_heads · d_head numbers for each position.
        """
        batch, length, _ = x.shape
        n_seen = cache.n_seen if cache else 0
        q, k = self.w_q(x), self.w_k(x)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(batch, length, self.n_heads, self.d_head).transpose(1, 2)  # (B, heads, S, d_head)
        k = k.view(batch, length, self.n_kv_heads, self.d_head).transpose(1, 2)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        v = self.w_v(x).view(batch, length, self.n_kv_heads, self.d_head).transpose(1, 2)
        angles = rotary_angles(n_seen + length, self.d_head, self.rope_theta, x.device)[n_seen:]
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.extend(k, v, layer=self, window=self.window, chunked=self.chunked)
        mixed = attend(q, k, v, window=self.window, chunked=self.chunked, sinks=self.sinks)
        return self.w_o(mixed.transpose(1, 2).reshape(batch, length, self.n_heads * self.d_head))


class MLA(nn.Module):
    """Multi-head latent attention: the keys and values of all heads are read from one short vector per token.

    With c = norm(W_DKV x), head h has keys W_UK_h c and values W_UV_h c. RoPE would stand between W_UK and the query's
    matrix, so a part of every query and one key for all heads are turned, and the rest is not. A cache keeps c and the
    turned key alone.

    Source: DeepSeek-AI 2024 (DeepSeek-V2, arXiv 2405.04434), section 2.1 and appendix C, whose names the weights have:
    D for down, U for up.
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        mla = config.mla
        self.n_heads, self.rope_theta, self.config = config.n_heads, config.rope_theta, mla
        width = config.n_heads * (mla.d_nope + mla.d_rope)
        if mla.q_rank is None:
            self.w_q = nn.Linear(config.d_model, width, bias=False)
        else:
            self.w_dq = nn.Linear(config.d_model, mla.q_rank, bias=False)
            self.q_norm = nn.RMSNorm(mla.q_rank, eps=config.norm_eps)
            self.w_uq = nn.Linear(mla.q_rank, width, bias=False)
        self.w_dkv = nn.Linear(config.d_model, mla.kv_rank + mla.d_rope, bias=False)  # W_DKV above W_KR
        self.kv_norm = nn.RMSNorm(mla.kv_rank, eps=config.norm_eps)
        self.w_ukv = nn.Linear(mla.kv_rank, config.n_heads * (mla.d_nope + mla.d_value), bias=False)  # W_UK above W_UV
        self.w_o = nn.Linear(config.n_heads * mla.d_value, config.d_model, bias=False)

    def forward(self, x: Tensor, cache: Cache | None = None, *, absorb: bool = False) -> Tensor:
        """(B, S, D) to (B, S, D); a position sees itself, those before it in x, and those in the cache.

        The cache keeps kv_rank + d_rope numbers for each position.

        Args:
            absorb: carry queries into the latent space rather than keys and values out of it: the same result, and
                less work where one new position looks at many.
        """
        mla, (batch, length, _) = self.config, x.shape
        n_seen = cache.n_seen if cache else 0
        q = self.w_q(x) if mla.q_rank is None else self.w_uq(self.q_norm(self.w_dq(x)))
        q = q.view(batch, length, self.n_heads, mla.d_nope + mla.d_rope).transpose(1, 2)
        q_nope, q_rope = q.split([mla.d_nope, mla.d_rope], dim=-1)  # (B, H, S, d_nope), (B, H, S, d_rope)
        latent, k_rope = self.w_dkv(x).split([mla.kv_rank, mla.d_rope], dim=-1)
        latent = self.kv_norm(latent)  # (B, S, kv_rank)
        angles = rotary_angles(n_seen + length, mla.d_rope, self.rope_theta, x.device)[n_seen:]
        q_rope, k_rope = rotate(q_rope, angles), rotate(k_rope, angles)
        if cache is not None:
            latent, k_rope = cache.extend(latent, k_rope, layer=self)
        mix = self._in_latent_space if absorb else self._in_heads
        mixed = mix(q_nope, q_rope, latent, k_rope)  # (B, H, S, d_value)
        return self.w_o(mixed.transpose(1, 2).flatten(2))

    def _in_heads(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        """As the definition says: keys and values of every head first."""
        mla = self.config
        width = mla.d_nope + mla.d_value
        of_heads = self.w_ukv(latent).view(*latent.shape[:2], self.n_heads, width).transpose(1, 2)
        k_nope, v = of_heads.split([mla.d_nope, mla.d_value], dim=-1)
        k = torch.cat([k_nope, k_rope[:, None].expand(-1, self.n_heads, -1, -1)], dim=-1)
        return attend(torch.cat([q_nope, q_rope], dim=-1), k, v)

    def _in_latent_space(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        """q · (W_UK c) = (W_UKᵀ q) · c: one key and one value for all heads, both of them c."""
        mla = self.config
        w_uk, w_uv = self.w_ukv.weight.view(self.n_heads, -1, mla.kv_rank).split([mla.d_nope, mla.d_value], dim=1)
        q = torch.cat([q_nope @ w_uk, q_rope], dim=-1)  # (B, H, S, kv_rank + d_rope)
        k = torch.cat([latent, k_rope], dim=-1)[:, None]
        return attend(q, k, latent[:, None], scale=(mla.d_nope + mla.d_rope) ** -0.5) @ w_uv.mT
