"""Whether the Hugging Face hub can be asked."""

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

__all__ = ["hub_is_away"]


def hub_is_away() -> bool:
    """Whether no connection comes about to where the hub is. huggingface_hub asks for each file six times, with 23 seconds
    between, before it looks for what was downloaded before; this asks once. False with a proxy, which is for it to know, and
    where it does not ask (`HF_HUB_OFFLINE`)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies().keys() & {"http", "https", "all"}:
        return False
    hub = urlsplit(constants.ENDPOINT)
    where = hub.hostname, hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection(where, timeout=constants.HF_HUB_ETAG_TIMEOUT).close()
    except OSError:
        return True
    return False
