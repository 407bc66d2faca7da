"""How many replicas: the numbers, and a cluster that follows them; and a deployment in somebody's own graph."""

import pytest

from headrace.ray_serve import scaling

NODES = [{"CPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 4.0}]


@pytest.mark.parametrize(
    ("needs", "fits"),
    [
        ({"CPU": 1, "GPU": 0}, 14),
        ({"CPU": 1, "GPU": 1}, 5),
        ({"CPU": 4, "GPU": 1}, 3),
        ({"CPU": 0, "GPU": 0.25}, 20),
        ({"CPU": 0.1, "GPU": 0}, 140),
        ({"CPU": 9, "GPU": 0}, 0),
    ],
    ids=str,
)
def test_a_replica_fits_where_one_node_has_all_that_it_needs(needs, fits):
    assert scaling.room(NODES, needs) == fits


def test_a_replica_is_given_what_fills_its_batches_twice_and_replicas_are_added_before():
    load = scaling.load_of(max_batch_size=32, lanes=4)
    assert load.most == 2 * 32 * 4
    assert load.target == 0.75 * 32 * 4
    assert scaling.load_of(max_batch_size=1, lanes=1).target == 1
