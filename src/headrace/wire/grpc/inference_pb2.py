"""The messages of `inference.proto`, made from its descriptor in a pool of their own.

In protobuf's default pool a name can be defined only once in a process, and clients of the protocol bring the same
names in files of their own; here both can be imported. Their types are in the stub beside this file.
"""

from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

_POOL = DescriptorPool()
for _file in FileDescriptorSet.FromString(Path(__file__).with_name("inference.binpb").read_bytes()).file:
    DESCRIPTOR = _POOL.AddSerializedFile(_file.SerializeToString())
globals().update({name: GetMessageClass(message) for name, message in DESCRIPTOR.message_types_by_name.items()})
