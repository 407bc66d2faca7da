"""The server's frontends: processes that speak to clients, and to the backend through a ring. No torch here."""
