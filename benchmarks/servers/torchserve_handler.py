"""What TorchServe's workers call: raw bodies in, raw bodies out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import settings
from predictor import Predictor


class Handler:
    def initialize(self, context: object) -> None:  # noqa: ARG002  # the settings say it
        self._predictor = Predictor(settings.from_environment())

    def handle(self, data: Sequence[Mapping[str, bytearray]], context: object) -> list[bytes]:  # noqa: ARG002
        """Return an answer for each request of the batch."""
        return self._predictor([request["body"] for request in data])
