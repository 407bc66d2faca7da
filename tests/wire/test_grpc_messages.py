"""The protocol's messages: as committed, as generated, and as other implementations have them."""

from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc
from tritonclient.grpc import model_config_pb2, service_pb2

from headrace.wire import grpc as wire
from headrace.wire.grpc import inference_pb2 as pb

FOLDER = Path(wire.__file__).parent


def test_what_is_committed_is_what_the_generator_makes(tmp_path):
    arguments = ["-I", str(FOLDER), f"--descriptor_set_out={tmp_path}/inference.binpb", f"--pyi_out={tmp_path}"]
    assert protoc.main(["protoc", *arguments, "inference.proto"]) == 0
    for name in ("inference.binpb", "inference_pb2.pyi"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes(), "make proto"


def ours():
    return FileDescriptorSet.FromString((FOLDER / "inference.binpb").read_bytes()).file[0]


def known():
    """Return the messages and enums of a client of the protocol, by full name, and its calls."""
    messages, enums, calls = {}, {}, {}
    for module in (service_pb2, model_config_pb2):
        file = FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        messages.update(walk(file.message_type))
        enums.update({enum.name: {value.name: value.number for value in enum.value} for enum in file.enum_type})
        calls.update({method.name: method for service in file.service for method in service.method})
    return messages, enums, calls


def walk(messages, prefix=""):
    for message in messages:
        yield prefix + message.name, message
        yield from walk(message.nested_type, f"{prefix}{message.name}.")


def fields(message):
    return {field.name: (field.number, field.label, field.type, field.type_name) for field in message.field}


OURS = dict(walk(ours().message_type))


@pytest.mark.parametrize("name", OURS)
def test_a_messages_fields_have_the_protocols_numbers_and_types(name):
    theirs = fields(known()[0][name])
    assert fields(OURS[name]).items() <= theirs.items()


def test_the_element_types_and_calls_are_the_protocols():
    _, enums, calls = known()
    (enum,) = ours().enum_type
    assert {value.name: value.number for value in enum.value} == enums[enum.name]
    for method in ours().service[0].method:
        assert method.input_type == calls[method.name].input_type
        assert method.output_type == calls[method.name].output_type
        assert method.client_streaming == calls[method.name].client_streaming
        assert method.server_streaming == calls[method.name].server_streaming


def test_a_clients_messages_and_ours_live_in_one_process():
    theirs = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"x"])
    theirs.parameters["timeout"].int64_param = 5
    message = pb.ModelInferRequest.FromString(theirs.SerializeToString())
    assert message.parameters["timeout"].int64_param == 5
    assert message.SerializeToString() == theirs.SerializeToString()
