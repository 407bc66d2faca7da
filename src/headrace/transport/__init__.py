"""How a batch crosses from the client's process into the backend's, and its answer back."""
