"""One cluster for all tests of Ray: it takes longer to start than any of them. It ends with them: it is never idle."""

import os
import sys

import pytest

from tests.commands import environment
from tests.ray_serve.cluster import Served

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.update(
    PYTHONPATH=environment()["PYTHONPATH"],  # for the nodes, whose folders are others
    # Autoscaling looks every 10 s otherwise.
    RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.2",
    RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S="0.2",
)


@pytest.fixture(scope="package")
def cluster():
    """Three nodes: a head that computes nothing, and two of two CPUs."""
    ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'headrace[ray]'")
    utilities = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed whole")
    quick = {"object_store_memory": 80 << 20}
    started = utilities.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **quick}
    )
    try:
        for _ in range(2):
            started.add_node(num_cpus=2, **quick)
        started.wait_for_nodes(30)
        ray.init(address=started.address, log_to_driver=False, configure_logging=False)
        yield started
    finally:
        if ray.is_initialized() and "ray.serve" in sys.modules:
            sys.modules["ray.serve"].shutdown()
        ray.shutdown()
        started.shutdown()


@pytest.fixture(scope="package")
def served(cluster, tmp_path_factory):
    """The model, deployed as a user does, with two replicas."""
    made = Served(tmp_path_factory.mktemp("ray"), cluster.address)
    made.write(factor=2)
    ended = made.deploy()
    assert ended.code == 0, ended.err
    assert "ready: served, 2 replicas" in ended.err
    return made
