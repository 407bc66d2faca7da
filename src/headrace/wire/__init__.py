"""Codecs of the KServe v2 protocol: pure functions between bytes and tensors' bytes, without any I/O."""
