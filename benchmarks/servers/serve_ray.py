"""ResNet-18 behind Ray Serve: raw bodies, its batching, several replicas."""

import settings
from predictor import Predictor
from ray import init, serve
from starlette.requests import Request
from starlette.responses import Response

GIVEN = settings.from_environment()


@serve.deployment(
    num_replicas=GIVEN.engines * GIVEN.workers,
    max_ongoing_requests=4 * GIVEN.max_batch_size,
    ray_actor_options={"num_cpus": 0, "num_gpus": 0 if GIVEN.device == "cpu" else 1 / GIVEN.workers},
)
class Model:
    def __init__(self) -> None:
        self.predictor = Predictor(GIVEN)

    @serve.batch(max_batch_size=GIVEN.max_batch_size, batch_wait_timeout_s=GIVEN.delay_ms / 1000)
    async def answer(self, bodies: list[bytes]) -> list[bytes]:
        return self.predictor(bodies)

    async def __call__(self, request: Request) -> Response:
        return Response(await self.answer(await request.body()), media_type="application/octet-stream")


def main() -> None:
    init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": GIVEN.port})
    serve.run(Model.bind(), blocking=True)


if __name__ == "__main__":
    main()
