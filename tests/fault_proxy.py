"""A proxy on loopback that spoils some of the answers of the HTTP server behind it."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter

FAULTS = ("error", "slow down", "drop", "reset", "short", "lie", "stall", "late")
"""500; 503; no answer; a reset in mid-body; a body that ends early; a shorter body that claims to be whole; a
body that stops and stays; an answer that does not come."""

XML = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{}</Code><Message>injected</Message></Error>'


class FaultProxy:
    """Runs in a thread; use as a context manager.

    Args:
        upstream: port of the server on 127.0.0.1.
        rate: fraction of the answers that are spoiled.
        seed: of which and how.
        kinds: faults to choose from.

    Attributes:
        port: where it listens.
        met: faults injected, by kind; ``"none"``: answers passed on.
    """

    def __init__(self, upstream: int, rate: float, seed: int = 0, kinds: tuple[str, ...] = FAULTS):
        self.upstream, self.rate, self.kinds = upstream, rate, kinds
        self.met: Counter[str] = Counter()
        self.port = 0
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()

    def __enter__(self) -> FaultProxy:
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._client, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        clients = asyncio.all_tasks(self._loop)
        for client in clients:
            client.cancel()
        self._loop.run_until_complete(asyncio.gather(*clients, return_exceptions=True))
        self._loop.close()

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head, body = await _message(reader, writer=writer)
        fault = self._random.choice(self.kinds) if self._random.random() < self.rate else "none"
        self.met[fault] += 1
        if fault in ("error", "slow down"):
            code, name = ("500", "InternalError") if fault == "error" else ("503", "SlowDown")
            text = b"" if head.startswith(b"HEAD") else XML.format(name).encode()
            writer.write(f"HTTP/1.1 {code} Injected\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
            await writer.drain()
            return True
        if fault == "drop":
            return False
        if fault == "late":
            await asyncio.sleep(60)
            return False
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        up_writer.write(head + body)
        answer, content = await _message(up_reader, head.startswith(b"HEAD"))
        up_writer.close()
        return await self._spoil(writer, fault, answer, content)

    async def _spoil(self, writer: asyncio.StreamWriter, fault: str, answer: bytes, content: bytes) -> bool:
        half = len(content) // 2
        if fault == "lie" and half:
            length = f"content-length: {len(content)}".encode()
            lines = [
                f"Content-Length: {half}".encode() if line.lower() == length else line
                for line in answer.split(b"\r\n")
            ]
            answer, content = b"\r\n".join(lines), content[:half]
        elif fault in ("reset", "short", "stall") and half:
            writer.write(answer + content[:half])
            await writer.drain()
            if fault == "stall":
                await asyncio.sleep(60)
            if fault == "reset":
                writer.transport.abort()
            return False
        writer.write(answer + content)
        await writer.drain()
        return True


async def _message(
    reader: asyncio.StreamReader, bodiless: bool = False, writer: asyncio.StreamWriter | None = None
) -> tuple[bytes, bytes]:
    """Head and body of a request or an answer; a client that asks whether to send a body is told to."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    fields = dict(line.split(":", 1) for line in lines[1:] if ":" in line)
    if "100-continue" in fields.get("expect", "") and writer is not None:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
        kept = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:")]
        head = b"\r\n".join(kept)
    length = 0 if bodiless else int(fields.get("content-length", 0))
    return head, await reader.readexactly(length)
