"""Remote media: fetched from public addresses alone, within bytes and seconds.

The address is checked where the connection is made, so that neither another spelling of it, nor a redirect, nor a name
that resolves differently the second time leads anywhere else.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urljoin

import httpcore2 as httpcore

from x2l.serve.answer import RequestError

REDIRECTS = (301, 302, 303, 307, 308)
MAX_HOPS = 3
NAT64 = ipaddress.ip_network("64:ff9b::/96")
PLAIN_URL = re.compile(r"https?://[\x21-\x7e]{1,2040}", re.IGNORECASE)


def is_public(address: str) -> bool:
    """Whether an IP address, and every IPv4 address within it, belongs to the public internet."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner)) and (ip.ipv4_mapped is not None or ip.is_global)
    return ip.is_global and not ip.is_multicast


class _Guarded(httpcore.AsyncNetworkBackend):
    """Resolves a name once, and connects to an address that was checked."""

    def __init__(self, allowed: Callable[[str], bool]):
        self.allowed, self.network = allowed, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise RequestError("the media URL's host cannot be resolved") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or not all(map(self.allowed, addresses)):
            raise RequestError("the media URL leads to an address that is not public")
        return await self.network.connect_tcp(addresses[0], port, timeout, local_address, socket_options)


class Fetcher:
    """Fetches one file over HTTP or HTTPS.

    Args:
        max_bytes: of a file.
        seconds: for everything, redirects included.
        allowed: which IP addresses may be connected to.
    """

    def __init__(self, max_bytes: int, seconds: float = 10.0, allowed: Callable[[str], bool] = is_public):
        self.max_bytes, self.seconds, self.allowed = max_bytes, seconds, allowed

    async def __call__(self, url: str) -> bytes:
        """The file at ``url``.

        Raises:
            RequestError: not a plain http(s) URL, a private address at any hop, too large, too slow, or not to be had.
        """
        try:
            async with asyncio.timeout(self.seconds), httpcore.AsyncConnectionPool(network_backend=_Guarded(self.allowed)) as pool:
                for _ in range(MAX_HOPS + 1):
                    content, url = await self._get(pool, _checked(url))
                    if content is not None:
                        return content
        except TimeoutError as error:
            raise RequestError(f"the media URL took longer than {self.seconds:g} s") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise RequestError("the media URL cannot be fetched") from error
        raise RequestError(f"the media URL redirects more than {MAX_HOPS} times")

    async def _get(self, pool: httpcore.AsyncConnectionPool, url: str) -> tuple[bytes | None, str]:
        """The content, or None and where it has moved."""
        headers = [("Accept", "image/*, audio/*, video/*"), ("Accept-Encoding", "identity"), ("User-Agent", "x2l")]
        async with pool.stream("GET", url, headers=headers) as response:
            received = {name.lower(): value.decode("latin-1") for name, value in response.headers}
            if response.status in REDIRECTS and b"location" in received:
                return None, _joined(url, received[b"location"])
            if response.status != 200:
                raise RequestError(f"the media URL answers with status {response.status}")
            if received.get(b"content-encoding", "identity").lower() != "identity":
                raise RequestError("the media URL answers in a compressed encoding, which was not asked for")
            content = bytearray()
            async for chunk in response.aiter_stream():
                content += chunk
                if len(content) > self.max_bytes:
                    raise RequestError(f"the file at the media URL is larger than {self.max_bytes} bytes")
            return bytes(content), url


def _checked(url: str) -> str:
    """The URL if every parser reads it in one way: printable ASCII, no user, no backslash."""
    authority = url.split("/", 3)[2] if url.count("/") >= 2 else ""
    if not PLAIN_URL.fullmatch(url) or "\\" in url or "@" in authority or not authority:
        raise RequestError("a media URL must be a plain http(s):// URL without user name, backslash or blanks, or a data: URL")
    try:
        if not httpcore.URL(url).host:
            raise ValueError
    except ValueError as error:  # a port that is none, brackets that do not close
        raise RequestError("the media URL is malformed") from error
    return url.split("#", 1)[0]


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise RequestError("the media URL redirects to something that is no URL") from error
