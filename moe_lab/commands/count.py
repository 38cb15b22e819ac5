"""`moe-lab count`: what a model weighs and what it costs to run, from its configuration alone."""

import argparse
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_lab.accounting import (
    BYTES,
    cache_bytes,
    count_mtp,
    count_parameters,
    decode_flops,
    decode_reads,
    distinct_experts,
    table,
    training_bytes,
    training_flops_per_token,
    weight_bytes,
)
from moe_lab.config import LMConfig, SwitchConfig
from moe_lab.config_json import read_config_json
from moe_lab.paths import CourseError
from moe_lab.presets import PRESETS, UNDISCLOSED, Preset, find_preset
from moe_lab.roofline import prefill

CONTEXTS = (4096, 131_072)
MOST = 10**9  # tokens, or sequences at once
WIDTH = 80
Rows = Mapping[str, float]


@dataclass(frozen=True)
class Model:
    """What is counted: a preset or a file, and what there is to say of it beside numbers."""

    name: str
    config: LMConfig | SwitchConfig
    remarks: Sequence[str] = ()
    released: int | None = None  # bytes of the weights as their makers released them, where that mixes formats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `moe-lab count`."""
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="a released model's name, or the path of a config.json; several stand side by side, none lists the names",
    )
    parser.add_argument("--tokens", type=int, default=4096, help="length of a sequence, for FLOPs (default 4096)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8, 32, 256], help="sequences decoded at once (default 1 8 32 256)"
    )
    parser.add_argument(
        "--number", choices=BYTES, default="bf16", help="format of weights that are read (default bf16)"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the tables of some models, or the names of all."""
    if not args.models:
        print(listing())
        return 0
    for name, values in {"tokens": [args.tokens], "batch": args.batch}.items():
        if wrong := [value for value in values if not 1 <= value <= MOST]:
            raise CourseError(f"--{name} {wrong[0]}: expected 1 to {MOST:,}.")
    try:
        print(report([find_model(name) for name in args.models], args.tokens, args.batch, args.number))
    except ValueError as error:
        raise CourseError(str(error)) from None
    return 0


def listing() -> str:
    """All released models that are known, the smallest first."""
    sizes = {name: [count_parameters(preset.config, active).total for active in (False, True)]
             for name, preset in PRESETS.items()}  # fmt: skip
    rows = [("", "total", "active", "stated")]
    for name, (total, active) in sorted(sizes.items(), key=lambda item: item[1]):
        stated = " / ".join(filter(None, PRESETS[name].stated))
        rows.append((name, f"{total:,}", f"{active:,}" if active < total else "dense", stated))
    lines = [f"{name:<18}{total:>19}{active:>16}  {stated}".rstrip() for name, total, active, stated in rows]
    also = f"Undisclosed, so nothing is counted: {', '.join(UNDISCLOSED)}."
    return "\n".join([*lines, "", also, "All numbers of one: moe-lab count DeepSeek-V3, or the path of a config.json."])


# --- Models ---------------------------------------------------------------------------------------------------------


def find_model(name: str) -> Model:
    """The preset of that name, or the model that a file describes.

    Raises:
        ValueError: neither; an undisclosed model; a file that is no `config.json`.
    """
    if name.endswith(".json"):
        return _from_file(name)
    try:
        return _from_preset(find_preset(name))
    except ValueError as error:
        if Path(name).exists():
            return _from_file(name)
        hint = " Or give the path of a config.json." if "not known" in str(error) else ""
        raise ValueError(f"{error}{hint}") from None


def _from_preset(preset: Preset) -> Model:
    total, active = preset.stated
    stated = f"Stated: {total} in total" if total else "Stated: nothing"
    if active:
        fits = {True: " (fits with the embedding table)", False: " (fits without the embedding table)"}
        stated += f", {active} active{fits.get(preset.counts_embedding, '')}"
    remarks = [f"{stated}.", f"Source: {preset.source}."]
    remarks += _beside(preset.config, preset.n_mtp)
    return Model(preset.name, preset.config, remarks, preset.released_bytes)


def _from_file(path: str) -> Model:
    found = read_config_json(path)
    remarks = [f"As {path} says; its type is {found.model_type}.", *_beside(found.config, found.n_mtp)]
    remarks += [
        textwrap.shorten(f"Not understood, and so not counted: {name} = {value!r}", 2 * WIDTH - 4, placeholder=" …")
        for name, value in found.left_out.items()
    ]
    return Model(found.name, found.config, remarks)


def _beside(config: LMConfig | SwitchConfig, n_mtp: int) -> list[str]:
    if not n_mtp:
        return []
    modules = "1 module that predicts" if n_mtp == 1 else f"{n_mtp} modules that predict"
    return [f"Not in the total: {modules} a token further, {n_mtp * count_mtp(config).total:,} parameters."]


# --- Tables ---------------------------------------------------------------------------------------------------------


def report(
    models: Sequence[Model], tokens: int = 4096, batches: Sequence[int] = (1, 8, 32, 256), number: str = "bf16"
) -> str:
    """All tables of some models; of more than one, side by side.

    Args:
        tokens: the length of a sequence, for FLOPs.
        batches: how many sequences are decoded at once.
        number: the format of the weights that decoding reads.

    Raises:
        ValueError: fewer than one token or sequence.
    """
    models = _named_apart(models)
    sections = {
        "Parameters": {
            "all": lambda model: parameters(model.config),
            "of one token": lambda model: parameters(model.config, active=True),
        },
        "Memory": {"": lambda model: memory(model.config, model.released)},
        "GFLOPs for a token": {"": lambda model: flops(model.config, tokens)},
        "One step of decoding, a token a sequence": {
            "experts touched in a layer": lambda model: experts_touched(model.config, batches),
            f"GB of {number} weights read": lambda model: weights_read(model.config, batches, number),
        },
    }
    parts = [_about(model) for model in models]
    parts += [each for title, columns in sections.items() for each in _tables(title, columns, models)]
    decoders = [model.config for model in models if isinstance(model.config, LMConfig)]
    notes = {
        "MXFP4 has 4.25 bits a number, its scales with it. Each format is counted as if all weights had it.": True,
        "As released, parts are in fp8 or MXFP4 with their scales, and the rest in bf16.": any(
            model.released for model in models
        ),
        "A prompt asks the head once, for its last token; training asks it for every one.": decoders,
        "Latent attention decodes in the space of the latent: a new token takes more operations than one of a prompt, "
        "and reads fewer bytes.": any(config.mla for config in decoders),
        "Experts are touched as if all were as likely; real text touches fewer.": any(
            config.moe for config in decoders
        ),
        "Not counted of an encoder-decoder: cache, FLOPs, and what decoding reads.": len(decoders) < len(models),
    }
    parts.append("\n".join(textwrap.fill(text, WIDTH, subsequent_indent="  ") for text, fits in notes.items() if fits))
    return "\n\n".join(parts)


def parameters(config: LMConfig | SwitchConfig, active: bool = False) -> Rows:
    """Parameters by part, with their sum under both conventions."""
    counted = count_parameters(config, active)
    sums = {"total": counted.total, "total without embedding": counted.without_embedding}
    return counted.by_part() | sums


def memory(config: LMConfig | SwitchConfig, released: int | None = None) -> Rows:
    """Weights by format and as released, what training holds, and a decoder's cache in bf16."""
    rows = {f"weights in {number}, GB": weight_bytes(config, number) / 1e9 for number in BYTES}
    if released:
        rows["weights as released, GB"] = released / 1e9
    rows["in training with Adam, GB"] = training_bytes(config).total / 1e9
    if isinstance(config, LMConfig):
        rows["bf16 cache of a token, bytes"] = cache_bytes(config)
        rows |= {f"bf16 cache of {n:,} tokens, GB": cache_bytes(config, n) / 1e9 for n in CONTEXTS}
    return rows


def flops(config: LMConfig | SwitchConfig, tokens: int) -> Rows:
    """Billions of operations for one token: read, generated, and trained on; nothing for an encoder-decoder."""
    if isinstance(config, SwitchConfig):
        return {}
    return {
        f"prefill of {tokens:,} tokens": prefill(config, tokens).flops / tokens / 1e9,
        f"a new one after {tokens:,}": decode_flops(config, tokens) / 1e9,
        f"training on {tokens:,} tokens": training_flops_per_token(config, tokens) / 1e9,
    }


def experts_touched(config: LMConfig | SwitchConfig, batches: Sequence[int]) -> Rows:
    """How many experts of a layer are read in a step of decoding, by batch; nothing where there are none."""
    if isinstance(config, SwitchConfig) or not config.moe:
        return {}
    moe = config.moe
    touched = {f"batch {batch:,}": distinct_experts(moe.n_experts, moe.top_k, batch) for batch in batches}
    return touched | {"in all": moe.n_experts}


def weights_read(config: LMConfig | SwitchConfig, batches: Sequence[int], number: str) -> Rows:
    """Gigabytes of weights that are read in a step of decoding, by batch; nothing for an encoder-decoder."""
    if isinstance(config, SwitchConfig):
        return {}
    read = {f"batch {batch:,}": decode_reads(config, batch) for batch in batches}
    read["in all"] = count_parameters(config).without_embedding
    return {name: n * BYTES[number] / 1e9 for name, n in read.items()}


def _tables(title: str, columns: Mapping[str, Callable[[Model], Rows]], models: Sequence[Model]) -> list[str]:
    """One model's columns in one table; of several models, a table for every column."""
    if len(models) == 1:
        one = {name: rows(models[0]) for name, rows in columns.items()}
        first = next(iter(one))
        return _table(title, {name: rows for name, rows in one.items() if name == first or rows != one[first]})
    made = []
    for name, rows in columns.items():
        made += _table(f"{title}: {name}" if name else title, {model.name: rows(model) for model in models})
    return made


def _table(title: str, columns: Mapping[str, Rows]) -> list[str]:
    """A table under its title, without columns that are empty and rows that are 0 in all; none if nothing is left."""
    columns = {name: rows for name, rows in columns.items() if rows}
    kept = {row for rows in columns.values() for row, n in rows.items() if n}
    columns = {name: {row: n for row, n in rows.items() if row in kept} for name, rows in columns.items()}
    lines = [f"  {line}" for line in table(columns).splitlines() if line]
    return ["\n".join([title, *lines])] if columns else []


def _about(model: Model) -> str:
    config = model.config
    if isinstance(config, SwitchConfig):
        n_layers = config.n_encoder_layers + config.n_decoder_layers
        n_experts, top_k, shared = config.n_experts, 1, 0
    else:
        n_layers, moe = config.n_layers, config.moe
        n_experts, top_k, shared = (moe.n_experts, moe.top_k, moe.n_shared_experts) if moe else (0, 0, 0)
    shape = f"{n_layers} layers, {config.d_model:,} wide; "
    if n_experts:
        plus = f" + {shared} shared" if shared else ""
        share = count_parameters(config, active=True).total / count_parameters(config).total
        shape += f"{config.n_moe_layers} of them with {n_experts:,} experts, {top_k}{plus} for a token. "
        shape += f"It uses {share:.1%} of the parameters."
    else:
        shape += "dense."
    whole = {"break_long_words": False, "break_on_hyphens": False}  # paths are to be copied
    lines = (
        textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ", **whole)
        for text in (shape, *model.remarks)
    )
    return "\n".join([model.name, *lines])


def _named_apart(models: Sequence[Model]) -> list[Model]:
    """The models, those with a name that came before numbered: `config.json` files lie in folders of any name."""
    made: dict[str, Model] = {}
    for model in models:
        name, n = model.name, 1
        while name in made:
            n += 1
            name = f"{model.name} ({n})"
        made[name] = replace(model, name=name)
    return list(made.values())
