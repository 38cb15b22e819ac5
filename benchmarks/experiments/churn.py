"""Do routers calm down, or does the learning rate calm them?

Predicted: choices change less and less with a cosine; with a constant rate they go on changing several times as often.
"""

from collections.abc import Sequence

from moe_lab.config import LMConfig, TrainConfig
from moe_lab.experiments import Variant, main


def variants(model: LMConfig, training: TrainConfig) -> Sequence[Variant]:
    """One model under two schedules."""
    return (
        Variant("cosine to zero", model, training, follow_churn=True),
        Variant("constant", model, training.but(schedule="constant"), follow_churn=True),
    )


if __name__ == "__main__":
    main(__file__, __doc__.splitlines()[0], variants, n_seeds=3)
