"""What does each cure for an unbalanced router do to load, loss and specialisation?

The routers learn ten times as fast as the rest, with one of sixteen experts a token, so that collapse shows within 200
steps.

Predicted: without a cure MaxVio ends between 5 and 12 in the second layer, and the loss hardly suffers. The Switch loss
balances from α 0.01 on, and at the strongest makes choices that say less about the domain. The z-loss balances nothing.
The bias works at small steps with sigmoid scores, and fails at γ 0.1.
"""

from collections.abc import Sequence

from moe_lab.config import BalanceConfig, LMConfig, TrainConfig
from moe_lab.experiments import Variant, main

STEPS = 200
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
Z_LOSSES = (1e-3, 1e-2, 1e-1)
MICRO_BATCHES = 8


def variants(model: LMConfig, training: TrainConfig) -> Sequence[Variant]:
    """No cure, and every cure at several strengths."""
    moe = model.moe.but(n_experts=16, top_k=1, normalise=False)
    softmax = model.but(moe=moe)
    with_bias = model.but(moe=moe.but(selection_bias=True))
    sigmoid = model.but(moe=moe.but(score="sigmoid"))
    sigmoid_with_bias = model.but(moe=moe.but(score="sigmoid", selection_bias=True))
    fast = training.but(steps=min(STEPS, training.steps), router_rate=10.0)

    def cured(micro_batches: int = 1, **cure: object) -> TrainConfig:
        return fast.but(balance=BalanceConfig(**cure), micro_batches=micro_batches)

    return (
        Variant("no cure", softmax, fast),
        *(Variant(f"switch {a:g}", softmax, cured(alpha=a)) for a in ALPHAS),
        *(Variant(f"sequence {a:g}", softmax, cured(loss="sequence", alpha=a)) for a in ALPHAS[1:]),
        *(Variant(f"micro-batch {a:g}", softmax, cured(MICRO_BATCHES, alpha=a)) for a in (1e-1, 1.0)),
        *(
            Variant(f"global batch {a:g}", softmax, cured(MICRO_BATCHES, loss="global_batch", alpha=a))
            for a in (1e-1, 1.0)
        ),
        *(Variant(f"z-loss {c:g}", softmax, cured(z_loss=c)) for c in Z_LOSSES),
        *(Variant(f"softmax bias {r:g}", with_bias, cured(bias_rate=r)) for r in RATES),
        Variant("sigmoid, no cure", sigmoid, fast),
        *(Variant(f"sigmoid bias {r:g}", sigmoid_with_bias, cured(bias_rate=r)) for r in RATES),
        Variant("sigmoid bias 0.01, re-centred", sigmoid_with_bias, cured(bias_rate=1e-2, recentre=True)),
        Variant("expert choice", model.but(moe=moe.but(expert_choice=True)), fast),
    )


if __name__ == "__main__":
    main(__file__, __doc__.splitlines()[0], variants, n_seeds=3)
