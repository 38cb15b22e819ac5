"""Which strength does the loss-free bias need when routers learn no faster than the rest?

The model and the cures of `balance.py`, but with routers at everybody's learning rate.

Predicted: MaxVio without a cure is between 2 and 5; the bias brings it below 1 with both kinds of score from some
γ on, and too large a γ makes it worse again.
"""

from collections.abc import Sequence

from moe_lab.config import BalanceConfig, LMConfig, TrainConfig
from moe_lab.experiments import Variant, main

STEPS = 200
RATES = (1e-4, 1e-3, 1e-2, 1e-1)


def variants(model: LMConfig, training: TrainConfig) -> Sequence[Variant]:
    """No cure, one Switch loss to compare with, and the bias at several steps, for both kinds of score."""
    softmax = model.moe.but(n_experts=16, top_k=1, normalise=False)
    sigmoid = softmax.but(score="sigmoid")
    short = training.but(steps=min(STEPS, training.steps))

    def biased(rate: float) -> TrainConfig:
        return short.but(balance=BalanceConfig(bias_rate=rate))

    return (
        Variant("no cure", model.but(moe=softmax), short),
        Variant("switch 0.01", model.but(moe=softmax), short.but(balance=BalanceConfig(alpha=0.01))),
        *(Variant(f"softmax bias {r:g}", model.but(moe=softmax.but(selection_bias=True)), biased(r)) for r in RATES),
        Variant("sigmoid, no cure", model.but(moe=sigmoid), short),
        *(Variant(f"sigmoid bias {r:g}", model.but(moe=sigmoid.but(selection_bias=True)), biased(r)) for r in RATES),
    )


if __name__ == "__main__":
    main(__file__, __doc__.splitlines()[0], variants, n_seeds=3)
