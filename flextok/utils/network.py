"""Whether a server can be reached, asked before a library retries for a minute."""

import socket
import urllib.request
from urllib.parse import urlsplit


def reachable(url: str, seconds: float = 3) -> bool:
    """Whether a connection to a server, or to the proxy that leads there, can be opened."""
    server = urlsplit(url)
    proxy = urllib.request.getproxies().get(server.scheme)
    server = server if proxy is None else urlsplit(proxy)
    port = server.port or (80 if server.scheme == "http" else 443)
    try:
        socket.create_connection((server.hostname, port), timeout=seconds).close()
    except OSError:
        return False
    return True
