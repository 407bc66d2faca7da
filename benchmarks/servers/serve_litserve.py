"""ResNet-18 behind LitServe: raw bodies, its batching, several API processes, ZeroMQ between them and the workers."""

from typing import Annotated

import litserve as ls
import settings
from fastapi import Depends, Request, Response
from predictor import Predictor


async def raw_body(request: Request) -> bytes:
    """Keep FastAPI from reading JSON."""
    return await request.body()


class Api(ls.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002  # the settings say it
        self.predictor = Predictor(settings.from_environment())

    def decode_request(self, request: Annotated[bytes, Depends(raw_body)]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return list(inputs)

    def predict(self, inputs: list[bytes]) -> list[bytes]:
        return self.predictor(inputs)

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/octet-stream")


def main() -> None:
    given = settings.from_environment()
    api = Api(max_batch_size=given.max_batch_size, batch_timeout=given.delay_ms / 1000)
    server = ls.LitServer(
        api,
        accelerator=given.device,
        devices=1,
        workers_per_device=given.workers,
        timeout=120,
        fast_queue=True,  # its documentation: for more than 100 requests per second
    )
    server.run(
        host="127.0.0.1",
        port=given.port,
        num_api_servers=given.frontends,
        log_level="warning",
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
