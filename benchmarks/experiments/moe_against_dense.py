"""What does a mixture of experts win over a dense model that costs a token as much?

Predicted: some .08 bits per byte at equal active size, most of it because there are more weights: a router that is
frozen as it was drawn keeps most of the gain, and a dense model with as many weights in all does better still.
"""

from collections.abc import Sequence

from moe_lab.config import LMConfig, TrainConfig
from moe_lab.experiments import Variant, main


def variants(model: LMConfig, training: TrainConfig) -> Sequence[Variant]:
    """The experts, what they are held against, and the controls; `model` has experts."""
    moe = model.moe
    dense = model.but(moe=None, n_dense_layers=0)
    active, total = (n * moe.d_ff for n in (moe.top_k, moe.n_experts))
    return (
        Variant("dense, equal active", dense.but(d_ff=active), training),
        Variant("MoE", model, training),
        Variant("MoE, frozen router", model, training.but(router_rate=0.0)),
        Variant("MoE, top-1", model.but(moe=moe.but(top_k=1, d_ff=active, normalise=False)), training),
        Variant("dense, equal total", dense.but(d_ff=total), training),
    )


if __name__ == "__main__":
    main(__file__, __doc__.splitlines()[0], variants, n_seeds=5)
