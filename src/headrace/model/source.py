"""What a model name means: a torchvision model, the built-in EfficientNet-lite0, the user's callable or program.

A user's file runs in our process, so whatever it raises becomes one sentence that names the line.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headrace.errors import ModelError
from headrace.model import efficientnet_lite0
from headrace.model.exported import Exported
from headrace.processes import describe

ModelKind = Literal["torchvision", "efficientnet_lite0", "callable", "exported"]
Example = dict[str, Tensor] | tuple[Tensor, ...]
EFFICIENTNET_LITE0 = "efficientnet_lite0"
_FORMS = ", ".join(
    [
        "a torchvision classification model",
        EFFICIENTNET_LITE0,
        "package.module:callable",
        "path/to/file.py:callable",
        "path/to/exported.pt2",
    ]
)
_TRANSFORMS_INPUT = ("googlenet", "inception_v3")
_OWN_FILE = __file__


def images(image_size: int, rows: int = 2) -> tuple[Tensor]:
    """Return a batch of noise as most image models take it: float32 [rows, 3, image_size, image_size]."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, 3, image_size, image_size, generator=generator),)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """How to make one model.

    `build` raises ModelError. A torchvision model comes out with its initial random weights; the others bring
    their own. `example_inputs` returns a small batch for it, by name or in order: what the user's module gives from its
    function of this name, or images of that many pixels; it raises ModelError too.
    """

    name: str
    kind: ModelKind
    build: Callable[[], nn.Module]
    example_inputs: Callable[[int], Example] = images

    def more_inputs(self, image_size: int, rows: int) -> Example:
        """Return so many rows where they are noise made here; else what `example_inputs` gives."""
        return images(image_size, rows) if self.example_inputs is images else self.example_inputs(image_size)


def resolve(name: str) -> ModelSource:
    """Return what `name` means; imports the user's module or file, but does not call it yet.

    Raises ModelError: no such model, a file or module that does not import, a callable that is not there.
    """
    if ":" in name:
        return _callable_source(name)
    if name.endswith(".pt2"):
        program = Exported.load(Path(name))
        return ModelSource(name=name, kind="exported", build=program.build, example_inputs=program.example_inputs)
    if name == EFFICIENTNET_LITE0:
        return ModelSource(name=name, kind="efficientnet_lite0", build=efficientnet_lite0.build)
    if name in torchvision_names():
        return ModelSource(name=name, kind="torchvision", build=lambda: build_torchvision(name))
    raise ModelError(f"--model {name}: there is no such model; {_near(name)}the forms are: {_FORMS}")


def torchvision_models() -> ModuleType:
    """Return torchvision.models, imported when first asked for: other models need not wait 1.5 s for it."""
    return importlib.import_module("torchvision.models")


def torchvision_names() -> list[str]:
    """Return torchvision's classification models, the quantized ones apart."""
    models = torchvision_models()
    return list(models.list_models(module=models))


def build_torchvision(name: str) -> nn.Module:
    """Build a torchvision model with random weights on the default device.

    GoogLeNet and Inception undo ImageNet's normalisation in front of their published weights, as torchvision
    does when it loads them itself; their slow truncated-normal initialisation is left out.
    """
    options = {"transform_input": True, "init_weights": False} if name in _TRANSFORMS_INPUT else {}
    model: nn.Module = torchvision_models().get_model(name, weights=None, **options)
    return model


def _near(name: str) -> str:
    matches = difflib.get_close_matches(name, [*torchvision_names(), EFFICIENTNET_LITE0], n=3)
    return f"did you mean {' or '.join(matches)}? Otherwise " if matches else ""


def _callable_source(name: str) -> ModelSource:
    where, _, attribute = name.rpartition(":")
    module = _module(name)
    folder, factory = _folder(where), _find(name, module, attribute)
    has_examples = callable(getattr(module, "example_inputs", None))
    return ModelSource(
        name=name,
        kind="callable",
        build=lambda: _call(name, factory, folder),
        example_inputs=(lambda _: _examples(name, module, folder)) if has_examples else images,
    )


def _examples(name: str, module: ModuleType, folder: Path) -> Example:
    with _blamed_on_user(name, "example_inputs failed"), _importable(folder):
        made = module.example_inputs()
    given = (made,) if isinstance(made, Tensor) else made
    tensors = list(given.values() if isinstance(given, dict) else given) if isinstance(given, Collection) else []
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
        raise ModelError(
            f"--model {name}: example_inputs must return a tensor, a sequence or a dict of tensors with rows"
        )
    return given if isinstance(given, dict) else tuple(tensors)


def _folder(where: str) -> Path:
    return Path(where).resolve().parent if _is_file(where) else Path.cwd()


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where


def _module(name: str) -> ModuleType:
    """Import what is before the colon. Raises ModelError."""
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ModelError(
            f"--model {name}: a module and a callable are needed around the colon; the forms are: {_FORMS}"
        )
    with _importable(_folder(where)):
        return _import_file(name, Path(where)) if _is_file(where) else _import_module(name, where)


def _import_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"--model {name}: there is no file {path}; name an existing Python file before the colon")
    spec = importlib.util.spec_from_file_location(f"_headrace_model_{path.stem}", path.resolve())
    if spec is None or spec.loader is None:
        raise ModelError(f"--model {name}: {path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    with _blamed_on_user(name, f"{path} does not import"):
        sys.modules[spec.name] = module  # dataclasses and pickle look their own module up there
        spec.loader.exec_module(module)
    return module


def _import_module(name: str, dotted: str) -> ModuleType:
    with _blamed_on_user(name, f"module {dotted} does not import"):
        return importlib.import_module(dotted)


def _find(name: str, module: ModuleType, attribute: str) -> Callable[[], Any]:
    found = getattr(module, attribute, None)
    if callable(found):
        return found  # type: ignore[no-any-return]  # called without arguments and checked by `_call`
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    matches = difflib.get_close_matches(attribute, own, n=3)
    state = "is not callable" if hasattr(module, attribute) else "is not defined there"
    hint = f"; did you mean {' or '.join(matches)}?" if matches else ""
    raise ModelError(f"--model {name}: {attribute} {state}{hint}")


def _call(name: str, factory: Callable[[], Any], folder: Path) -> nn.Module:
    with _blamed_on_user(name, "the callable failed (it is called without arguments)"), _importable(folder):
        made = factory()
    if not isinstance(made, nn.Module):
        raise ModelError(
            f"--model {name}: the callable returned {type(made).__name__}; it must return a torch.nn.Module"
        )
    return made


@contextmanager
def _blamed_on_user(name: str, what: str) -> Iterator[None]:
    """Turn any exception of the user's code into a ModelError with its cause and place."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise ModelError(f"--model {name}: {what}: {describe(error)}{_place(error)}") from error


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's code import what lies beside it, as `python file.py` would."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _place(error: BaseException) -> str:
    """Return " (line N of FILE)", the last line of the user's outermost file; nothing if none was reached."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f" (line {error.lineno} of {Path(error.filename).name})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    if not frames:
        return ""
    in_file = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" (line {in_file[-1].lineno} of {Path(in_file[-1].filename).name})"


def _is_users(file: str) -> bool:
    return file != _OWN_FILE and not file.startswith("<frozen") and file != importlib.__file__
