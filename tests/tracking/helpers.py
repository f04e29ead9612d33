"""A proxy before an MLflow server that asks for what servers of companies ask for: a password, TLS, certificates."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@contextmanager
def guarded(
    upstream: str,
    *,
    authorization: str = "",
    certificate: Path | None = None,
    client_certificate: bool = False,
) -> Iterator[str]:
    """Yield HOST:PORT of a proxy to the server `upstream`; without the header `authorization` it answers 401.

    With a `certificate` it speaks TLS, and asks its clients for that certificate, too, with `client_certificate`.
    """
    host = urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if authorization and self.headers.get("authorization") != authorization:
                self._answer(401, "text/plain", b"You are not authenticated.")
                return
            with closing(http.client.HTTPConnection(host)) as connection:
                connection.request(self.command, self.path, body, {**self.headers, "Host": host})
                answer = connection.getresponse()
                self._answer(answer.status, answer.headers.get("content-type", ""), answer.read())

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward

        def _answer(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            # A connection that is kept would go on after the end of the block.
            self.send_header("connection", "close")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        if client_certificate:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(certificate)
        # Not during `accept`: a client that refuses the certificate would end the server.
        proxy.socket = context.wrap_socket(proxy.socket, server_side=True, do_handshake_on_connect=False)
    serving = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    serving.start()
    try:
        yield f"127.0.0.1:{proxy.server_port}"
    finally:
        proxy.shutdown()
        serving.join()
        proxy.server_close()


def make_certificate(file: Path) -> Path:
    """Write a key and a certificate of 127.0.0.1 that it signs itself, and that may sign others, to `file`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    return file
