"""MoE Lab: the package behind the notebooks. `import moe_lab` is light; a name loads when it is first used."""

import importlib

__version__ = "0.1.0"

_HOME = {
    "LMConfig": "config",
    "MoEConfig": "config",
    "RouterConfig": "config",
    "TrainConfig": "config",
    "BalanceConfig": "config",
    "MLP": "ffn",
    "SwiGLU": "ffn",
    "LM": "lm",
    "Trainer": "train",
    "MoE": "moe",
    "Router": "routing",
    "Routing": "records",
    "Corpus": "data",
    "load_corpus": "data",
    "count_flops": "accounting",
    "count_parameters": "accounting",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
