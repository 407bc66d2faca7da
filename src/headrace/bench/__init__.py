"""The benchmark: it measures the server through its designs' protocol, a transport, and records; never from inside."""
