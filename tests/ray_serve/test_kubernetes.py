"""The manifests of deploy/kubernetes: their form, Serve's configuration in one, and our command line in the other."""

import argparse
import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from headrace import serve_options

ROOT = Path(__file__).parents[2]
NAMES = ("rayservice", "inferenceservice")


def manifest(name):
    return yaml.safe_load((ROOT / f"deploy/kubernetes/{name}.yaml").read_text())


def schema(name):
    return json.loads((ROOT / f"tests/data/kubernetes/{name}.schema.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_has_the_form_that_its_operator_takes(name):
    jsonschema.Draft202012Validator.check_schema(schema(name))
    jsonschema.validate(manifest(name), schema(name))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("rayservice", ["spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        ("rayservice", ["spec", "rayClusterConfig", "workerGroupSpecs", 0, "maxReplica"], 8),
        ("inferenceservice", ["spec", "predictor", "containers", 0, "ports", 0, "name"], "a-name-beyond-15"),
        ("inferenceservice", ["spec", "predictor", "containers", 0, "args", 3], 8080),
    ],
    ids=["a number for a text", "a misspelt field", "a long name of a port", "a number among words"],
)
def test_what_an_operator_would_refuse_is_found(name, path, value):
    changed = copy.deepcopy(manifest(name))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, schema(name))


def test_serves_configuration_is_what_serve_takes_and_its_application_can_be_built():
    serve_schema = pytest.importorskip("ray.serve.schema", reason="Ray is not installed; pip install 'headrace[ray]'")
    application = pytest.importorskip("headrace.ray_serve.application")
    given = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    config = serve_schema.ServeDeploySchema.model_validate(given)
    (only,) = config.applications
    assert only.import_path == f"{application.__name__}:{application.build.__name__}"
    built = application.build(only.args)
    (deployment,) = only.deployments
    assert built._bound_deployment.name == deployment.name
    assert built._bound_deployment.ray_actor_options["num_gpus"] == 1


def test_the_containers_words_are_those_of_headrace_serve():
    container = manifest("inferenceservice")["spec"]["predictor"]["containers"][0]
    parser = argparse.ArgumentParser()
    serve_options.add_serve_options(parser)
    args = parser.parse_args(container["args"])
    assert (*container["command"], args.name) == ("headrace", "serve", "mine")
    ports = {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert ports == {container["ports"][0]["containerPort"]} == {int(args.http_port)}
