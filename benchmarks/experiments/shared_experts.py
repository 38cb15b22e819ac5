"""Do finer and shared experts help, at equal active and equal total size?

Predicted: not at this size. All variants within one seed's spread of each other; fine-grained ones cost more time.
"""

from collections.abc import Sequence

from moe_lab.config import LMConfig, MoEConfig, TrainConfig
from moe_lab.experiments import Variant, main


def variants(model: LMConfig, training: TrainConfig) -> Sequence[Variant]:
    """The experts cut into 2, 4 and 8, and some of the small ones shared; every model has as many weights."""
    moe = model.moe

    def cut(m: int, n_shared: int = 0, **changes: object) -> MoEConfig:
        return moe.but(
            d_ff=moe.d_ff // m,
            n_experts=m * moe.n_experts - n_shared,
            top_k=m * moe.top_k - n_shared,
            n_shared_experts=n_shared,
            **changes,
        )

    layers = {
        "8 experts, 2 chosen": moe,
        "7 experts, 1 chosen, 1 shared": cut(1, 1, normalise=False),
        "7 experts, 1 chosen, 1 gated": cut(1, 1, normalise=False, shared_gate=True),
        "16 experts, 4 chosen": cut(2),
        "32 experts, 8 chosen": cut(4),
        "30 experts, 6 chosen, 2 shared": cut(4, 2),
        "64 experts, 16 chosen": cut(8),
    }
    return [Variant(name, model.but(moe=layer), training) for name, layer in layers.items()]


if __name__ == "__main__":
    main(__file__, __doc__.splitlines()[0], variants, n_seeds=5)
