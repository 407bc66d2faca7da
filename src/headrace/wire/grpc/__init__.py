"""KServe v2 over gRPC as bytes: the protocol's messages, and tensors to them and back. No I/O, and no gRPC library."""
