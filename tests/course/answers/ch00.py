"""Right answers to chapter 0 in three styles, and each of its mistakes in two forms."""

import math

import numpy as np
import torch

RIGHT = {
    "0.1": [
        lambda nats: nats * math.log2(math.e),
        lambda nats: math.log2(math.exp(nats)),
        lambda nats: torch.tensor(nats) / torch.log(torch.tensor(2.0)),
    ],
}

WRONG = {
    "0.1": {
        "multiplied by ln 2": [lambda nats: nats * 0.6931471805599453, lambda nats: nats / math.log2(math.e)],
        "logarithm of the loss": [
            lambda nats: -math.inf if nats == 0 else math.log(nats) / math.log(2),
            lambda nats: float(torch.tensor(nats).log2()),
        ],
        "base 10": [lambda nats: nats * math.log10(math.e), lambda nats: float(np.log10(np.exp(nats)))],
        "perplexity": [lambda nats: math.e**nats, lambda nats: float(np.exp(nats))],
    },
}
