"""The server over HTTP/1.1: `front.make_front`. Tensors' bytes are received straight into the ring's rows."""
