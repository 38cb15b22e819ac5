"""Models and training runs on disk: safetensors files, written whole or not at all.

A checkpoint is one file. Its tensors are those of `Trainer.state()`; a file of weights alone has the `model.` ones. The
header holds the configuration as JSON, so that a file can be opened without knowing what is in it.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_lab.config import LMConfig, RunConfig
from moe_lab.lm import LM
from moe_lab.paths import CourseError, data_dir
from moe_lab.plain import differences, from_plain, to_plain

HEADER, FORMAT = "moe_lab", "moe-lab checkpoint 1"


class CheckpointError(CourseError):
    """A checkpoint could not be written or read, or is another one than was asked for."""


def save(path: Path, tensors: Mapping[str, Tensor], config: LMConfig | RunConfig) -> None:
    """Write tensors and their configuration to a file. Until it is complete, what stood there before stays.

    Raises:
        CheckpointError: the file cannot be written; what stood there before is intact.
    """
    described = {"format": FORMAT, "kind": type(config).__name__, "config": to_plain(config)}
    header = {HEADER: json.dumps(described)}  # one field: safetensors writes several in random order
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode  # as every new file here; safetensors would let nobody else read it
        save_file({name: tensor.contiguous() for name, tensor in _once(tensors).items()}, partial, metadata=header)
        partial.chmod(mode)
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        before = "the file that stood there is intact" if path.exists() else "nothing was left behind"
        raise CheckpointError(f"{path} cannot be written ({error}): {before}. Is the disk full?") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the second name of a tensor that has two: a tied head is the embedding."""
    kept: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() == 0 or key not in seen:
            kept[name] = tensor.detach()
        seen.add(key)
    return kept


def load(path: Path) -> tuple[dict[str, Tensor], LMConfig | RunConfig]:
    """The tensors of a checkpoint, on the CPU, and its configuration.

    Raises:
        CheckpointError: no file, a damaged one, or one that was not written by `save`.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {}).get(HEADER, "{}"))
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path} is no checkpoint of this course: its header does not say {FORMAT!r}.")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        kind = RunConfig if header["kind"] == "RunConfig" else LMConfig
        config = from_plain(kind, header["config"])
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is damaged, or no safetensors file.") from None
    model = config.model if isinstance(config, RunConfig) else config
    if model.tied_embeddings and "model.embedding.weight" in tensors:
        tensors["model.head.weight"] = tensors["model.embedding.weight"]
    return tensors, config


def require_same(found: RunConfig, wanted: RunConfig, path: Path) -> None:
    """Refuse to go on from a checkpoint of another configuration.

    Raises:
        CheckpointError: which fields differ.
    """
    if lines := differences(found, wanted):
        told = "".join(f"\n  {line}" for line in lines)
        raise CheckpointError(f"{path} is of another configuration. Checkpoint against yours:{told}")


def save_model(path: Path, model: LM, dtype: torch.dtype = torch.float32) -> None:
    """Write a model's weights and configuration. The selection bias stays fp32.

    Raises:
        CheckpointError: see `save`.
    """
    tensors = {
        f"model.{name}": tensor if name.endswith("selection_bias") else tensor.to(dtype)
        for name, tensor in model.state_dict().items()
        if not (model.config.tied_embeddings and name == "head.weight")
    }
    save(path, tensors, model.config)


def load_model(path: Path) -> LM:
    """The model that a checkpoint holds, in fp32 on the CPU, in evaluation mode.

    Raises:
        CheckpointError: see `load`; or tensors that are not the configuration's.
    """
    tensors, config = load(path)
    with torch.random.fork_rng(devices=[]):  # the weights that it is born with are not kept, and shall not be felt
        model = LM(config.model if isinstance(config, RunConfig) else config)
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not hold the weights of its own configuration: {error}") from None
    return model.eval()


def load_shipped_model(name: str) -> LM:
    """A small trained model that comes with the course: a name in `data/models.json`.

    Raises:
        CheckpointError: an unknown name, or a file that is not byte for byte the one described there.
    """
    folder = data_dir()
    try:
        described = json.loads((folder / "models.json").read_text(encoding="utf-8"))["models"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder / 'models.json'} is missing or damaged: restore it with `git checkout -- data/models.json`."
        ) from None
    if name not in described:
        raise CheckpointError(f"No model {name!r} comes with the course: expected one of {', '.join(described)}.")
    path = folder / "models" / f"{name}.safetensors"
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != described[name]["sha256"]:
        what = "was altered" if content else "is missing"
        raise CheckpointError(f"{path} {what}: restore it with `git checkout -- data/models`.")
    return load_model(path)
