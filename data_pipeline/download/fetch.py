"""One file from the web: bounded in size and time, tried again where that helps, checked to be an image."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Self
from urllib.parse import urljoin, urlsplit

import aiohttp

from data_pipeline.download.addresses import AddressRule, CheckedResolver, Forbidden
from data_pipeline.errors import BadSample
from data_pipeline.importers.common import checked_image

AGENT = "mmi-megatron (+training data; honours X-Robots-Tag: noai, noimageai)"
NO = ("noai", "noimageai", "noindex", "noimageindex")
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0
CHUNK = 1 << 16
HOSTS = 10_000
"""Hosts whose limits are remembered."""


@dataclass
class Limits:
    """Of a download.

    Attributes:
        connections: under way in all.
        per_host: under way to one host.
        timeout: seconds for one file, redirects included.
        retries: times a file is asked for again after a failure that may pass.
        max_bytes: of a file; it is never read further.
        smallest: pixels of the shorter side at least.
        redirects: followed at most.
        opt_out: leave out files whose ``X-Robots-Tag`` says no to AI or to an index.
    """

    connections: int = 64
    per_host: int = 4
    timeout: float = 20.0
    retries: int = 2
    max_bytes: int = 20 << 20
    smallest: int = 64
    redirects: int = 5
    opt_out: bool = True


class Passing(Exception):
    """May work when it is asked for again; after the last time it is a ``BadSample``."""


class Fetcher:
    """Gets images; an asynchronous context manager.

    Args:
        limits: see ``Limits``.
        rule: which addresses may be asked.
    """

    def __init__(self, limits: Limits, rule: AddressRule):
        self.limits = limits
        self.rule = rule
        self._hosts: OrderedDict[str, asyncio.Semaphore] = OrderedDict()

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            limit=self.limits.connections, resolver=CheckedResolver(self.rule), ttl_dns_cache=300
        )
        # trust_env stays off: a proxy would resolve names itself, past the rule.
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": AGENT, "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )
        self._slots = asyncio.Semaphore(self.limits.connections)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def image(self, url: str) -> bytes:
        """Get an image and check it to its last pixel.

        Raises:
            BadSample: with a reason that is fit for counting.
        """
        for attempt in range(self.limits.retries + 1):
            try:
                async with self._host(url), self._slots, asyncio.timeout(self.limits.timeout):
                    blob = await self._get(url)
                break
            except TimeoutError:
                failure = BadSample("timeout")
            except Passing as error:
                failure = BadSample(str(error))
            except Forbidden as error:
                raise BadSample("address is not allowed", str(error)) from None
            except aiohttp.ClientConnectorError as error:
                if isinstance(error.os_error, Forbidden):
                    raise BadSample("address is not allowed", str(error.os_error)) from None
                failure = BadSample("no connection", type(error).__name__)
            except aiohttp.InvalidURL:
                raise BadSample("not a URL") from None
            except (aiohttp.ClientError, OSError, ValueError, asyncio.IncompleteReadError) as error:
                failure = BadSample("broken answer", type(error).__name__)
            if attempt == self.limits.retries:
                raise failure
            await asyncio.sleep(random.uniform(0, min(FIRST_PAUSE * 4**attempt, LONGEST_PAUSE)))
        return await asyncio.to_thread(checked_image, blob, self.limits.smallest)

    async def _get(self, url: str) -> bytes:
        for _ in range(self.limits.redirects + 1):
            self.rule.check(url)
            async with self._session.get(url, allow_redirects=False) as answer:
                if answer.status in (301, 302, 303, 307, 308):
                    url = urljoin(url, answer.headers.get("Location", ""))
                    continue
                return await self._body(answer)
        raise BadSample("too many redirects")

    async def _body(self, answer: aiohttp.ClientResponse) -> bytes:
        if answer.status in (408, 425, 429) or answer.status >= 500:
            raise Passing(f"status {answer.status}")
        if answer.status != 200:
            raise BadSample(f"status {answer.status}")
        robots = ",".join(answer.headers.getall("X-Robots-Tag", [])).lower()
        if self.limits.opt_out and any(word in robots for word in NO):
            raise BadSample("opted out")
        kind = answer.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if kind and not kind.startswith(("image/", "application/octet-stream", "binary/octet-stream")):
            raise BadSample("not an image", kind[:60])
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise BadSample("compressed answer")
        if (answer.content_length or 0) > self.limits.max_bytes:
            raise BadSample("image is too large", f"{answer.content_length} bytes")
        blob = bytearray()
        async for chunk in answer.content.iter_chunked(CHUNK):
            blob += chunk
            if len(blob) > self.limits.max_bytes:
                raise BadSample("image is too large", f"more than {self.limits.max_bytes} bytes")
        return bytes(blob)

    def _host(self, url: str) -> asyncio.Semaphore:
        try:
            host = urlsplit(url).netloc.lower()
        except ValueError:
            host = ""
        if host not in self._hosts:
            self._hosts[host] = asyncio.Semaphore(self.limits.per_host)
            if len(self._hosts) > HOSTS:
                self._hosts.popitem(last=False)
        self._hosts.move_to_end(host)
        return self._hosts[host]
