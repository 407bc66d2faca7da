"""What requests carry: made before the clock starts, written out as they travel, and shared by all generators."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.config import TargetConfig
from headrace.errors import InputError
from headrace.target.asking import Declared
from headrace.tensors import TensorSpec
from headrace.wire.datatypes import TO_DTYPE, numpy_dtype
from headrace.wire.grpc import inference_pb2 as pb
from headrace.wire.v2_call import CallOptions, encode_call

Array = npt.NDArray[Any]
Inputs = dict[str, Array]  # of one request, by name; bfloat16 as its bits in uint16


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request's body lies in the shared memory, and how many bytes of JSON it begins with."""

    offset: int
    size: int
    header_bytes: int


class Bodies:
    """Bodies in memory without a name (memfd), which other processes of ours open by our process's number."""

    def __init__(self, bodies: list[tuple[bytes, int]]) -> None:
        """Take (body, header bytes) of each distinct payload. Raises InputError if memory does not hold them."""
        self.places: list[Place] = []
        self._descriptor = os.memfd_create("headrace-payloads", os.MFD_CLOEXEC)
        offset = 0
        try:
            for body, header_bytes in bodies:
                _write(self._descriptor, body)
                self.places.append(Place(offset, len(body), header_bytes))
                offset += len(body)
        except OSError as error:
            self.close()
            raise InputError(f"{len(bodies)} payloads do not fit into memory; lower --distinct") from error
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        os.close(self._descriptor)


def open_bodies(path: str, places: list[Place]) -> list[memoryview]:
    """Return the bodies that another process wrote: views of its memory, not copies."""
    with Path(path).open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    view = memoryview(memory)
    return [view[place.offset : place.offset + place.size] for place in places]


def make_inputs(declared: tuple[Declared, ...], target: TargetConfig, rows: int, seed: int) -> list[Inputs]:
    """Return the inputs of each distinct payload. Raises InputError."""
    count = 1 if target.same_input else target.distinct
    if target.input_file is not None:
        return _from_file(target.input_file, declared, count)
    shapes = {each.name: _shape(each, target.shapes.get(each.name), rows) for each in declared}
    unknown = set(target.shapes) - set(shapes)
    if unknown:
        raise InputError(f"--shape {min(unknown)}: the model has no such input; it has {', '.join(shapes)}")
    return [
        {each.name: _random(each, shapes[each.name], target.int_range, [seed, number, place]) for place, each in order}
        for number in range(count)
        for order in [list(enumerate(declared))]
    ]


def rows_of(inputs: Inputs) -> int:
    """Return how many samples a request has: its first input's first dimension."""
    first = next(iter(inputs.values()))
    return len(first) if first.ndim else 1


def http_body(inputs: Inputs, declared: tuple[Declared, ...]) -> tuple[bytes, int]:
    """Return a request's body, and the bytes of JSON in front of its tensors."""
    specs = [TensorSpec(name=each.name, dtype=TO_DTYPE[each.datatype], features=()) for each in declared]
    call = encode_call([inputs[each.name] for each in declared], specs, CallOptions())
    return b"".join(call.parts), call.header_bytes


def grpc_body(inputs: Inputs, declared: tuple[Declared, ...], target: TargetConfig) -> tuple[bytes, int]:
    """Return a ModelInferRequest's bytes."""
    request = pb.ModelInferRequest(model_name=target.model, model_version=target.version or "")
    for each in declared:
        array = inputs[each.name]
        request.inputs.add(name=each.name, datatype=each.datatype, shape=array.shape)
        request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    return request.SerializeToString(), 0


def _shape(declared: Declared, given: tuple[int, ...] | None, rows: int) -> tuple[int, ...]:
    if given is None:
        first, *rest = declared.shape or (1,)
        given = (rows if first == -1 else first, *rest)
        if -1 in given:
            raise InputError(
                f"input {declared.name} has shape {list(declared.shape)}, some of any size; add --shape"
                f" {declared.name}={','.join('N' if size == -1 else str(size) for size in given)}"
            )
    fits = len(given) == len(declared.shape) and all(
        want in (-1, got) for want, got in zip(declared.shape, given, strict=True)
    )
    if not fits:
        raise InputError(f"--shape {declared.name}={list(given)}: the server takes {list(declared.shape)}")
    return given


def _random(declared: Declared, shape: tuple[int, ...], int_range: tuple[int, int], seed: list[int]) -> Array:
    if declared.datatype == "BYTES":
        raise InputError(f"input {declared.name} is BYTES, for which random numbers mean nothing")
    generator = np.random.default_rng(seed)
    dtype = numpy_dtype(TO_DTYPE[declared.datatype])
    if declared.datatype == "BF16":
        return (generator.standard_normal(shape, dtype=np.float32).view(np.uint32) >> 16).astype(dtype)
    if dtype.kind == "f":
        return generator.standard_normal(shape, dtype=np.float32).astype(dtype)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(dtype)
    limits = np.iinfo(dtype.name)
    least, most = int_range
    if least < limits.min or most > limits.max:
        raise InputError(
            f"--int-range {least} {most}: input {declared.name} is {declared.datatype}, {limits.min} to {limits.max}"
        )
    return generator.integers(least, most, shape, dtype=dtype, endpoint=True)


def _from_file(path: Path, declared: tuple[Declared, ...], count: int) -> list[Inputs]:
    arrays = read_arrays(path, "--input-file")
    missing = [each.name for each in declared if each.name not in arrays]
    if missing:
        raise InputError(f"--input-file {path}: holds no array {missing[0]}; it needs one by the name of each input")
    for each in declared:
        wanted = numpy_dtype(TO_DTYPE[each.datatype]) if each.datatype in TO_DTYPE else None
        if wanted is None or arrays[each.name].dtype != wanted:
            raise InputError(f"--input-file {path}: {each.name} is {arrays[each.name].dtype}, not {each.datatype}")
        _shape(each, arrays[each.name].shape[1:], 1)
    found = min(len(arrays[each.name]) for each in declared)
    return [{each.name: arrays[each.name][number] for each in declared} for number in range(min(count, found))]


def read_arrays(path: Path, option: str) -> Mapping[str, Array]:
    """Read an .npz of arrays [distinct, *shape]. Raises InputError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{option} {path}: is no .npz file of arrays ({error})") from error
    if not arrays or min((array.ndim for array in arrays.values()), default=0) < 1:
        raise InputError(f"{option} {path}: needs arrays [distinct payloads, *shape], by name")
    return arrays


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
