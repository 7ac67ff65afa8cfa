"""What the official SDKs of Anthropic and OpenAI have in common: key, address, proxy, one request, errors.

Both are made by one generator, and differ in names only. Keys come from the environment alone and are never written or
shown. An SDK is imported where it is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from ares.cli import UserError
from teacher.api_responses import ApiError, NoAnswer
from teacher.redact import redact

LISTING_SECONDS = 5.0  # for a server to say which models it has
SDK_OPTIONS = frozenset(("extra_body", "extra_headers", "extra_query", "timeout"))  # arguments that are no fields
TIMEOUT = 180.0  # seconds for one request; an answer takes a few


def environment_key(name: str) -> str:
    """The key in an environment variable, "" if there is none. Raises UserError, which does not show it, for one that
    cannot be a key."""
    key = os.environ.get(name, "").strip()
    if not key.isascii() or not (key or " ").isprintable() or " " in key:
        raise UserError(f"{name} holds characters that no key has; export it again")
    return key


def checked_address(url: str, flag: str, key_name: str) -> str:
    """`url` without blanks. Raises UserError naming `flag` for what is no address or holds a user name or a password,
    without showing those."""
    url = url.strip()
    if "@" in url:
        raise UserError(f"{flag}: the address holds a user name or a password; remove them; the key is {key_name}")
    try:
        parts = urlsplit(url)
        host = re.fullmatch(r"(\[.+\]|[^][:]+)(:\d*)?", parts.netloc) and parts.hostname  # [::1], a name or IPv4
        sound = parts.scheme in ("http", "https") and host and parts.port != 0  # `port` raises above 65535
    except ValueError:
        sound = False
    if not sound or " " in url or not url.isprintable():
        shown = redact(url, os.environ.get(key_name, "").strip())
        shown = shown if shown.isprintable() else ascii(shown)
        raise UserError(f"{flag}: {shown} is no address; it begins with http:// or https://, then host or host:port")
    return url


class SdkClient:
    """One client of an SDK, within one event loop. A subclass sets the fields and defines the three methods below.

    Args:
        base_url: the server's address; None: the one in the environment, else the SDK's.
        concurrency: the most requests in flight.
        timeout: seconds from sending a request to its whole reply.
    """

    name: str
    api: str  # for messages
    sdk: str  # name of the module
    client_class: str  # in it
    key_name: str  # environment variable of the key
    address_name: str  # environment variable of the address
    address_hint: str  # for messages: what is an address

    def __init__(self, base_url: str | None, concurrency: int, timeout: float):
        self.base_url = self.address_of(base_url, "--base_url") if base_url is not None else None
        self.concurrency, self.timeout = concurrency, timeout
        self.secret = ""
        self.address = ""
        self.client: Any = None

    @classmethod
    def address_of(cls, url: str, flag: str) -> str:
        """The address as the SDK wants it. Raises UserError naming `flag` (`checked_address`)."""
        raise NotImplementedError

    @classmethod
    def find_key(cls, base_url: str | None = None) -> str:
        """The key for a server from the environment. Raises UserError if there is none and one is needed."""
        raise NotImplementedError

    def endpoint(self) -> Any:
        """The SDK's resource whose `create` sends a request."""
        raise NotImplementedError

    @classmethod
    def environment_address(cls) -> str | None:
        url = os.environ.get(cls.address_name)
        return cls.address_of(url, cls.address_name) if url else None

    def connect(self) -> None:
        """Make the SDK's client. Raises UserError for a key, proxy or certificates that cannot be used."""
        sdk = importlib.import_module(self.sdk)  # a second: not for --help, nor for the reference Teacher
        address = self.base_url or self.environment_address()
        self.secret = self.find_key(address)
        # httpx under the name by which this version of the SDK knows it
        base = next(each for each in sdk.DefaultAsyncHttpxClient.__mro__ if each.__name__ == "AsyncClient")
        httpx = importlib.import_module(base.__module__.partition(".")[0])
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        # an explicit api_key keeps the SDK from looking for other credentials in the environment and on disk
        self.client = getattr(sdk, self.client_class)(
            api_key=self.secret or "none",
            base_url=address,
            max_retries=0,  # retried in ApiTeacher, so that every request is paced and booked
            timeout=self.timeout,
            http_client=self.check_network(limits=limits),
        )
        self.address = str(self.client.base_url)
        self._arguments = inspect.signature(self.endpoint().create).parameters.keys() - SDK_OPTIONS

    async def __aexit__(self, *exc: object) -> None:
        await self.client.close()

    @classmethod
    def check_network(cls, **options: Any) -> Any:
        """A new HTTP client of the SDK. Raises UserError where the proxy or the certificates that the environment
        names cannot be used."""
        sdk = importlib.import_module(cls.sdk)
        certificates = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        try:
            for name in certificates:
                os.stat(os.environ[name])
            return sdk.DefaultAsyncHttpxClient(**options)  # reads both
        except OSError as error:
            where = " or ".join(certificates) or "the system"
            raise UserError(
                f"--teacher {cls.name}: the certificates that {where} names cannot be read ({error}); unset it or "
                "name others"
            ) from error
        except Exception as error:  # ValueError, ImportError or the HTTP library's own, of the version installed
            upper = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
            proxies = [name for name in (*upper, *map(str.lower, upper)) if os.environ.get(name)]
            # not the address itself: it may hold a password
            kinds = sorted({os.environ[name].partition("://")[0] for name in proxies if "://" in os.environ[name]})
            raise UserError(
                f"--teacher {cls.name}: the proxy in {' or '.join(proxies) or 'the environment'} "
                f"({', '.join(kinds)}://...) cannot be used; name an http:// proxy, or socks5:// after pip install "
                "socksio, or unset it"
            ) from error

    @classmethod
    @contextlib.contextmanager
    def translated_errors(cls) -> Iterator[None]:
        """Raise exceptions of the SDK as ApiError, NoAnswer or ValueError."""
        sdk = importlib.import_module(cls.sdk)
        try:
            yield
        except sdk.APIStatusError as error:
            raise ApiError(error.status_code, error.body, error.response.headers) from None
        except sdk.APIConnectionError as error:
            kind = type(error.__cause__ or error).__name__
            raise NoAnswer(kind, timeout=isinstance(error, sdk.APITimeoutError)) from None
        except sdk.APIError.__base__ as error:  # AnthropicError, OpenAIError
            raise ValueError(f"{type(error).__name__}: {error}") from None

    async def send(self, parameters: dict[str, Any]) -> tuple[bytes, Mapping[str, str]]:
        """Send a request once: (body, headers) of an HTTP 200. Raises ApiError, NoAnswer, ValueError."""
        # as extra_body what this SDK has no argument for: `temperature` in new ones, `output_config` in old ones
        extra = {name: value for name, value in parameters.items() if name not in self._arguments}
        known = {name: value for name, value in parameters.items() if name in self._arguments}
        with self.translated_errors():
            # raw: the SDK accepts only its own form of a reply; a body without `usage` was paid for all the same
            raw = await self.endpoint().with_raw_response.create(**known, extra_body=extra or None)
            return await raw.http_response.aread(), raw.http_response.headers

    async def listed_models(self) -> list[str]:
        """Ids of the models that the server lists; none where it lists none."""
        with contextlib.suppress(Exception):  # for a message only
            async with asyncio.timeout(LISTING_SECONDS):
                raw = await self.client.models.with_raw_response.list()
                listed = json.loads(await raw.http_response.aread())
                return [str(each["id"]) for each in listed["data"]]
        return []
