"""A deployment in somebody's own graph, called with tensors by a handle, and scaled by what waits for it."""

import asyncio

import pytest
import torch

from headrace.errors import InvalidRequest
from tests.ray_serve.cluster import MODEL, WAIT_S

pytest.importorskip("ray", reason="Ray is not installed; pip install 'headrace[ray]'")
from ray import serve
from ray.exceptions import RayTaskError

from headrace.ray_serve import HeadraceDeployment


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Pipeline:
    """Somebody's ingress: it makes inputs, and reads outputs."""

    def __init__(self, model):
        self.model = model

    async def __call__(self, numbers):
        values = torch.tensor(numbers, dtype=torch.float32).reshape(1, 3)
        outputs = await self.model.infer.remote({"values": values, "ids": torch.zeros(1, 4, dtype=torch.int64)})
        return outputs["scaled"]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "graph.py").write_text(MODEL.format(factor=5))
    return f"{tmp_path}/graph.py:build"


@pytest.fixture
def run(served):
    """Runs an application beside the other one, without an address, and takes it away again."""
    names = []

    def started(app, name):
        names.append(name)
        return serve.run(app, name=name, route_prefix=None)

    yield started
    for name in names:
        serve.delete(name)


def test_a_handle_takes_tensors_and_gives_the_models_outputs(run, source):
    model = HeadraceDeployment.options(ray_actor_options={"num_cpus": 0}).bind(source, device="cpu", max_batch_size=4)
    handle = run(Pipeline.bind(model), "graph")
    assert handle.remote([1, 2, 3]).result(timeout_s=WAIT_S).tolist() == [[5, 10, 15]]
    alone = serve.get_deployment_handle("Headrace", "graph")
    with pytest.raises(RayTaskError) as caught:
        alone.infer.remote(torch.zeros(1, 3)).result(timeout_s=WAIT_S)
    assert isinstance(caught.value, InvalidRequest)
    assert "1 inputs were given; the model takes 2: values, ids" in str(caught.value)


def test_words_that_describe_no_model_end_the_deployment_with_the_reason(run, source):
    model = HeadraceDeployment.options(max_constructor_retry_count=1).bind(source, device="cpu", max_rows=4)
    with pytest.raises(RuntimeError):
        run(model, "wrong")
    (told,) = serve.status().applications["wrong"].deployments.values()
    assert "unexpected keyword argument 'max_rows'; a model's options are source, name" in told.message


def test_replicas_come_with_the_load_and_go_after_it(run, source):
    quick = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
    delays = {"upscale_delay_s": 0.2, "downscale_delay_s": 0.5, "look_back_period_s": 1}
    model = HeadraceDeployment.options(autoscaling_config={**quick, **delays}, ray_actor_options={"num_cpus": 0})
    handle = run(model.bind(source, device="cpu", max_batch_size=4), "scaled")
    inputs = {"values": torch.ones(1, 3), "ids": torch.zeros(1, 4, dtype=torch.int64)}

    async def until(count, load):
        """Keep so many requests under way until there are so many replicas."""
        pending = set()
        while running_replicas("scaled") != count:
            while len(pending) < load:
                pending.add(asyncio.ensure_future(answer()))
            await asyncio.wait(pending or {asyncio.ensure_future(asyncio.sleep(0.05))}, return_when="FIRST_COMPLETED")
            pending = {each for each in pending if not each.done()}
        await asyncio.gather(*pending)

    async def answer():
        outputs = await handle.infer.remote(inputs)
        assert outputs["scaled"].tolist() == [[5, 5, 5]]

    asyncio.run(asyncio.wait_for(until(2, load=16), WAIT_S))
    asyncio.run(asyncio.wait_for(until(1, load=0), WAIT_S))


def running_replicas(name):
    (told,) = serve.status().applications[name].deployments.values()
    return told.replica_states.get("RUNNING", 0)
