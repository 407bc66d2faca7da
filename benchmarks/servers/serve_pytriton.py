"""ResNet-18 behind Triton's core, through PyTriton: binary tensors, Triton's dynamic batcher, several instances."""

from __future__ import annotations

import os
import sysconfig

import numpy as np
import numpy.typing as npt
import settings
from predictor import Predictor
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

Floats = npt.NDArray[np.float32]


class Instance:
    """One of the callables that Triton's instances call; each has a model of its own."""

    def __init__(self, given: settings.Settings) -> None:
        self._predictor = Predictor(given)

    @batch
    def __call__(self, **inputs: Floats) -> dict[str, Floats]:
        return {"output": self._predictor.rows([inputs["input"]])}


def main() -> None:
    given = settings.from_environment()
    # Triton's Python stub is linked against this interpreter's libpython.
    paths = (str(sysconfig.get_config_var("LIBDIR")), os.environ.get("LD_LIBRARY_PATH"))
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
    with Triton(config=TritonConfig(http_address="127.0.0.1", http_port=given.port, allow_grpc=False)) as triton:
        triton.bind(
            model_name="model",
            infer_func=[Instance(given) for _ in range(given.workers)],
            inputs=[Tensor(name="input", dtype=np.float32, shape=settings.ROW_SHAPE)],
            outputs=[Tensor(name="output", dtype=np.float32, shape=(settings.OUTPUTS,))],
            config=ModelConfig(
                max_batch_size=given.max_batch_size,
                batcher=DynamicBatcher(max_queue_delay_microseconds=round(1000 * given.delay_ms)),
            ),
        )
        triton.serve()


if __name__ == "__main__":
    main()
