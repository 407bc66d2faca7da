"""ResNet-18 behind mosec: raw bodies, its batching, several worker processes."""

from __future__ import annotations

import settings
from mosec import Server, Worker
from predictor import Predictor

TIMEOUT_S = 60


class Inference(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.predictor = Predictor(settings.from_environment())

    def deserialize(self, data: bytes) -> bytes:
        return data

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[bytes]:
        return self.predictor(data)


def main() -> None:
    given = settings.from_environment()
    server = Server()
    server.append_worker(
        Inference,
        num=given.workers,
        max_batch_size=given.max_batch_size,
        max_wait_time=max(1, round(given.delay_ms)),  # whole milliseconds; 0 means its default, 10
        timeout=TIMEOUT_S,
    )
    server.run()


if __name__ == "__main__":
    main()
