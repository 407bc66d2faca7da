"""Payloads fit what the server declares, are the same for the same seed, and differ from each other."""

import numpy as np
import pytest

from headrace.config import TargetConfig
from headrace.errors import InputError
from headrace.target.asking import Declared
from headrace.target.payloads import Bodies, grpc_body, http_body, make_inputs, open_bodies, rows_of
from headrace.wire.grpc import inference_pb2 as pb

IMAGE = Declared("image", "FP32", (-1, 3, -1, -1))
IDS = Declared("ids", "INT64", (-1, 8))


def target(**options):
    return TargetConfig(url="http://x", model="m", **options)


def test_shapes_come_from_the_server_the_batch_size_and_the_options():
    made = make_inputs((IMAGE, IDS), target(shapes={"image": (2, 3, 4, 5)}, distinct=3), 2, seed=0)
    assert [(each["image"].shape, each["ids"].shape) for each in made] == [((2, 3, 4, 5), (2, 8))] * 3
    assert [rows_of(each) for each in made] == [2, 2, 2]


def test_a_seed_says_all_and_payloads_differ():
    first, again, other = (make_inputs((IDS,), target(distinct=4), 1, seed=seed) for seed in (1, 1, 2))
    assert all((a["ids"] == b["ids"]).all() for a, b in zip(first, again, strict=True))
    assert not any((a["ids"] == b["ids"]).all() for a, b in zip(first, other, strict=True))
    assert len({each["ids"].tobytes() for each in first}) == 4


@pytest.mark.parametrize("datatype", ["FP64", "FP32", "FP16", "BF16", "INT8", "INT32", "INT64", "UINT8", "BOOL"])
def test_every_type_of_number_is_made(datatype):
    (made,) = make_inputs((Declared("x", datatype, (-1, 64)),), target(distinct=1), 2, seed=0)
    _, header_bytes = body = http_body(made, (Declared("x", datatype, (-1, 64)),))
    assert len(body[0]) == header_bytes + made["x"].nbytes
    assert len(np.unique(made["x"])) > 1


def test_whole_numbers_stay_in_their_range():
    made = make_inputs((IDS,), target(int_range=(5, 7), distinct=8), 4, seed=0)
    assert {int(value) for each in made for value in each["ids"].flat} == {5, 6, 7}


@pytest.mark.parametrize(
    ("declared", "options", "words"),
    [
        (IMAGE, {}, "add --shape image=1,3,N,N"),
        (IMAGE, {"shapes": {"image": (1, 4, 2, 2)}}, "the server takes"),
        (IDS, {"shapes": {"words": (1, 4)}}, "no such input; it has ids"),
        (Declared("x", "INT8", (-1, 2)), {"int_range": (0, 300)}, "from|-128 to 127"),
        (Declared("x", "BYTES", (-1, 2)), {}, "random numbers mean nothing"),
    ],
)
def test_what_does_not_fit_is_refused(declared, options, words):
    with pytest.raises(InputError, match=words):
        make_inputs((declared,), target(**options), 1, seed=0)


def test_inputs_may_come_from_a_file(tmp_path):
    np.savez(tmp_path / "x.npz", ids=np.arange(32).reshape(4, 1, 8))
    made = make_inputs((IDS,), target(input_file=tmp_path / "x.npz", distinct=3), 1, seed=0)
    assert [each["ids"].tolist() for each in made] == np.arange(24).reshape(3, 1, 8).tolist()
    np.savez(tmp_path / "y.npz", ids=np.arange(32, dtype=np.float32).reshape(4, 1, 8))
    with pytest.raises(InputError, match="is float32, not INT64"):
        make_inputs((IDS,), target(input_file=tmp_path / "y.npz"), 1, seed=0)
    (tmp_path / "z.npz").write_text("no")
    with pytest.raises(InputError, match=r"no \.npz"):
        make_inputs((IDS,), target(input_file=tmp_path / "z.npz"), 1, seed=0)


def test_a_grpc_message_holds_the_same_bytes():
    (made,) = make_inputs((IDS,), target(distinct=1), 2, seed=0)
    message = pb.ModelInferRequest.FromString(grpc_body(made, (IDS,), target(version="3"))[0])
    assert (message.model_name, message.model_version, list(message.inputs[0].shape)) == ("m", "3", [2, 8])
    assert message.raw_input_contents[0] == made["ids"].tobytes()


def test_bodies_are_shared_by_path():
    bodies = Bodies([(b"{}abc", 2), (b"{}de", 2)])
    assert [bytes(each) for each in open_bodies(bodies.path, bodies.places)] == [b"{}abc", b"{}de"]
    bodies.close()
