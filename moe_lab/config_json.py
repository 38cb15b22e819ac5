"""Reads the `config.json` that comes with a model's weights (Hugging Face's format) into an `LMConfig`. No torch.

What is read was held against the families' classes in transformers 5 (tests/test_config_json.py).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe_lab.config import LMConfig, MLAConfig, MoEConfig
from moe_lab.plain import ConfigError
from moe_lab.presets import MOE_FAMILIES

MOST_LAYERS = 10_000  # more is a slip of the pen, and would take minutes to count
MOST = 10**15  # of anything
MOST_DIGITS = 100  # of a whole number: more than any has that could be counted
MOST_BYTES = 16 * 2**20  # the file has a few kilobytes; weights have more


class ConfigJsonError(ConfigError, ValueError):
    """A file is no `config.json` of a model that can be counted; the message says why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """A model as its `config.json` describes it.

    Args:
        name: the file's folder, or its own name if it is not called `config.json`.
        model_type: the family, as the file calls it.
        n_mtp: modules beside the model that predict one token further.
        left_out: fields that are not known here, with their values: what they say is not in `config`.
    """

    name: str
    model_type: str
    config: LMConfig
    n_mtp: int = 0
    left_out: dict[str, Any] = field(default_factory=dict)


# --- Families -------------------------------------------------------------------------------------------------------

# Our fields by theirs. A field with a question mark may be missing or null, and is then as by default; "a|b" are two
# names of one field. Where transformers has a default that is one model's size, the file has to say it.
_DENSE = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim?",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps?",
    "tied_embeddings": "tie_word_embeddings?",
}
_BIASES = {"qkv_bias": "attention_bias?", "output_bias": "attention_bias?"}
_EXPERTS = {
    "n_experts": "num_experts|num_local_experts",
    "top_k": "num_experts_per_tok",
    "d_ff": "intermediate_size",
    "normalise": "norm_topk_prob?",
}
_LOCAL_EXPERTS = _EXPERTS | {"n_experts": "num_local_experts|num_experts"}
_FINE_EXPERTS = _EXPERTS | {"d_ff": "moe_intermediate_size"}
_DEEPSEEK_EXPERTS = _FINE_EXPERTS | {
    "n_experts": "n_routed_experts|num_experts|num_local_experts",
    "n_shared_experts": "n_shared_experts",
    "scaling_factor": "routed_scaling_factor?",
    "n_groups": "n_group?",
    "groups_kept": "topk_group?",
}
_LATENT_DENSE = {ours: theirs for ours, theirs in _DENSE.items() if ours != "d_head"} | {
    "n_kv_heads": "num_key_value_heads?"
}
_LATENT = {
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "d_nope": "qk_nope_head_dim",
    "d_rope": "qk_rope_head_dim",
    "d_value": "v_head_dim",
}


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What a family's file says, and how.

    Args:
        architecture: the class, and others that hold the same.
        fields, experts, latent: the fields of `LMConfig`, `MoEConfig` and `MLAConfig` by those of the file.
        always, experts_always: what the family has, unless its file says otherwise.
        placed_by: the fields that say which layers have experts; none if all do.
        windows: the fields that say which layers see how much, the size first.
        chunked: whether windows are chunks, in place of sliding.
        windowed: whether a layer, counted from 0, has the window if there is no `layer_types`; the second argument is
            what `max_window_layers` says.
        norm_if: a field that says whether each head's queries and keys have a norm; the file may lack it.
        must_be: values that another count would follow from; missing is right, too.
        ignored: fields that change no count in this family.
    """

    architecture: tuple[str, ...]
    fields: Mapping[str, str]
    always: Mapping[str, Any] = field(default_factory=dict)
    experts: Mapping[str, str] | None = None
    experts_always: Mapping[str, Any] = field(default_factory=dict)
    latent: Mapping[str, str] | None = None
    placed_by: tuple[str, ...] = ()
    windows: tuple[str, ...] = ()
    chunked: bool = False
    windowed: Callable[[int, int], bool] = lambda layer, limit: True
    norm_if: str | None = None
    must_be: Mapping[str, tuple] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


_QWEN_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_QWEN_PLACES = ("decoder_sparse_step", "mlp_only_layers")
_DEEPSEEK_PLACES = ("first_k_dense_replace", "moe_layer_freq")

_DEEPSEEK_V3 = _Family(
    architecture=("DeepseekV3ForCausalLM",),
    fields=_LATENT_DENSE,
    experts=_DEEPSEEK_EXPERTS | {"n_groups": "n_group", "groups_kept": "topk_group"},
    experts_always=MOE_FAMILIES["deepseek_v3"],
    latent=_LATENT,
    placed_by=_DEEPSEEK_PLACES,
    must_be={"attention_bias": (False,), "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    ignored=("head_dim", "qk_head_dim"),  # of the part that RoPE turns, and the sum of both parts
)
_GLM_4 = _Family(
    architecture=("Glm4MoeForCausalLM",),
    fields=_DENSE | {"qkv_bias": "attention_bias?"},
    experts=_DEEPSEEK_EXPERTS,
    experts_always=MOE_FAMILIES["deepseek_v3"],
    placed_by=_DEEPSEEK_PLACES,
    norm_if="use_qk_norm",
    ignored=("partial_rotary_factor",),
)
_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")  # the second name is transformers 5's
_PREDICT_FURTHER = (_DEEPSEEK_V3, _GLM_4)  # their modules for that have the same parts
_LLAMA_4 = _Family(
    architecture=("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
    fields=_DENSE | _BIASES | {"d_head": "head_dim", "d_ff": "intermediate_size_mlp"},
    experts=_LOCAL_EXPERTS,
    experts_always=MOE_FAMILIES["llama4"],
    placed_by=("interleave_moe_layer_step", "moe_layers"),
    windows=("attention_chunk_size", "layer_types", "no_rope_layers", "no_rope_layer_interval"),
    chunked=True,
    ignored=("use_qk_norm", "attn_temperature_tuning", "floor_scale", "attn_scale"),  # that norm has no weights
)

# By the `model_type` in their files.
FAMILIES: dict[str, _Family] = {
    "llama": _Family(
        architecture=("LlamaForCausalLM",),
        fields=_DENSE | _BIASES | {"n_kv_heads": "num_key_value_heads?"},
        must_be={"mlp_bias": (False,)},
    ),
    "mistral": _Family(architecture=("MistralForCausalLM",), fields=_DENSE, windows=("sliding_window",)),
    "mixtral": _Family(
        architecture=("MixtralForCausalLM",),
        fields=_DENSE,
        experts=_LOCAL_EXPERTS,
        experts_always=MOE_FAMILIES["mixtral"],
        windows=("sliding_window",),
    ),
    "qwen2": _Family(
        architecture=("Qwen2ForCausalLM",),
        fields=_DENSE,
        always={"qkv_bias": True},
        windows=_QWEN_WINDOWS,
        windowed=lambda layer, limit: layer >= limit,
    ),
    "qwen3": _Family(
        architecture=("Qwen3ForCausalLM",),
        fields=_DENSE | _BIASES | {"d_head": "head_dim"},
        always={"qk_norm": "head"},
        windows=_QWEN_WINDOWS,
        windowed=lambda layer, limit: layer >= limit,
    ),
    "qwen2_moe": _Family(
        architecture=("Qwen2MoeForCausalLM",),
        fields=_DENSE | {"qkv_bias": "qkv_bias?"},
        always={"qkv_bias": True},
        experts=_FINE_EXPERTS | {"d_ff_shared": "shared_expert_intermediate_size"},
        experts_always=MOE_FAMILIES["qwen2_moe"],
        placed_by=_QWEN_PLACES,
        windows=_QWEN_WINDOWS,
        windowed=lambda layer, limit: layer % 2 == 0 and layer < limit,
    ),
    "qwen3_moe": _Family(
        architecture=("Qwen3MoeForCausalLM",),
        fields=_DENSE | _BIASES,
        always={"qk_norm": "head"},
        experts=_FINE_EXPERTS,
        experts_always=MOE_FAMILIES["qwen3_moe"] | {"normalise": False},
        placed_by=_QWEN_PLACES,
        windows=("sliding_window", "use_sliding_window"),  # in all layers, or in none
        ignored=("max_window_layers",),
    ),
    "olmoe": _Family(
        architecture=("OlmoeForCausalLM",),
        fields=_DENSE | _BIASES | {"n_kv_heads": "num_key_value_heads?"},
        always={"qk_norm": "all"},
        experts=_EXPERTS,
        experts_always=MOE_FAMILIES["olmoe"],
        ignored=("clip_qkv",),
    ),
    "deepseek": _Family(  # DeepSeekMoE-16B, whose class came with it
        architecture=("DeepseekForCausalLM",),
        fields=_DENSE | _BIASES,
        experts=_DEEPSEEK_EXPERTS,
        experts_always={"normalise": False},
        placed_by=_DEEPSEEK_PLACES,
        must_be={"scoring_func": ("softmax",)},
    ),
    "deepseek_v2": _Family(
        architecture=("DeepseekV2ForCausalLM",),
        fields=_LATENT_DENSE,
        experts=_DEEPSEEK_EXPERTS,
        experts_always=MOE_FAMILIES["deepseek_v2"],
        latent=_LATENT,
        placed_by=_DEEPSEEK_PLACES,
        must_be={
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
        },
        ignored=_DEEPSEEK_V3.ignored,
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "glm4_moe": _GLM_4,
    "gpt_oss": _Family(
        architecture=("GptOssForCausalLM",),
        fields=_DENSE | _BIASES | {"d_head": "head_dim"},
        always={"qkv_bias": True, "output_bias": True, "attention_sinks": True},
        experts=_LOCAL_EXPERTS | {"top_k": "num_experts_per_tok|experts_per_token"},
        experts_always=MOE_FAMILIES["gpt_oss"],
        windows=("sliding_window", "layer_types"),
        windowed=lambda layer, limit: layer % 2 == 0,
        ignored=("swiglu_alpha", "swiglu_limit", "initial_context_length"),
    ),
    "llama4": _LLAMA_4,
    "llama4_text": _LLAMA_4,
}

# Fields that change no count: how to train it, how to run it, how it is stored, which token is which.
NO_COUNT = (
    *("model_type", "architectures", "transformers_version", "auto_map", "_*"),
    *("dtype", "torch_dtype", "quantization_config", "use_cache", "cache_implementation", "pretraining_tp", "ep_size"),
    *("*_token_id", "*_token_index", "id2label", "label2id", "problem_type", "return_dict", "for_llm_compressor"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "chunk_size_feed_forward"),
    *("initializer_range", "attention_dropout", "*_dropout", "router_jitter_noise"),
    *("router_aux_loss_coef", "aux_loss_alpha", "seq_aux"),
    *("max_position_embeddings", "rope_scaling", "rope_interleave"),
    "hidden_act",  # SwiGLU and GEGLU have the same matrices
)


# --- Reading --------------------------------------------------------------------------------------------------------


def read_config_json(source: Path | str | Mapping) -> FoundModel:
    """The model that a `config.json` describes, from the file or from what it holds.

    Raises:
        ConfigJsonError: the file cannot be read, or describes no model that can be counted. It is a `ValueError`.
        ValueError: the same of a mapping; the message names field, value and what was expected.
    """
    if isinstance(source, Mapping):
        return _read(source, name="")
    path = Path(source)
    try:
        return _read(_json(path), name=path.absolute().parent.name if path.name == "config.json" else path.stem)
    except ValueError as error:
        raise ConfigJsonError(f"{path}: {error}") from None


def _json(path: Path) -> object:
    instead = "expected a config.json, the small JSON file that comes with the weights"
    try:
        if path.is_dir():
            raise ValueError("this is a folder; give the path of the config.json in it.")
        if not path.is_file():
            raise ValueError("there is no such file; give the path of a model's config.json.")
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes: {instead}.")
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_int=_whole, object_pairs_hook=_object)
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"it is no text: {instead}.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise ValueError(f"it is no JSON ({place}): {instead}, and whole. Get it again.") from None
    except RecursionError:
        raise ValueError(f"its values stand in each other too deep: {instead}.") from None


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:  # before Python refuses it in words of its own
        raise ValueError(f"it has a number of {len(digits):,} digits: expected at most {MOST_DIGITS}.")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice} is there more than once: expected one value for it.")
    return values


def _read(values: object, name: str) -> FoundModel:
    model_type, values = _model_type(values)
    file, family = _File(values, model_type), FAMILIES[model_type]
    file.require(*(family.fields, family.experts or {}, family.latent or {}))
    for wanted, expected in ({"is_encoder_decoder": (False,)} | dict(family.must_be)).items():
        file.must_be(wanted, expected)
    n_layers = file.whole("num_hidden_layers", least=1, most=MOST_LAYERS)
    made: dict[str, Any] = _rope_theta(file) | _window(file, family, n_layers)
    if family.norm_if and file.truth(family.norm_if):
        made["qk_norm"] = "head"
    if family.latent:
        made["mla"] = file.make(MLAConfig, family.latent, {})
    if family.experts:
        made |= _places(file, family, n_layers)
        made["moe"] = file.make(MoEConfig, family.experts | {"d_model": "hidden_size"}, family.experts_always)
    config = file.make(LMConfig, family.fields, dict(family.always) | made)
    n_mtp = 0
    if family in _PREDICT_FURTHER:
        counts = (file.whole(name, least=0, default=0, most=MOST_LAYERS) for name in _FURTHER)
        n_mtp = max(counts)
    return FoundModel(
        name=name or model_type,
        model_type=model_type,
        config=config,
        n_mtp=n_mtp,
        left_out=file.left_out(*family.ignored),
    )


def _model_type(values: object) -> tuple[str, Mapping[str, Any]]:
    """The family's name, and its fields: those of the text part where there are others."""
    known = f"one of {', '.join(FAMILIES)}"
    if not isinstance(values, Mapping):
        raise ValueError(f"it holds a {type(values).__name__}: expected an object with a model_type, {known}.")
    values = {str(key): value for key, value in values.items()}
    model_type, classes = values.get("model_type"), values.get("architectures") or []
    if not isinstance(classes, list):
        raise ValueError(f"architectures={classes!r}: expected a list with the name of a class.")
    if model_type is None:
        ours = (each for each, family in FAMILIES.items() if set(family.architecture) & set(map(str, classes)))
        model_type = next(ours, None)
    if model_type is None:
        found = f" and architectures={classes!r}" if classes else ""
        raise ValueError(f"this is no model: model_type is missing{found}. Expected {known}.")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        inside = values.get("text_config")
        found = inside.get("model_type") if isinstance(inside, Mapping) else None
        if isinstance(found, str) and found in FAMILIES:
            instead = f"Its text_config is of type {found}: put that part alone into a file."
        else:
            instead = "To count another, write its sizes as an LMConfig (moe_lab.config), and count that."
        raise ValueError(f"model_type={model_type!r}: expected {known}. {instead}")
    expected = FAMILIES[model_type].architecture
    if classes and not set(expected) & set(map(str, classes)):
        raise ValueError(f"architectures={classes!r}: expected {' or '.join(expected)} for {model_type}.")
    if model_type == "llama4":
        text = values.pop("text_config", None)
        if not isinstance(text, Mapping):
            raise ValueError(f"text_config={text!r}: expected the fields of the text model.")
        values |= {str(key): value for key, value in text.items()}
    return model_type, values


class _File:
    """A file's fields, and which of them were asked for."""

    def __init__(self, values: Mapping[str, Any], model_type: str) -> None:
        self.values, self.model_type = values, model_type
        self.asked: set[str] = set()

    def get(self, name: str) -> Any:
        self.asked.add(name)
        return _moderate(name, self.values.get(name))

    def whole(self, name: str, *, least: int, default: int | None = None, most: int | None = None) -> int:
        """A whole number, which may be missing or null if there is a default."""
        if default is None and name not in self.values:
            raise self.missing(name)
        value = self.get(name)
        value = default if value is None else value
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or value < least or (most is not None and value > most):
            expected = f"{least} or more" if most is None else f"{least} to {most:,}"
            raise ValueError(f"{name}={value!r}: expected a whole number, {expected}.")
        return value

    def truth(self, name: str) -> bool:
        """True or false, which may be missing or null: false."""
        value = self.get(name)
        if value not in (True, False, None):
            raise ValueError(f"{name}={value!r}: expected true or false.")
        return bool(value)

    def each(self, name: str, is_one: Callable[[object], bool], expected: str) -> list | None:
        """A list, which may be missing or null."""
        value = self.get(name)
        if value is not None and not (isinstance(value, list) and all(map(is_one, value))):
            raise ValueError(f"{name}={value!r}: expected a list of {expected}.")
        return value

    def require(self, *tables: Mapping[str, str]) -> None:
        """Refuses a file that lacks a field."""
        entries = dict.fromkeys(entry for table in tables for entry in table.values())
        missing = [
            entry for entry in entries if not entry.endswith("?") and not self.values.keys() & set(entry.split("|"))
        ]
        if missing:
            raise self.missing(*(entry.split("|")[0] for entry in missing))

    def missing(self, *names: str) -> ValueError:
        needs = "needs it" if len(names) == 1 else "needs them"
        return ValueError(f"missing {', '.join(names)}: the config.json of a {self.model_type} model {needs}.")

    def must_be(self, name: str, expected: tuple) -> None:
        value = self.get(name)
        if value is not None and value not in expected:
            others = " or ".join(map(repr, expected))
            raise ValueError(
                f"{name}={value!r}: expected {others}; other models of type {self.model_type} cannot be counted here."
            )

    def make(self, kind: type, fields: Mapping[str, str], others: Mapping[str, Any]) -> Any:
        """A configuration from its fields in the file, and from `others` where the file has none.

        Raises:
            ValueError: what the configuration refuses, in the file's words.
        """
        found, theirs = {}, {"d_head": "qk_nope_head_dim + qk_rope_head_dim"}  # unless the file has a field for it
        for ours, entry in fields.items():
            theirs[ours], value = self._one_of(entry.removesuffix("?").split("|"))
            if value is not None or not entry.endswith("?"):
                found[ours] = value
        if found.get("n_shared_experts", 0) is None:  # DeepSeek's way to have none
            found["n_shared_experts"] = 0
        if kind is MLAConfig and type(found["q_rank"]) is int and found["q_rank"] == 0:  # as its own code writes it
            found["q_rank"] = None
        if self.values.get("topk_method") == "greedy":  # has no groups, whatever else is said
            found |= {name: 1 for name in ("n_groups", "groups_kept") if name in found}
        try:
            return kind(**{**others, **found})
        except ValueError as error:
            said = re.sub(r"\w+", lambda word: theirs.get(word[0], word[0]), str(error))
            raise ValueError(said) from None

    def _one_of(self, names: list[str]) -> tuple[str, Any]:
        """The name under which a field is there, and its value; where there are two, they have to agree."""
        values = {name: self.get(name) for name in names if self.get(name) is not None}
        (name, value), *others = values.items() or [(names[0], None)]
        for other, differs in others:
            if differs != value:
                raise ValueError(f"{other}={differs!r}: expected {value!r}, as {name} says.")
        return name, value

    def left_out(self, *ignored: str) -> dict[str, Any]:
        """Fields that nobody asked for, but for those that change no count."""
        patterns = (*NO_COUNT, *ignored)
        strange = (name for name in self.values if name not in self.asked)
        return {name: self.values[name] for name in strange if not any(fnmatchcase(name, each) for each in patterns)}


def _moderate(name: str, value: Any) -> Any:
    """The value, unless it is a number that is none of a model's, or no number at all."""
    if isinstance(value, int | float) and not abs(value) <= MOST:
        raise ValueError(f"{name}={value!r}: expected a number of at most {MOST:.0e}.")
    return value


# --- What takes more than a name ------------------------------------------------------------------------------------


def _rope_theta(file: _File) -> dict[str, Any]:
    """At the top of the file, or in `rope_parameters` as from transformers 5 on."""
    inside, theta = file.get("rope_parameters"), file.get("rope_theta")
    if inside is not None and not isinstance(inside, Mapping):
        raise ValueError(f"rope_parameters={inside!r}: expected names and values.")
    theta = (inside or {}).get("rope_theta", theta)
    return {} if theta is None else {"rope_theta": _moderate("rope_theta", theta)}


def _places(file: _File, family: _Family, n_layers: int) -> dict[str, int]:
    """Which layers have experts, as `n_dense_layers` and `moe_every`."""
    layers = range(n_layers)

    def is_layer(number: object) -> bool:
        return type(number) is int and number in layers

    some = f"layers, 0 to {n_layers - 1}"
    match family.placed_by:
        case ("first_k_dense_replace", every):
            first = file.whole("first_k_dense_replace", least=0, most=n_layers)
            step = file.whole(every, least=1, default=1)
            has, name = [layer >= first and layer % step == 0 for layer in layers], every
        case ("decoder_sparse_step", name):
            step = file.whole("decoder_sparse_step", least=1, default=1)
            dense = file.each(name, is_layer, some) or []
            has = [layer not in dense and (layer + 1) % step == 0 for layer in layers]
        case ("interleave_moe_layer_step", name):
            step = file.whole("interleave_moe_layer_step", least=1, default=1)
            listed = file.each(name, is_layer, some)
            has = [(layer + 1) % step == 0 if listed is None else layer in listed for layer in layers]
        case _:
            return {}
    found = next((at for at in _arrangements(has) if _has_experts(n_layers, *at) == has), None)
    if found is None:
        expected = "dense layers first and then experts in every so-manieth layer; other orders cannot be counted here"
        raise ValueError(f"{name}={file.get(name)!r}: expected {expected}.")
    return dict(zip(("n_dense_layers", "moe_every"), found, strict=True))


def _arrangements(has: list[bool]) -> Iterator[tuple[int, int]]:
    """Candidates for `n_dense_layers` and `moe_every`, the simplest first."""
    where = [layer for layer, has_experts in enumerate(has) if has_experts] or [len(has)]
    for every in (1, where[1] - where[0] if len(where) > 1 else where[0] + 1):
        yield from ((0, every), (where[0], every))


def _has_experts(n_layers: int, n_dense_layers: int, every: int) -> list[bool]:
    return [layer >= n_dense_layers and (layer + 1) % every == 0 for layer in range(n_layers)]


def _window(file: _File, family: _Family, n_layers: int) -> dict[str, int | bool]:
    """How much layers see, as `window`, `full_every`, `chunked`; nothing where all see all, or it cannot be said so."""
    if not family.windows:
        return {}
    file.asked |= set(family.windows)
    has = _windowed_layers(file, family, n_layers)
    size = file.get(family.windows[0])
    if size is None or not any(has):
        return {}
    found = {"window": file.whole(family.windows[0], least=1), "chunked": family.chunked}
    full = [layer + 1 for layer, is_windowed in enumerate(has) if not is_windowed]
    if not full:
        return found
    if full == list(range(full[0], n_layers + 1, full[0])):
        return found | {"full_every": full[0]}
    file.asked -= set(family.windows)  # so that they are among those left out
    return {}


def _windowed_layers(file: _File, family: _Family, n_layers: int) -> list[bool]:
    """For each layer, whether it has the window."""
    if "use_sliding_window" in family.windows and not file.truth("use_sliding_window"):
        return [False] * n_layers
    if "layer_types" in family.windows:
        known = ("full_attention", "chunked_attention" if family.chunked else "sliding_attention")
        types = file.each("layer_types", lambda kind: kind in known, " or ".join(known))
        if types is not None:
            _require_length("layer_types", types, n_layers)
            return [kind != "full_attention" for kind in types]
    if "no_rope_layers" in family.windows:
        turned = file.each("no_rope_layers", lambda one: one in (0, 1), "0 or 1")
        if turned:
            _require_length("no_rope_layers", turned, n_layers)
            return list(map(bool, turned))
        interval = file.whole("no_rope_layer_interval", least=1, default=4)
        return [(layer + 1) % interval != 0 for layer in range(n_layers)]
    limit = file.whole("max_window_layers", least=0) if "max_window_layers" in family.windows else 0
    return [family.windowed(layer, limit) for layer in range(n_layers)]


def _require_length(name: str, values: list, n_layers: int) -> None:
    if len(values) != n_layers:
        raise ValueError(f"{name} has {len(values)} entries: expected one for each of {n_layers} layers.")
