"""Certificates made for a test, in a folder of it."""

import datetime
import ssl

import trustme


class Certificates:
    """Files of an authority, of servers (`localhost`, one for another name, one that has expired) and of a client."""

    def __init__(self, folder):
        authority, stranger = trustme.CA(), trustme.CA()
        yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        self._folder = folder
        self.ca = self._write("ca", authority.cert_pem)
        self.other_ca = self._write("other-ca", stranger.cert_pem)
        self.server = self._pair("server", authority.issue_cert("localhost", "127.0.0.1"))
        self.elsewhere = self._pair("elsewhere", authority.issue_cert("models.example.org"))
        expired = authority.issue_cert("localhost", not_before=yesterday - datetime.timedelta(1), not_after=yesterday)
        self.expired = self._pair("expired", expired)
        self.client = self._pair("client", authority.issue_cert("client@example.org"))
        self.stranger = self._pair("stranger", stranger.issue_cert("client@example.org"))

    def context(self, pair=None, *, protocol="http/1.1", client_ca=None, newest=None):
        """Return what a server's sockets are wrapped with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*(pair or self.server))
        context.set_alpn_protocols([protocol])
        if newest is not None:
            context.maximum_version = newest
        if client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(client_ca)
        return context

    def _write(self, name, *blobs):
        path = self._folder / f"{name}.pem"
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        return path

    def _pair(self, name, issued):
        key = self._write(f"{name}-key", issued.private_key_pem)
        return self._write(name, *issued.cert_chain_pems), key
