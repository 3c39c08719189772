"""A service that listens on one address, reached at more of them: bytes are passed on both ways.

torch's store listens on one socket, and one socket has one address, or all of them. Hosts that reach rank 0 by another
of its networks come in here.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Sequence

_CHUNK = 1 << 16  # bytes


class Relay:
    """Passes connections on to a service, on a thread of its own, until it is closed.

    Args:
        listeners: Listening sockets; the relay closes them.
        service: Address and port of the service.
    """

    def __init__(self, listeners: Sequence[socket.socket], service: tuple[str, int]) -> None:
        self._listeners, self._service = listeners, service
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close all connections and sockets."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        tasks: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(self._pass_on(reader, writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        servers = [await asyncio.start_server(accept, sock=listener) for listener in self._listeners]
        await self._closing.wait()
        for server in servers:
            server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError):
                there_reader, there_writer = await asyncio.open_connection(*self._service)
                try:
                    ways = [
                        asyncio.ensure_future(_copy(reader, there_writer)),
                        asyncio.ensure_future(_copy(there_reader, writer)),
                    ]
                    try:
                        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        for way in ways:
                            way.cancel()
                finally:
                    there_writer.close()
        finally:
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while content := await reader.read(_CHUNK):
            writer.write(content)
            await writer.drain()
