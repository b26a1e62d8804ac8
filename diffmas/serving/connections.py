"""Connections of the server: one that asks for nothing is closed. uvicorn's own limit begins with the first answer."""

from asyncio import Transport

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["Connection"]


class Connection(AutoHTTPProtocol):
    """uvicorn's, with a limit of `patience` seconds from when it is made, or from a request's first byte on, to the end of the
    request's head, however slowly it comes. (One that waits behind an answer has uvicorn's timeout_keep_alive.)"""

    patience = 30.0
    _closing = None  # a timer

    @property
    def _asks(self) -> bool:
        """Whether a request is there that is not answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: Transport) -> None:
        super().connection_made(transport)
        self._closing = self.loop.call_later(self.patience, transport.close)

    def data_received(self, data: bytes) -> None:
        if self._closing is None and not self._asks:
            self._closing = self.loop.call_later(self.patience, self.transport.close)
        super().data_received(data)
        if self._asks:
            self._calm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def _calm(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
