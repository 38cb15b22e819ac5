"""The exercise of notebook 00: one minute, to see how an exercise works."""

import math

from moe_lab.course.bank import Case, Exercise, Mistake


def nats_to_bits(nats: float) -> float:
    """A loss in nats, as torch gives it, in bits."""
    return nats / math.log(2)


EXERCISES = (
    Exercise(
        id="0.1",
        title="from nats to bits",
        reference=nats_to_bits,
        cases=lambda: [
            Case(name="a coin", args=(math.log(2),), show="nats = ln 2: the surprise of one fair coin"),
            Case(name="any of 256 bytes", args=(math.log(256),), show="nats = ln 256: every byte equally likely"),
            Case(name="certainty", args=(0.0,), show="nats = 0: no surprise at all"),
            Case(name="something else", args=(1.7,)),
        ],
        mistakes=(
            Mistake(
                name="multiplied by ln 2",
                wrong=lambda nats: nats * math.log(2),
                says="You multiplied by ln 2; divide instead. A nat is the larger unit (one nat is 1.44 bits), so the "
                "number of bits must come out larger than the number of nats.",
            ),
            Mistake(
                name="logarithm of the loss",
                wrong=lambda nats: math.log2(nats) if nats > 0 else -math.inf,
                says="You took the logarithm of the loss. The loss is a logarithm already; only its base changes, and "
                "that is a division by a constant.",
            ),
            Mistake(
                name="base 10",
                wrong=lambda nats: nats / math.log(10),
                says="You divided by ln 10, which gives decimal digits. Bits belong to base 2.",
            ),
            Mistake(
                name="perplexity",
                wrong=lambda nats: math.exp(nats),
                says="That is the perplexity, exp(loss): how many equally likely choices the surprise is worth. Bits "
                "are the base-2 logarithm of that number.",
            ),
        ),
    ),
)
