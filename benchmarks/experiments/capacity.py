"""Does collapse cost more when a full expert drops what it cannot take?

The model of `balance.py`, with a fast router. With a capacity of 1.25 even shares a collapsed router loses most of its
tokens: they pass the layer without an expert.

Predicted: with the capacity, the model without a cure loses some hundredths of a bit against the balanced one, and
without the capacity nothing that three seeds could show.
"""

from collections.abc import Sequence

from moe_lab.config import BalanceConfig, LMConfig, TrainConfig
from moe_lab.experiments import CAPACITY_FACTOR, Variant, main

STEPS = 200
ALPHA = 0.1


def variants(model: LMConfig, training: TrainConfig) -> Sequence[Variant]:
    """With and without a cure, with and without a capacity."""
    moe = model.moe.but(n_experts=16, top_k=1, normalise=False)
    fast = training.but(steps=min(STEPS, training.steps), router_rate=10.0)
    cured = fast.but(balance=BalanceConfig(alpha=ALPHA))
    return [
        Variant(f"{cure}, {kept}", model.but(moe=moe.but(capacity_factor=factor)), how)
        for kept, factor in (("nothing dropped", None), (f"capacity {CAPACITY_FACTOR:g}", CAPACITY_FACTOR))
        for cure, how in (("no cure", fast), (f"switch {ALPHA:g}", cured))
    ]


if __name__ == "__main__":
    main(__file__, __doc__.splitlines()[0], variants, n_seeds=3)
