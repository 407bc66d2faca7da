"""Call a server from Python: over shared memory where the server is on this host, else over HTTP. No torch here."""

from headrace.client.blocking import Allocation, Client
from headrace.client.on_loop import AsyncAllocation, AsyncClient

__all__ = ["Allocation", "AsyncAllocation", "AsyncClient", "Client"]
