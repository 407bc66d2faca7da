"""What checks the manifests of deploy/kubernetes: Kubernetes' schemas, KServe's models, KubeRay's fields, Ray."""

import ast
import json
import re
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

KUBERNETES = "1.37"
ROOT = Path(__file__).parents[2]
KSERVE_MODELS = Path(sys.prefix) / "kserve/kserve/models"  # where `make test` puts KServe's package
PLAIN_TYPES = {"bool": "boolean", "int": "integer", "str": "string"}

# Fields of a pod that Knative passes on without a feature flag of its own; KServe's other mode takes all.
# Source: PodSpecMask, knative/serving, pkg/apis/serving/fieldmask.go.
KNATIVE_POD_FIELDS = {"serviceAccountName", "containers", "volumes", "imagePullSecrets", "enableServiceLinks"}


def manifest(name):
    return yaml.safe_load((ROOT / f"deploy/kubernetes/{name}.yaml").read_text())


def check_kubernetes(document):
    """Raise jsonschema.ValidationError, of which kubernetes-validate's is one, for what Kubernetes does not know."""
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def check_metadata(service):
    """Check the metadata of a custom resource: that of any resource of Kubernetes' own has the same fields."""
    check_kubernetes({"apiVersion": "v1", "kind": "ConfigMap", "metadata": service["metadata"]})


def pod(template):
    return {"apiVersion": "v1", "kind": "Pod", **template}


def ray_pods(service):
    """Return the pods of a RayService, the head's first."""
    cluster = service["spec"]["rayClusterConfig"]
    return [pod(group["template"]) for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def predictor_pod(service, models):
    """Return the pod of an InferenceService: the predictor's fields except those that are KServe's own."""
    own = models["V1beta1PredictorSpec"]["properties"].keys() - models["V1beta1PodSpec"]["properties"].keys()
    predictor = service["spec"]["predictor"]
    return pod({"spec": {name: value for name, value in predictor.items() if name not in own}})


def check_kuberay(service):
    schema = json.loads((ROOT / "tests/data/kubernetes/rayservice.schema.json").read_text())
    jsonschema.validate(service, schema)


def check_kserve(service, models):
    schema = {"$ref": "#/$defs/V1beta1InferenceService", "$defs": models}
    jsonschema.Draft202012Validator(schema).validate(service)


def kserve_models():
    """Return JSON schemas of KServe's types, by name, made of the models in its package.

    They are read, not imported: the package's root needs all that a server of KServe's does. Kubernetes' own types are
    left open. Skips the test where the package is not installed.
    """
    if not KSERVE_MODELS.is_dir():
        pytest.skip("needs the models of KServe's package: make test installs it")
    names = dict(_kserve_model(path) for path in KSERVE_MODELS.glob("v1beta1_*.py"))
    return {name: _object(fields, names) for name, fields in names.items()}


def _kserve_model(path):
    """Return the name of a generated class, and of each field its name in JSON, type, and whether it must be there."""
    text = path.read_text()
    (made,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    tables = {node.targets[0].id: node.value for node in made.body if isinstance(node, ast.Assign)}
    types, json_names = (ast.literal_eval(tables[name]) for name in ("openapi_types", "attribute_map"))
    required = set(re.findall(r"Invalid value for `(\w+)`, must not be `None`", text))
    return made.name, [(json_names[name], kind, name in required) for name, kind in types.items()]


def _object(fields, models):
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _schema(kind, models) for name, kind, _ in fields},
        "required": [name for name, _, required in fields if required],
    }


def _schema(kind, models):
    if kind.startswith("list["):
        return {"type": "array", "items": _schema(kind[5:-1], models)}
    if kind.startswith("dict(str, "):
        return {"type": "object", "additionalProperties": _schema(kind[10:-1], models)}
    if kind in models:
        return {"$ref": f"#/$defs/{kind}"}
    return {"type": PLAIN_TYPES[kind]} if kind in PLAIN_TYPES else {}


def ray_nodes(service):
    """Return the kinds of nodes that Ray's autoscaler, which KubeRay starts beside the head, knows of a RayService."""
    name = "ray.autoscaler._private.kuberay.autoscaling_config"
    derive = pytest.importorskip(name, reason="Ray is not installed; pip install 'headrace[ray]'")
    metadata = {"name": "a-cluster", "namespace": "default"}
    cluster = {"metadata": metadata, "spec": service["spec"]["rayClusterConfig"]}
    return derive._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]


def room(node, needed):
    """Return how many replicas all nodes of a kind have room for, each of which needs so much of each resource."""
    return node["max_workers"] * int(min(node["resources"].get(name, 0) // much for name, much in needed.items()))


def refused_beyond_the_schema(document):
    """Return what Kubernetes' API server finds in a pod and its schema does not say: names of ports, quantities."""
    containers = document["spec"]["containers"]
    ports = [port["name"] for container in containers for port in container["ports"]]
    misnamed = [name for name in ports if not re.fullmatch(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9](-?[a-z0-9])*", name)]
    twice = {name for name in ports if ports.count(name) > 1}
    kinds = [kind for container in containers for kind in container["resources"].values()]
    amounts = [amount for kind in kinds for amount in kind.items()]
    quantity = re.compile(r"\d+(\.\d+)?([numkMGTPE]|[KMGTPE]i)?")
    unread = [f"{name}: {amount}" for name, amount in amounts if not quantity.fullmatch(str(amount))]
    return [*misnamed, *twice, *unread]
