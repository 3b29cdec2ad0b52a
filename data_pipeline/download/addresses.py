"""Which addresses may be asked: public ones over http and https, unless more is allowed by name.

A URL of a published list may point anywhere, and so may what it redirects to or what its name resolves
to. So the rule is applied to the address that a connection is really made to: the resolver gives out
allowed addresses only, and every redirect is a new request under the same rule.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

from data_pipeline.errors import SettingsError


class Forbidden(OSError):
    """An address that the rule does not allow; the message names the host."""


class AddressRule:
    """Allows public addresses, and what is named.

    Args:
        allowed: networks beyond the public addresses, such as ``127.0.0.0/8`` or ``10.1.2.3``.

    Raises:
        SettingsError: when one is not a network.
    """

    def __init__(self, allowed: Sequence[str] = ()):
        try:
            self.allowed = [ipaddress.ip_network(network, strict=False) for network in allowed]
        except ValueError as error:
            raise SettingsError(f"--allow: {error}") from None

    def permits(self, address: str) -> bool:
        """Whether a numeric address may be asked."""
        try:
            ip = ipaddress.ip_address(address.split("%")[0])
        except ValueError:
            return False
        inner = _inner(ip)
        if any(
            one.version == network.version and one in network
            for one in (ip, inner)
            for network in self.allowed
        ):
            return True
        return all(one.is_global and not one.is_multicast for one in (ip, inner))

    def check(self, url: str) -> None:
        """Check what can be told of a URL before its name is resolved.

        Raises:
            Forbidden: for other schemes, credentials in the URL and numeric addresses out of bounds.
        """
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise Forbidden("not a URL") from None
        if parts.scheme not in ("http", "https") or not host:
            raise Forbidden(f"not an http or https URL: {parts.scheme or 'nothing'}")
        if parts.username is not None:
            raise Forbidden(f"{host}: credentials in the URL")
        numeric = _numeric(host)
        if numeric is not None and not self.permits(numeric):
            raise Forbidden(f"{host} is not a public address")


class CheckedResolver(AbstractResolver):
    """Names to allowed addresses. The connection is made to what is given out here, so a name cannot
    mean another address between the check and the connection."""

    def __init__(self, rule: AddressRule):
        self.rule = rule
        self._plain = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Addresses of a name.

        Raises:
            Forbidden: when it has addresses and none is allowed.
        """
        found = await self._plain.resolve(host, port, family)
        allowed = [one for one in found if self.rule.permits(one["host"])]
        if found and not allowed:
            raise Forbidden(f"{host} is not a public address")
        return allowed

    async def close(self) -> None:
        await self._plain.close()


def _numeric(host: str) -> str | None:
    """The address that a host is when it is written in numbers, in any way that a resolver takes."""
    try:
        return str(ipaddress.ip_address(host.split("%")[0]))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))  # 127.1, 0x7f000001, 2130706433
    except (OSError, ValueError):
        return None


def _inner(ip: Any) -> Any:
    """The IPv4 address inside an IPv6 one (mapped, 6to4, Teredo, NAT64), or the address itself."""
    if ip.version == 4:
        return ip
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    if ip.sixtofour is not None:
        return ip.sixtofour
    if ip.teredo is not None:
        return ip.teredo[1]
    if ip in ipaddress.ip_network("64:ff9b::/96"):
        return ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
    return ip
