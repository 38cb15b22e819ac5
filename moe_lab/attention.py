"""Causal self-attention: grouped-query attention with rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lab.config import LMConfig


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


class Attention(nn.Module):
    """Grouped-query attention: `n_heads` queries share `n_kv_heads` keys and values.

    Source: Ainslie et al. 2023, "GQA". With `n_kv_heads == n_heads` it is multi-head attention. Queries and keys may be
    normalised before RoPE turns them, each head by itself (Qwen3) or all heads as one row (OLMoE).
    """

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head = config.n_heads, config.n_kv_heads, config.d_head
        self.rope_theta = config.rope_theta
        self.w_q = nn.Linear(config.d_model, config.n_heads * config.d_head, bias=False)
        self.w_k = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=False)
        self.w_v = nn.Linear(config.d_model, config.n_kv_heads * config.d_head, bias=False)
        self.w_o = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm != "none":
            heads = (1, 1) if config.qk_norm == "head" else (config.n_heads, config.n_kv_heads)
            self.q_norm, self.k_norm = (nn.RMSNorm(n * config.d_head, eps=config.norm_eps) for n in heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D); position s sees positions 0 … s."""
        batch, length, _ = x.shape
        q, k = self.w_q(x), self.w_k(x)
        if self.qk_norm == "all":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(batch, length, self.n_heads, self.d_head).transpose(1, 2)  # (B, heads, S, d_head)
        k = k.view(batch, length, self.n_kv_heads, self.d_head).transpose(1, 2)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        v = self.w_v(x).view(batch, length, self.n_kv_heads, self.d_head).transpose(1, 2)
        angles = rotary_angles(length, self.d_head, self.rope_theta, x.device)
        mixed = F.scaled_dot_product_attention(
            rotate(q, angles),
            rotate(k, angles),
            v,
            is_causal=True,
            enable_gqa=self.n_kv_heads != self.n_heads,
        )
        return self.w_o(mixed.transpose(1, 2).reshape(batch, length, self.n_heads * self.d_head))
