"""Failures of a cluster and updates, under load: every request is answered or told, and the service comes back."""

import os
import signal

import psutil

from tests.ray_serve.cluster import BAD, raylet_of, raylet_pid

AT_LEAST = 40  # requests before and after what happens


def test_a_killed_replica_costs_no_request_its_answer_or_its_error_and_is_replaced(served):
    with served.load() as answers:
        answers.wait_until(lambda: len(answers.pids) == 2)
        killed = answers.pids.pop()
        os.kill(killed, signal.SIGKILL)
        answers.wait_until(lambda: len(answers.pids - {killed}) == 2)  # the survivor, and the new one
        answers.forget()
        answers.wait_for(AT_LEAST)
    assert set(answers.factors) == {2}
    assert killed not in answers.pids
    assert not answers.errors + answers.silent, "nothing is sent to the dead one any more"


def test_errors_of_requests_that_a_killed_replica_held_are_told(served):
    with served.load(threads=16) as answers:
        answers.wait_until(lambda: len(answers.pids) == 2)
        os.kill(min(answers.pids), signal.SIGKILL)
        answers.wait_for(AT_LEAST)
    assert not answers.silent
    assert set(answers.factors) == {2}
    assert {status for status, _ in answers.errors} <= {500, 503}


def test_a_killed_node_costs_no_request_its_answer_or_its_error(served, cluster):
    with served.load() as answers:
        answers.wait_until(lambda: len(answers.pids) == 2)
        raylets = {pid: raylet_of(pid) for pid in answers.pids}
        nodes = {raylet_pid(node): node for node in cluster.worker_nodes}
        lost = nodes[raylets[min(raylets)]]
        gone = [pid for pid, raylet in raylets.items() if nodes[raylet] is lost]
        cluster.remove_node(lost, allow_graceful=False)
        answers.wait_until(lambda: len(answers.pids - set(gone)) == 2)
        answers.forget()
        answers.wait_for(AT_LEAST)
    assert not answers.errors + answers.silent
    assert set(answers.factors) == {2}
    assert not any(map(psutil.pid_exists, gone))
    cluster.add_node(num_cpus=2, object_store_memory=80 << 20)


def test_an_update_under_load_loses_no_request(served):
    served.write(factor=3)
    with served.load() as answers:
        answers.wait_for(AT_LEAST)
        ended = served.deploy()
        answers.wait_for(AT_LEAST)
    assert ended.code == 0, ended.err
    assert not answers.errors + answers.silent
    assert set(answers.factors) == {2, 3}
    assert answers.factors[-1] == 3
    assert served.infer().json()["outputs"][0]["data"] == [3, 6, 9]


def test_a_version_that_does_not_load_never_takes_traffic_and_the_one_before_goes_on(served):
    (served.folder / "bad.py").write_text(BAD)
    with served.load() as answers:
        answers.wait_for(AT_LEAST)
        ended = served.deploy(file="bad.py")
        answers.wait_for(AT_LEAST)
    assert ended.code == 1
    assert "ValueError: no weights today (line 2 of bad.py); the version before goes on serving" in ended.message
    assert not answers.errors + answers.silent
    assert set(answers.factors) == {3}
