"""From a model's name and a checkpoint to a module on the device, ready to answer.

A torchvision model is built on the meta device (shapes without memory) and its parameters *become* the
checkpoint's tensors, mapped from the file: nothing is initialised only to be overwritten, and nothing is
copied twice.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from headrace.config import ModelConfig
from headrace.errors import CheckpointError, ModelError
from headrace.model.source import ModelSource, build_torchvision, resolve
from headrace.processes import describe

_SHOWN_KEYS = 3
_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def load_model(
    config: ModelConfig, checkpoint: Path | None, device: torch.device, mark: Callable[[str], None]
) -> nn.Module:
    """Return the model on `device` in eval mode, without gradients; if so configured, `torch.compile`d.

    `checkpoint` is for torchvision models only. `mark` is told "weights" when the weights are on the device,
    and "compile wrap" after torch.compile has wrapped them. Raises ModelError, CheckpointError.
    """
    return load_source(resolve(config.name), config, checkpoint, device, mark)


def load_source(
    source: ModelSource,
    config: ModelConfig,
    checkpoint: Path | None,
    device: torch.device,
    mark: Callable[[str], None],
) -> nn.Module:
    """Do what `load_model` does, with `config.name` resolved before."""
    if source.kind == "torchvision":
        model = _load_torchvision(config.name, _required(config.name, checkpoint), device)
    else:
        model = source.build()
    model = _move(model, device).eval().requires_grad_(requires_grad=False)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    mark("weights")
    if config.compile:
        model = cast("nn.Module", torch.compile(model))
        mark("compile wrap")
    return model


def read_state(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Read a checkpoint's tensors onto `device`. Raises CheckpointError for a file that is none.

    Files of PyTorch before 1.6 are no zip archives and cannot be mapped; they are read whole.
    """
    try:
        state = torch.load(path, mmap=zipfile.is_zipfile(path), weights_only=True, map_location=device)
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{path}: too little memory on {device} ({describe(error)}); free some") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint; {_remedy()}") from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: damaged or no checkpoint ({describe(error)}); {_remedy()}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{path}: holds {_content(state)} where the model's tensors by name (its state_dict) are needed"
        )
    return cast("dict[str, Tensor]", state)  # an OrderedDict, whose metadata load_state_dict reads


def _load_torchvision(name: str, path: Path, device: torch.device) -> nn.Module:
    state = read_state(path, device)
    model = _build_empty(name)
    _assign(model, state, path, name)
    return model


def _build_empty(name: str) -> nn.Module:
    """Build without memory where that works; a checkpoint must supply every tensor then."""
    try:
        with torch.device("meta"):
            model = build_torchvision(name)
    except (RuntimeError, NotImplementedError):  # RegNet reads values of tensors while it is built
        return build_torchvision(name)
    return model if all_in_state(model) else build_torchvision(name)


def all_in_state(model: nn.Module) -> bool:
    """Tell whether a checkpoint holds all of the model's tensors; non-persistent buffers must be computed."""
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return set(names) <= model.state_dict().keys()


def _assign(model: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    """Make the checkpoint's tensors the model's own. Raises CheckpointError unless names and shapes agree."""
    expected = model.state_dict()
    _rename_old_densenet(state, expected)
    mis_shaped = [
        f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    _refuse(path, name, {"mis-shaped": mis_shaped})
    for key in expected.keys() & state.keys():
        state[key] = state[key].to(expected[key].dtype)
    keys = model.load_state_dict(state, strict=False, assign=True)
    _refuse(path, name, {"missing": keys.missing_keys, "unexpected": keys.unexpected_keys})


def _rename_old_densenet(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Turn `denselayer1.norm.1.weight` of DenseNet's files into `denselayer1.norm1.weight`."""
    for key in list(state):
        renamed = _OLD_DENSENET_KEY.sub(r"\1\2", key)
        if key not in expected and renamed in expected:
            state[renamed] = state.pop(key)


def _refuse(path: Path, name: str, faults: Mapping[str, Sequence[str]]) -> None:
    found = [f"{len(keys)} {fault} ({_first(keys)})" for fault, keys in faults.items() if keys]
    if found:
        raise CheckpointError(f"{path}: not a checkpoint of {name}: {'; '.join(found)}; {_remedy()}")


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_SHOWN_KEYS]) + (", ..." if len(keys) > _SHOWN_KEYS else "")


def _move(model: nn.Module, device: torch.device) -> nn.Module:
    try:
        return model.to(device)
    except (
        RuntimeError,
        NotImplementedError,
        AssertionError,
    ) as error:  # the last: PyTorch built without CUDA
        raise ModelError(f"the model cannot be moved to {device} ({describe(error)})") from error


def _required(name: str, checkpoint: Path | None) -> Path:
    if checkpoint is None:
        raise CheckpointError(f"--model {name} needs a checkpoint and none was given; {_remedy()}")
    return checkpoint


def _content(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a dictionary of {', '.join(str(key) for key in list(value)[:_SHOWN_KEYS])}"
    return type(value).__name__


def _remedy() -> str:
    return "delete it to have it downloaded again, or make one with `headrace checkpoint`"
