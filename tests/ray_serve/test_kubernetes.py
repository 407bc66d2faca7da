"""The manifests of deploy/kubernetes: against the projects' schemas, Serve's configuration, and our command line."""

import argparse
import copy

import jsonschema
import pytest
import yaml

from headrace import serve_options
from tests.ray_serve.manifests import (
    KNATIVE_POD_FIELDS,
    check_kserve,
    check_kuberay,
    check_kubernetes,
    check_metadata,
    kserve_models,
    manifest,
    predictor_pod,
    ray_nodes,
    ray_pods,
    refused_beyond_the_schema,
    room,
)

GIB = 1 << 30
CLUSTER = ("spec", "rayClusterConfig")
WORKERS = (*CLUSTER, "workerGroupSpecs", 0)
WORKER_POD = (*WORKERS, "template", "spec")
PREDICTOR = ("spec", "predictor")


@pytest.fixture(scope="module")
def kserve():
    return kserve_models()


def changed(name, path, value):
    """Return a manifest with one value, at the path's end, set to another, or added."""
    whole = copy.deepcopy(manifest(name))
    place = whole
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return whole


def application():
    """Return the one application that Serve reads from the RayService, and the deployment that ours makes of it."""
    serve_schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed; pip install 'headrace[ray]'")
    ours = pytest.importorskip("headrace.ray_serve.application")
    given = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    (only,) = serve_schema.ServeDeploySchema.model_validate(given).applications
    assert only.import_path == f"{ours.__name__}:{ours.build.__name__}"
    return only, ours.build(only.args)._bound_deployment


def needed(deployment):
    options = deployment.ray_actor_options
    return {"CPU": options["num_cpus"], "GPU": options["num_gpus"]}


@pytest.mark.parametrize("name", ["rayservice", "inferenceservice"])
def test_kubernetes_takes_the_metadata(name):
    check_metadata(manifest(name))


def test_kubernetes_takes_the_pods_of_the_ray_cluster():
    pods = ray_pods(manifest("rayservice"))
    for document in pods:
        check_kubernetes(document)
    assert [refused_beyond_the_schema(document) for document in pods] == [[], []]


def test_kubernetes_takes_the_predictors_pod(kserve):
    document = predictor_pod(manifest("inferenceservice"), kserve)
    check_kubernetes(document)
    assert refused_beyond_the_schema(document) == []


def test_knative_takes_the_predictors_pod_as_well(kserve):
    """KServe has two modes, and which of them is a cluster's is not in the manifest."""
    assert predictor_pod(manifest("inferenceservice"), kserve)["spec"].keys() <= KNATIVE_POD_FIELDS


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*WORKER_POD, "enableServiceLink"), False),
        ((*WORKERS, "template", "specs"), {}),
        ((*WORKER_POD, "containers", 0, "image"), 7),
        ((*WORKER_POD, "containers", 0, "resources", "limit"), {"cpu": "4"}),
        ((*WORKER_POD, "containers", 0, "ports", 0, "containerPort"), "8000"),
    ],
    ids=["a misspelt field", "one beside the pod", "a number for a text", "a misspelt limit", "a text for a number"],
)
def test_what_kubernetes_would_refuse_in_a_pod_is_found(path, value):
    _, worker = ray_pods(changed("rayservice", path, value))
    with pytest.raises(jsonschema.ValidationError):
        check_kubernetes(worker)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*PREDICTOR, "enableServiceLink"), False),
        ((*PREDICTOR, "maxReplica"), 4),
        ((*PREDICTOR, "containers", 0, "args", 3), 8080),
    ],
    ids=["a misspelt field", "a misspelt field of KServe's", "a number among words"],
)
def test_what_kubernetes_would_refuse_in_the_predictors_pod_is_found(kserve, path, value):
    document = predictor_pod(changed("inferenceservice", path, value), kserve)
    with pytest.raises(jsonschema.ValidationError):
        check_kubernetes(document)


def test_misspelt_metadata_is_found():
    with pytest.raises(jsonschema.ValidationError):
        check_metadata(changed("rayservice", ("metadata", "label"), {}))


@pytest.mark.parametrize(
    ("path", "value", "found"),
    [
        (("ports", 0, "name"), "a-name-beyond-15", "a-name-beyond-15"),
        (("ports", 0, "name"), "grpc", "grpc"),
        (("ports", 0, "name"), "8000", "8000"),
        (("resources", "limits", "memory"), "24 GB", "memory: 24 GB"),
    ],
    ids=["a long name of a port", "a name of two ports", "no letter in a name", "no quantity"],
)
def test_what_kubernetes_would_refuse_beyond_its_schema_is_found(path, value, found):
    _, worker = ray_pods(changed("rayservice", (*WORKER_POD, "containers", 0, *path), value))
    assert refused_beyond_the_schema(worker) == [found]


def test_kserves_models_know_every_field_of_the_inference_service(kserve):
    service = manifest("inferenceservice")
    check_kserve(service, kserve)
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*PREDICTOR, "maxReplica"), 4),
        ((*PREDICTOR, "maxReplicas"), "4"),
        (("spec", "predictors"), {}),
        (PREDICTOR, None),
        ((*PREDICTOR, "logger"), {"mod": "all"}),
        ((*PREDICTOR, "containers"), {}),
    ],
    ids=["a misspelt field", "a text for a number", "a misspelt part", "no predictor", "one within", "no list"],
)
def test_what_kserve_would_refuse_is_found(kserve, path, value):
    with pytest.raises(jsonschema.ValidationError):
        check_kserve(changed("inferenceservice", path, value), kserve)


def test_kuberays_types_have_every_field_of_the_ray_service():
    check_kuberay(manifest("rayservice"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*WORKERS, "maxReplica"), 8),
        ((*WORKERS, "minReplicas"), "1"),
        ((*CLUSTER, "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ((*CLUSTER, "enableInTreeAutoscaler"), True),
        ((*CLUSTER, "autoscalerOptions"), {"idleTimeout": 60}),
        (("spec", "serveConfig"), ""),
    ],
    ids=[
        "a misspelt field of a worker group",
        "a text for a number",
        "a number for a text",
        "a misspelt field of the cluster",
        "a misspelt option",
        "a misspelt field of the service",
    ],
)
def test_what_kuberay_would_refuse_is_found(path, value):
    with pytest.raises(jsonschema.ValidationError):
        check_kuberay(changed("rayservice", path, value))


def test_rays_autoscaler_reads_a_head_that_computes_nothing_and_workers_of_one_gpu():
    nodes = ray_nodes(manifest("rayservice"))
    assert nodes.keys() == {"headgroup", "gpu"}
    assert nodes["headgroup"]["resources"] == {"CPU": 0, "memory": 8 * GIB}
    assert nodes["gpu"]["resources"] == {"CPU": 4, "GPU": 1, "memory": 24 * GIB}
    assert (nodes["gpu"]["min_workers"], nodes["gpu"]["max_workers"]) == (1, 8)


def test_the_workers_have_room_for_as_many_replicas_as_serve_may_start():
    served, deployment = application()
    (scaled,) = served.deployments
    assert (
        room(ray_nodes(manifest("rayservice"))["gpu"], needed(deployment)) >= scaled.autoscaling_config["max_replicas"]
    )


def test_workers_that_ask_for_no_gpu_have_room_for_no_replica():
    _, deployment = application()
    without = changed("rayservice", (*WORKER_POD, "containers", 0, "resources"), {"limits": {"cpu": "4"}})
    assert room(ray_nodes(without)["gpu"], needed(deployment)) == 0


def test_serves_configuration_is_what_serve_takes_and_its_application_can_be_built():
    served, built = application()
    (deployment,) = served.deployments
    assert built.name == deployment.name
    assert built.ray_actor_options["num_gpus"] == 1


def test_the_containers_words_are_those_of_headrace_serve():
    container = manifest("inferenceservice")["spec"]["predictor"]["containers"][0]
    parser = argparse.ArgumentParser()
    serve_options.add_serve_options(parser)
    args = parser.parse_args(container["args"])
    assert (*container["command"], args.name) == ("headrace", "serve", "mine")
    ports = {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert ports == {container["ports"][0]["containerPort"]} == {int(args.http_port)}


def test_the_predictors_pod_has_time_to_drain():
    """Knative gives a pod the time of a request to end, Kubernetes otherwise 30 s."""
    predictor = manifest("inferenceservice")["spec"]["predictor"]
    (drain,) = (word for word in predictor["containers"][0]["args"] if word.startswith("--drain-timeout="))
    assert float(drain.partition("=")[2]) < min(predictor["timeout"], 30)
