"""Claude as a Teacher: Anthropic's official SDK, also for gateways that speak the Messages API.

The key comes from ANTHROPIC_API_KEY. Pace, retries and budget are in teacher/api_teacher.py, Message Batches in
teacher/batches.py. Used through `python haiku.py --teacher claude`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self
from urllib.parse import quote

from ares import images
from ares.cli import UserError
from teacher.api_responses import ApiError, NotAReply, error_body, is_account_refusal, read_message, said
from teacher.api_teacher import ApiTeacher, Preset
from teacher.budget import CACHE_WRITE_1_HOUR
from teacher.interface import Failed, Reply, Request
from teacher.redact import redact
from teacher.sdk_client import LISTING_SECONDS, checked_address, environment_key

DEFAULT_MODEL = "claude-haiku-5-5"
# model ids that users still have in their scripts
RETIRED = {"claude-3-haiku-20240307": "April 2026", "claude-3-5-haiku-20241022": "February 2026"}
COUNTED = ("thinking", "output_config", "system", "tools", "tool_choice")  # fields that the counting endpoint takes
TEMPORARY = ("api_error", "overloaded_error", "rate_limit_error", "timeout_error", "unknown")  # of requests in a batch

# Grading needs neither thinking (paid as output) nor chance. The 5 series thinks unless told not to, each model in its
# own words, and answers a non-default temperature with 400; the 4 series thinks only when asked, and takes a
# temperature up to 4.5. Counts and ranges in a schema are not enforced.
_UNTHINKING = Preset({"thinking": {"type": "disabled"}}, structured=True)
_BETWEEN_TOOLS = Preset({"thinking": {"type": "between_tools"}}, structured=True)  # we have no tools
_ALWAYS_THINKING = Preset({"output_config": {"effort": "low"}}, structured=True, may_think=True)
PRESETS = {  # line and version -> how it is asked
    **dict.fromkeys(("haiku 5.5", "sonnet 5", "opus 5"), _UNTHINKING),
    "sonnet 5.5": _BETWEEN_TOOLS,
    **dict.fromkeys(("opus 5.5", "fable 5", "fable 5.1", "fable 5.2", "mythos 5", "mythos 5.1", "mythos 5.2"),
                    _ALWAYS_THINKING),
    **dict.fromkeys(("haiku 4.5", "sonnet 4.5", "opus 4.5"), Preset({"temperature": 0.0}, structured=True)),
    **dict.fromkeys(("sonnet 4.6", "opus 4.6", "opus 4.7", "opus 4.8"), Preset(structured=True)),
}  # fmt: skip
ANY_CLAUDE = Preset(may_think=True)  # no field that it might refuse
ANY_MODEL = Preset(exact=True, may_think=True)  # behind a gateway; servers of open models enforce a schema


def preset_of(model: str) -> Preset:
    """By the model's name, also within an id of a gateway or of Bedrock (`anthropic/claude-haiku-5.5`,
    `eu.anthropic.claude-haiku-4-5-20251001-v1:0`)."""
    name = re.search(r"claude-([a-z]+)-(\d+)(?:[-.](\d{1,2}))?(?!\d)", model.lower())
    if name and (found := PRESETS.get(f"{name[1]} {name[2]}" + (f".{name[3]}" if name[3] else ""))):
        return found
    return ANY_CLAUDE if "claude" in model.lower() else ANY_MODEL


def preset_of_listing(listed: Any, known: Preset) -> Preset:
    """What the API's own description of a model says; `known` where it says nothing."""
    able = listed.get("capabilities") if isinstance(listed, Mapping) else None
    if not isinstance(able, Mapping):
        return known

    def takes(*names: str) -> bool:
        found: Any = able
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return isinstance(found, Mapping) and found.get("supported") is True

    body = {name: value for name, value in known.body.items() if name == "temperature"}  # not described
    off = next((kind for kind in ("disabled", "between_tools") if takes("thinking", "types", kind)), None)
    if off and not body:  # models that take a temperature think only when asked
        body["thinking"] = {"type": off}
    elif not off and takes("effort", "low"):
        body["output_config"] = {"effort": "low"}
    return Preset(body, takes("structured_outputs"), may_think=not off and takes("thinking"))


class ClaudeTeacher(ApiTeacher):
    """Asks one model through the Messages API. Needs ANTHROPIC_API_KEY once it is entered. `more`: see ApiTeacher."""

    name = "claude"
    api = "Messages API"
    sdk, client_class = "anthropic", "AsyncAnthropic"
    key_name, address_name = "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"
    address_hint = "without /v1"
    default_model, retired = DEFAULT_MODEL, RETIRED
    most_image_tokens = int(CACHE_WRITE_1_HOUR * images.MAX_TOKENS)  # where a gateway writes it to a prompt cache
    has_batches = True

    def __init__(self, model: str = DEFAULT_MODEL, base_url: str | None = None, concurrency: int = 8, **more: Any):
        super().__init__(model, base_url, concurrency, preset=preset_of(model), **more)
        self._listing_asked = False

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        if not self._listing_asked:  # --watch enters again and again
            self._listing_asked = True
            with contextlib.suppress(Exception):  # the table will do
                async with asyncio.timeout(LISTING_SECONDS):
                    raw = await self.client.models.with_raw_response.retrieve(self.model)
                    self.preset = preset_of_listing(json.loads(await raw.http_response.aread()), self.table)
        self._patient = self.client.with_options(max_retries=6)  # for free calls
        return self

    @classmethod
    def address_of(cls, url: str, flag: str) -> str:
        """The server's root: without `/v1` or a path of the API, if one is appended."""
        path = r"/+v1(/+(messages(/(batches|count_tokens))?|complete|chat/completions|models))?/*(\?.*)?$"
        return re.sub(path, "", checked_address(url, flag, cls.key_name)).rstrip("/")

    @classmethod
    def find_key(cls, base_url: str | None = None) -> str:
        if key := environment_key(cls.key_name):
            return key
        raise UserError(
            f"--teacher claude: {cls.key_name} is not set; export it, or use --teacher reference (needs no key)"
        )

    def endpoint(self) -> Any:
        return self.client.messages

    def image_block(self, kind: str, data: str) -> dict[str, Any]:
        return {"type": "image", "source": {"type": "base64", "media_type": kind, "data": data}}

    def form(self, schema: dict[str, Any], kind: str) -> dict[str, Any]:
        return {"output_config": {"format": {"type": "json_schema", "schema": schema}}}

    async def count_tokens(self, request: Request) -> int:
        """Input tokens of a request, by the API's free counting endpoint. Raises ApiError or NoAnswer."""
        body = {name: value for name, value in self.body(request).items() if name in COUNTED}
        messages = [{"role": "user", "content": self.content(request)}]
        with self.translated_errors():
            count = self.client.with_options(max_retries=2).messages.count_tokens
            return (await count(model=self.model, messages=messages, extra_body=body or None)).input_tokens

    # -- Message Batches (teacher/batches.py) ----------------------------------------------------------------

    async def create_batch(self, requests: list[dict[str, Any]]) -> str:
        """Create a batch of {"custom_id", "params"}; returns its id. Raises ApiError, NoAnswer, NotAReply."""
        with self.translated_errors():
            # not retried by the SDK: a batch of a lost answer may exist
            batch = await self.client.with_options(timeout=600.0).messages.batches.create(requests=requests)
        if not isinstance(getattr(batch, "id", None), str) or not batch.id:
            raise NotAReply(str(batch))
        return batch.id

    async def list_batches(self) -> AsyncIterator[tuple[str, float, int]]:
        """(id, time of creation in Unix seconds, number of requests) of the account's batches, newest first."""
        with self.translated_errors():
            async for batch in self._patient.messages.batches.list(limit=100):
                counts = batch.request_counts
                total = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
                yield batch.id, batch.created_at.timestamp(), total

    async def batch_ended(self, batch_id: str) -> bool:
        """Whether all requests of a batch are processed. Raises ApiError, NoAnswer, NotAReply."""
        with self.translated_errors():
            batch = await self._patient.messages.batches.retrieve(batch_id)
        status = getattr(batch, "processing_status", None)
        if status not in ("in_progress", "canceling", "ended"):
            raise NotAReply(str(batch))
        return status == "ended"

    async def batch_results(self, batch_id: str) -> AsyncIterator[tuple[str | None, Reply | Failed]]:
        """(custom_id, outcome) of each line of a batch's results.

        Raises ApiError, what a broken stream raises, and at the end ValueError if a line was no JSON. From the
        documented path below our own address: the SDK's `results` follows `results_url`, which may be missing, or
        send the key to another host.
        """
        from anthropic.resources.messages import batches as sdk

        rest, damage = b"", None
        with self.translated_errors():
            response = await self._patient.get(
                f"/v1/messages/batches/{quote(batch_id, safe='')}/results",
                cast_to=sdk.AsyncJSONLDecoder[sdk.MessageBatchIndividualResponse],
                options={"headers": {"Accept": "application/binary"}},
                stream=True,
            )
            # read to its end whatever a line holds: a stream that is dropped midway prints tracebacks at exit
            async for chunk in response.http_response.aiter_bytes():
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    try:
                        yield self._outcome(json.loads(line), batch_id)
                    except ValueError as error:
                        damage = error
            if rest.strip():
                yield self._outcome(json.loads(rest), batch_id)
        if damage is not None:
            raise damage

    def _outcome(self, line: Any, batch_id: str) -> tuple[str | None, Reply | Failed]:
        """(custom_id, outcome) of one line of a batch's results."""
        line = line if isinstance(line, dict) else {}
        result = line.get("result") if isinstance(line.get("result"), dict) else {}
        kind, custom_id = result.get("type"), line.get("custom_id")
        if kind == "errored":
            error = error_body(result.get("error"))
            why = redact(" ".join(str(error["message"] or "")[:4000].split()), self.secret)[:300]
            name = str(error["type"] or "unknown")
            account = is_account_refusal(result.get("error")) or name in ("authentication_error", "permission_error")
            return custom_id, Failed(f"errored_{name}", why, not account and name not in TEMPORARY, account)
        if kind in ("expired", "canceled"):
            return custom_id, Failed(kind, "the batch ended before this request was processed")
        try:
            return custom_id, self.reply(read_message(result.get("message")), batch=batch_id)
        except (ApiError, AttributeError, TypeError, ValueError) as error:
            why = said(error, self.secret)
            return custom_id, Failed("broken_reply", why, account=is_account_refusal(error), charged=True)
