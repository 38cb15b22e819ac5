"""The mixture-of-experts layer, and two slow versions of it that say what it computes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_lab.config import MoEConfig
from moe_lab.dispatch import combine, expert_capacity, make_plan, permute, weights_of_rows
from moe_lab.experts import Experts
from moe_lab.ffn import MLP, SwiGLU
from moe_lab.ops import moe_mlp
from moe_lab.records import DispatchPlan, ExpertChoice, Routing
from moe_lab.routing import Router, expert_choice


class SharedExperts(nn.Module):
    """Experts that every token visits, held as one FFN as wide as all of them; with `gated`, times a sigmoid."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        is_swiglu = config.expert == "swiglu"
        make = SwiGLU if is_swiglu else lambda d_model, d_ff: MLP(d_model, d_ff, config.expert)
        self.ffn = make(config.d_model, config.d_ff_shared)
        self.gate = nn.Linear(config.d_model, 1, bias=False) if config.shared_gate else None

    def forward(self, tokens: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        y = self.ffn(tokens)
        return y if self.gate is None else torch.sigmoid(self.gate(tokens)) * y


class MoE(nn.Module):
    """`y = Σ_k weight_k · expert_k(x) (+ shared(x))`, over the k experts that the router chooses for each token.

    Source: Shazeer et al. 2017, equation 1; Dai et al. 2024 (DeepSeekMoE), equation 9, for shared experts.

    Args:
        impl: how rows meet their expert's matrices: a key of `moe_lab.ops.GROUPED_MM`, or "auto".
        check_finite: see `Router`.
    """

    def __init__(self, config: MoEConfig, impl: str = "auto", check_finite: bool = False) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, check_finite)
        self.experts = Experts(config, impl)
        self.shared = SharedExperts(config) if config.n_shared_experts else None

    @property
    def is_fused(self) -> bool:
        """Whether `moe_lab.ops.moe_mlp` computes the experts' part in one piece.

        It does with impl="triton" for SwiGLU without biases, weighed at the output, without a capacity, as long as
        `experts` has no hooks: they would not run, because a fused layer does not call it. Any other layer goes step by
        step, its products through `grouped_mm`.
        """
        config, experts = self.config, self.experts
        plain = config.expert == "swiglu" and not config.expert_bias and config.weigh == "output"
        hooked = experts._forward_pre_hooks or experts._forward_hooks
        hooked = hooked or experts._backward_pre_hooks or experts._backward_hooks
        return plain and config.capacity_factor is None and experts.impl == "triton" and not hooked

    def plan(self, routing: Routing) -> DispatchPlan:
        """Where the tokens' choices go, under this layer's capacity."""
        config = self.config
        if config.capacity_factor is None:
            return make_plan(routing)
        n_tokens = len(routing.topk_experts)
        capacity = expert_capacity(n_tokens, config.top_k, config.n_experts, config.capacity_factor)
        return make_plan(routing, capacity, config.drop)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """(..., D) to (..., D), and the routing of its tokens in the order in which they lie in `x`.

        Raises:
            ValueError: an input of another width, dtype or device than the layer; NaN or infinite logits (`Router`).
        """
        self._require_input(x)
        tokens = x.reshape(-1, x.shape[-1])  # (T, D)
        routing = self.router(tokens)
        plan = self.plan(routing)
        weights = routing.topk_weights
        if self.is_fused:  # the three steps below in one
            y = moe_mlp(tokens, self.experts.w_in, self.experts.w_down, plan, weights, self.experts.impl)  # (T, D)
        else:
            rows = permute(tokens, plan)  # (R, D)
            if self.config.weigh == "input":
                rows = rows * weights_of_rows(weights, plan).to(rows.dtype)
                weights = torch.ones_like(weights)
            y = combine(self.experts(rows, plan.offsets), plan, weights)  # (T, D)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view_as(x), routing

    def _require_input(self, x: Tensor) -> None:
        weight = self.experts.w_down
        if x.ndim < 2 or x.shape[-1] != self.config.d_model:
            expected = f"(..., T, D) with D = d_model={self.config.d_model}"
            raise ValueError(f"x has shape {tuple(x.shape)}: expected {expected}.")
        if x.device != weight.device:
            raise ValueError(f"x is on {x.device}, the layer on {weight.device}: move one of them with .to(...).")
        has_autocast = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
        if x.dtype != weight.dtype and not (has_autocast and x.is_floating_point()):
            raise ValueError(f"x is {x.dtype}, the layer {weight.dtype}: convert one of them with .to(...).")


class ExpertChoiceMoE(MoE):
    """Experts that choose their tokens: each the C that score it highest, C being its even share of the choices.

    All experts are equally busy by construction. But whether a token is taken depends on all other tokens in `x`, those
    after it included: a language model trained like this has seen the future, and does not have it when it generates.

    Source: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, ExpertChoice]:
        """(..., D) to (..., D), and who chose whom; see `MoE.forward`."""
        self._require_input(x)
        config, tokens = self.config, x.reshape(-1, x.shape[-1])  # (T, D)
        capacity = expert_capacity(len(tokens), config.top_k, config.n_experts, config.capacity_factor or 1.0)
        choice = expert_choice(self.router.checked_logits(tokens), min(capacity, len(tokens)))
        chosen = choice.tokens.flatten()  # (R,), expert by expert
        ends = torch.arange(1, config.n_experts + 1, dtype=torch.int32, device=x.device) * choice.tokens.shape[1]
        rows = self.experts(tokens.index_select(0, chosen), ends)  # (R, D)
        weighted = rows * choice.weights.flatten()[:, None].to(rows.dtype)
        y = weighted.new_zeros(tokens.shape).index_add(0, chosen, weighted)  # (T, D)
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view_as(x), choice


# Both take `expert(e, x)`, what expert e computes of x, as `layer.experts.one` does.


def moe_reference(
    x: Tensor,
    routing: Routing,
    expert: Callable[[int, Tensor], Tensor],
    dropped: Tensor | None = None,
    weigh: str = "output",
) -> Tensor:
    """The definition, slowly: every expert on every token, times a weight that is mostly zero; (T, D) to (T, D).

    Args:
        dropped: (T, K), choices that found their expert full.
    """
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        visits = routing.topk_experts == e  # (T, K)
        if dropped is not None:
            visits = visits & ~dropped
        weight = (routing.topk_weights * visits).sum(-1, keepdim=True).to(x.dtype)  # (T, 1)
        y = y + (visits.any(-1, keepdim=True) * expert(e, x * weight) if weigh == "input" else weight * expert(e, x))
    return y


def moe_loop(x: Tensor, routing: Routing, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The same without wasted work: each expert picks its tokens, works on them, and adds them back.

    Most implementations began like this. It stops E times to look up who chose an expert, and adds into `y` E times.
    """
    y = torch.zeros_like(x)
    for e in range(routing.n_experts):
        tokens, slots = torch.where(routing.topk_experts == e)
        weight = routing.topk_weights[tokens, slots, None].to(x.dtype)
        y = y.index_add(0, tokens, weight * expert(e, x[tokens]))
    return y
