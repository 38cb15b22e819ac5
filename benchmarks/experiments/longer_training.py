"""Does the gain grow with longer training, and does learning to route begin to pay?

After 500 steps the experts win some .05 bits over the dense model, and a router frozen as it was drawn wins as much.

Predicted, for three times the steps: a gain near .1 bits, and a frozen router that keeps most of it, but not all.
"""

from collections.abc import Sequence

from moe_lab.config import BalanceConfig, LMConfig, TrainConfig
from moe_lab.experiments import Variant, main

TIMES = 3
ALPHA = 0.01


def variants(model: LMConfig, training: TrainConfig) -> Sequence[Variant]:
    """The experts with a learned router, with a learned and balanced one, with a frozen one; and the dense model."""
    long = training.but(steps=TIMES * training.steps)
    dense = model.but(moe=None, n_dense_layers=0, d_ff=model.moe.top_k * model.moe.d_ff)
    return (
        Variant("dense, equal active", dense, long),
        Variant("MoE", model, long),
        Variant(f"MoE, switch {ALPHA:g}", model, long.but(balance=BalanceConfig(alpha=ALPHA))),
        Variant("MoE, frozen router", model, long.but(router_rate=0.0)),
    )


if __name__ == "__main__":
    main(__file__, __doc__.splitlines()[0], variants, n_seeds=3)
