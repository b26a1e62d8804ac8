"""Whether the Hugging Face hub can be asked."""

import socket
import time
from urllib.parse import urlsplit
from urllib.request import getproxies

__all__ = ["hub_is_away"]

FRESH, TIMEOUT = 60.0, 5.0  # seconds: that an answer holds, as a model has many files; that one address is waited for
KNOWN: dict[tuple[str, int], tuple[float, bool]] = {}  # host and port -> when it was asked, whether it is away


def hub_is_away() -> bool:
    """Whether no connection comes about to where the hub is. huggingface_hub asks for each file six times, with 23 seconds
    between, before it looks for what was downloaded before; this asks once a minute. False with a proxy, which is for it to
    know, where it does not ask (`HF_HUB_OFFLINE`), and for an endpoint that is no URL."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies().keys() & {"http", "https", "all"}:
        return False
    hub = urlsplit(constants.ENDPOINT)
    try:
        where = hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)
    except ValueError:  # of the port
        return False
    if hub.hostname is None:
        return False
    asked, away = KNOWN.get(where, (float("-inf"), False))
    if time.monotonic() - asked > FRESH:
        try:
            socket.create_connection(where, timeout=TIMEOUT).close()
            away = False
        except OSError:
            away = True
        KNOWN[where] = time.monotonic(), away
    return away
