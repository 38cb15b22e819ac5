"""A byte-level, decoder-only language model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_lab.attention import MLA, Attention
from moe_lab.config import LMConfig
from moe_lab.experts import Experts
from moe_lab.ffn import make_ffn
from moe_lab.moe import ExpertChoiceMoE, MoE
from moe_lab.records import ExpertChoice, Routing
from moe_lab.routing import Router

# Attention starts quiet, so that a small model first learns which byte follows which, and only then looks back.
ATTENTION_OUTPUT_SCALE = 0.3
# The head starts near zero, so that the first prediction is "any byte": a loss of 8 bits.
HEAD_SCALE = 0.1


class CausalConv(nn.Module):
    """Adds to each position a learned, per-channel mix of itself and the bytes just before it.

    A two-layer model of bytes is short of ways to see a word; this gives it one for `width * D` parameters.
    """

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(d_model, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        past_and_present = F.pad(x.transpose(1, 2), (self.width - 1, 0))  # (B, D, S + width - 1)
        mixed = F.conv1d(past_and_present, self.weight, groups=self.weight.shape[0])
        return x + mixed.transpose(1, 2)


class Block(nn.Module):
    """One decoder block: attention, then the FFN or the experts, each on a normalised copy and added back."""

    def __init__(self, config: LMConfig, layer: int = 0) -> None:
        super().__init__()
        is_moe = config.has_experts(layer)
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = MLA(config) if config.mla else Attention(config, config.window_of(layer))
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        make_experts = ExpertChoiceMoE if is_moe and config.moe.expert_choice else MoE
        self.ffn = make_experts(config.moe) if is_moe else make_ffn(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing | ExpertChoice | None]:
        """(B, S, D) to (B, S, D), and how the tokens were routed if the FFN is a layer of experts."""
        x = x + self.attention(self.attention_norm(x))
        y, routing = self.ffn(self.ffn_norm(x)) if isinstance(self.ffn, MoE) else (self.ffn(self.ffn_norm(x)), None)
        return x + y, routing


class LM(nn.Module):
    """Bytes in, a distribution over the next byte out."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.conv = CausalConv(config.d_model, config.conv_width) if config.conv_width else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: every matrix from N(0, 1 / fan_in), the embedding from N(0, 1)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, CausalConv):
                nn.init.normal_(module.weight, std=module.width**-0.5)
            elif isinstance(module, Router | Experts):
                module.reset_parameters()
        self.head.weight.mul_(HEAD_SCALE)
        # With one table for both ends the head's scale wins, or the first logits would be sqrt(D) too large.
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5 if self.config.tied_embeddings else 1.0)
        for block in self.blocks:
            block.attention.w_o.weight.mul_(ATTENTION_OUTPUT_SCALE)

    @property
    def moe_layers(self) -> tuple[MoE, ...]:
        """The layers of experts, from the bottom up."""
        return tuple(block.ffn for block in self.blocks if isinstance(block.ffn, MoE))

    def forward(
        self, tokens: Tensor, *, recompute: bool = False
    ) -> tuple[Tensor, tuple[Routing, ...] | tuple[ExpertChoice, ...]]:
        """(B, S) byte ids to logits (B, S, V), and what each MoE layer decided for the B·S tokens (nothing if dense).

        Args:
            recompute: keep only what goes from block to block; the backward pass computes the rest again, with the
                same numbers. What the layers decided is returned once, so that no loss counts it twice.
        """
        x, routings = self.conv(self.embedding(tokens)), []
        for block in self.blocks:
            x, routing = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if routing is not None:
                routings.append(routing)
        return self.head(self.norm(x)), tuple(routings)


@contextmanager
def watch_hidden(model: LM, see: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """While it lasts, `see(layer, hidden)` meets what every dense FFN's neurons hold, (B, S, F), before `w_down`.

    What `see` returns goes on in its place; None leaves it as it is. Layers of experts are passed over.
    """
    hooks = [
        block.ffn.w_down.register_forward_pre_hook(lambda _module, inputs, layer=layer: see(layer, inputs[0]))
        for layer, block in enumerate(model.blocks)
        if not isinstance(block.ffn, MoE)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def generate(
    model: LM, prompt: Tensor, n_new: int, *, temperature: float = 0.8, context: int = 64, seed: int = 0
) -> Tensor:
    """Continue a prompt of byte ids (S,) by `n_new` bytes; temperature 0 takes the likeliest byte each time.

    Raises:
        ValueError: an empty prompt, or a negative temperature.
    """
    if prompt.ndim != 1 or prompt.numel() == 0:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}: expected (S,) with at least one byte.")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: expected 0 or more.")
    generator = torch.Generator(device=prompt.device).manual_seed(seed)
    tokens = prompt
    for _ in range(n_new):
        logits = model(tokens[None, -context:])[0][0, -1]
        if temperature == 0:
            new = logits.argmax(keepdim=True)
        else:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, new])
    return tokens
