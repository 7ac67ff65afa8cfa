"""Any server that speaks OpenAI's chat completions as a Teacher: vLLM, SGLang, Ollama, LM Studio, llama.cpp, OpenAI,
Gemini's compatible endpoint, litellm. OpenAI's official SDK.

The key comes from OPENAI_API_KEY; a local server (`is_local`) needs none. Pace, retries, budget and cache are those of
every Teacher behind an API (teacher/api_teacher.py). Used through `python haiku.py --teacher openai`.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit

from ares.cli import UserError
from teacher.api_teacher import ApiTeacher, Preset
from teacher.budget import Price, price_of
from teacher.sdk_client import checked_address, environment_key

OPENAI = "https://api.openai.com/v1"
# greedy; a paid model may refuse a temperature, and may think whatever it is told
LOCAL = Preset({"temperature": 0.0}, structured=True, exact=True)
REMOTE = Preset(structured=True, exact=True, may_think=True)


def is_local(url: str | None) -> bool:
    """Whether a server runs on this machine or in its network: an address that is not global (127.*, ::1, 10.*,
    192.168.* ...), `localhost`, a name without a dot, or one that ends in .local, .localhost, .internal or .lan."""
    host = urlsplit(url or OPENAI).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith((".local", ".localhost", ".internal", ".lan"))


class OpenAITeacher(ApiTeacher):
    """Asks one model through chat completions. Needs OPENAI_API_KEY once it is entered, unless the server is local.

    `price`: without one, a local server costs nothing. `more`: see ApiTeacher.
    """

    name = "openai"
    api = "chat completions"
    sdk, client_class = "openai", "AsyncOpenAI"
    key_name, address_name = "OPENAI_API_KEY", "OPENAI_BASE_URL"
    address_hint = "with its /v1"
    most_image_tokens = 48_200  # gpt-4o-mini, 8 tiles: 2,833 + 8 * 5,667

    def __init__(
        self, model: str, base_url: str | None = None, concurrency: int = 8, *, price: Price | None = None, **more: Any
    ):
        url = self.address_of(base_url, "--base_url") if base_url else self.environment_address()
        price = self.price_at(model, url, price)
        super().__init__(model, url, concurrency, preset=LOCAL if is_local(url) else REMOTE, price=price, **more)
        # its newer models refuse `max_tokens`, other servers may not know this
        if (urlsplit(url or OPENAI).hostname or "").endswith((".openai.com", ".openai.azure.com")):
            self.length_field = "max_completion_tokens"

    @classmethod
    def price_at(cls, model: str, url: str | None, price: Price | None = None) -> Price | None:
        """`price`, else nothing for a local server, else the table's; None if that has none."""
        return price or (Price(0.0, 0.0) if is_local(url) else price_of(model))

    @classmethod
    def address_of(cls, url: str, flag: str) -> str:
        """With `/v1` if it has no path, without a path of the API."""
        url = checked_address(url, flag, cls.key_name)
        url = re.sub(r"(/+(chat/completions|completions|responses|models))?/*([?#].*)?$", "", url)
        return url if urlsplit(url).path.strip("/") else f"{url}/v1"

    @classmethod
    def find_key(cls, base_url: str | None = None) -> str:
        key = environment_key(cls.key_name)
        if not key and not is_local(base_url):
            raise UserError(
                f"--teacher openai: {cls.key_name} is not set; export it, name a server of your own with --base_url "
                "(local ones need no key), or use --teacher reference"
            )
        return key

    def endpoint(self) -> Any:
        return self.client.chat.completions

    def image_block(self, kind: str, data: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}

    def form(self, schema: dict[str, Any], kind: str) -> dict[str, Any]:
        named = {"name": kind, "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": named}}
