"""Message Batches: half the price, results within a day, and nothing paid twice if the client dies at any point.

    {questions_dir}/teacher/batches/{nonce}.json   one record per batch: intent -> submitted -> collected

1. The intent (hash of the body, count, time, what was asked) is on disk before a batch is created.
2. The batch's id is on disk before polling begins.
3. After a restart an intent without an id is searched for in the API's list of batches, by count and time, before
   anything is submitted again. The list shows no more; each custom_id begins with the record's nonce, so the results
   prove whose batch it is.
4. Results come in any order and are matched by custom_id.

Each record is one request of its items, whatever came of it, and no record of a created batch is ever deleted. So an
item is asked at most `--attempts` times in all, over restarts and later runs. What the API cannot give back (unknown
batch, results of others) and a cancelled batch end the run: only the user decides to pay again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ares import cli
from ares.cli import Stop, UserError
from teacher.api_errors import (
    KEY,
    STOP_STATUS,
    NotAReply,
    as_user_error,
    error_body,
    failure_of,
    is_account_refusal,
    redact,
    said,
)
from teacher.batch_records import COLLECTED, INTENT, SUBMITTED, Record, Store
from teacher.budget import LOST
from teacher.claude import LONGEST_PAUSE
from teacher.handoff import Item, Refused
from teacher.interface import Reply, Request
from teacher.session import Session

MAX_COUNT = 100_000  # requests per batch, of the API
MAX_BYTES = 100_000_000  # of 256 MB: a body is held in memory and sent in one piece; images bind before the count
CREATE_TRIES = 8
SETTLE_SECONDS = 30.0  # a batch whose creation was cut off is in the list by then
CLOCKS_DIFFER = 3600.0  # seconds by which our clock may be ahead of the API's
LONGEST = 26 * 3600.0  # seconds; batches expire after 24 h
LIST_PAGES = 100
PASSING = ("api_error", "overloaded_error", "rate_limit_error", "timeout_error")  # of single requests in a batch
_BACKOFF = 1.0  # seconds, doubled up to 60


@dataclass
class Ask:
    """A group's next request: its number, from 1, and why the reply before could not be used."""

    group: int
    attempt: int = 1
    refused: Refused | None = None


@dataclass(frozen=True)
class Failed:
    """What a batch has instead of a reply to a request. `said`: the API's sentence."""

    reason: str
    said: str = ""
    permanent: bool = False  # the same request would fail again
    account: bool = False  # every request would fail until the user acts
    charged: bool = False  # perhaps


def ask_in_batches(session: Session, store: Store, submit_only: bool, poll_seconds: float) -> None:
    """Answer the session's open groups by batches, those of earlier runs first.

    Raises UserError for what ends the run. With `submit_only` it returns once all is submitted.
    """
    pending = store.pending()
    other = next((record.model for record in pending if record.model != session.teacher.model), None)
    if other:
        raise UserError(f"--teacher_model: the batches that are out were asked of {other}; name it to collect them")
    asked = {int(asked["item"].partition("/")[0]) for record in pending for asked in record.asked.values()}
    lost = sorted(action for action in asked - set(session.waiting) if (session.root / str(action)).is_dir())
    if lost:
        raise UserError(
            f"--actions: the batches that are out hold action {lost[0]}, too, whose replies would be lost; leave "
            "--actions out to collect them"
        )
    if session.groups or pending:
        asyncio.run(_Batches(session, store, submit_only, poll_seconds).run())


class _Batches:
    def __init__(self, session: Session, store: Store, submit_only: bool, poll_seconds: float):
        self.session, self.store = session, store
        self.submit_only, self.poll_seconds = submit_only, poll_seconds
        self.teacher, self.ledger = session.teacher, session.teacher.ledger
        self.out: list[Record] = []  # created, not collected
        self.todo: list[Ask] = []
        self.group_of: dict[str, int] = {}  # 0/p0/12 -> its open group
        self.history: dict[str, dict[str, Any]] = {}  # key of a request -> its last entry in a record
        self.used_up = 0  # groups given up after --attempts requests
        self.ends: list[UserError] = []  # what ends the run once everything that has ended is collected

    async def run(self) -> None:
        groups = self.session.groups
        self.group_of = {_name(item): group for group in groups for item in groups.waiting(group)}
        async with self.teacher:
            self.client = self.teacher.client.with_options(max_retries=6)
            try:
                await self.resume()
                with cli.progress(desc="batches", total=len(groups), unit="request") as bar:
                    await self.work(bar)
            except UserError:
                cli.print0(f"stopped; {self.session.report.summary()}")
                raise
            finally:
                if self.used_up:
                    cli.print0(
                        f"{self.used_up} requests were made --attempts {self.session.attempts} times in all without "
                        "a usable reply; a larger --attempts makes them again"
                    )

    async def resume(self) -> None:
        """Attach to what earlier runs have submitted; the rest goes to `todo`."""
        for record in self.store.pending():
            self.ledger.adopt(_entry(record), record.most_usd or 0.0)
            if record.batch is None:
                await self.reattach(record)
        for record in sorted(self.store.records(), key=lambda record: record.time):
            self.remember(record)
            if record.state != COLLECTED:
                self.out.append(record)
        out = {self.group_of.get(asked["item"]) for record in self.out for asked in record.asked.values()}
        for group in self.session.groups:
            if group not in out:
                self.ask(group)

    def remember(self, record: Record) -> None:
        for asked in record.asked.values():
            last = self.history.get(asked["key"])
            if last is None or asked["attempt"] >= last["attempt"]:
                self.history[asked["key"]] = asked

    async def work(self, bar: Any) -> None:
        """Submit, wait, collect, until nothing is left. Each round uses up attempts, so the rounds are bounded."""
        if self.submit_only:
            await self.submit()
            count = sum(record.count for record in self.out)
            cli.print0(f"{len(self.out)} batches with {count} requests are out; collect them with --batch")
            if self.todo:
                raise self.over_budget()
            return
        while self.out or self.todo:
            if not self.out:
                await self.submit()
                if not self.out:
                    raise self.over_budget()
                continue
            ended = [record for record in self.out if await self.ended(record)]
            for record in ended:
                before = len(self.session.groups)
                await self.collect(record)
                bar.update(before - len(self.session.groups))
            if self.ends:
                raise max(self.ends, key=lambda end: getattr(end, "status", 0))
            bar.set_postfix_str(f"{len(self.out)} batches out, {len(self.todo)} to ask again")
            if not ended:
                await asyncio.sleep(self.poll_seconds)

    # -- submitting ------------------------------------------------------------------------------------------

    def ask(self, group: int) -> None:
        """Put a group's next request into `todo`, or give the group up if it has had all its requests."""
        last = self.history.get(self.key(self.session.start(group)[0])) if self.history else None
        if last is None:
            self.todo.append(Ask(group))
            return
        used_up = last["attempt"] >= self.session.attempts
        if used_up or last.get("permanent"):
            self.used_up += used_up
            self.session.finish(group, last.get("reason", "no_reply"), last.get("said", ""))
            return
        refused = Refused(last["reason"], last["said"]) if last.get("replied") else None
        self.todo.append(Ask(group, last["attempt"] + 1, refused))

    def key(self, request: Request) -> str:
        """What names a request in the records: the same question with another image or model is another request."""
        return self.teacher.key(request)[:16]

    async def submit(self) -> None:
        """Create batches for `todo`; what the budget does not allow stays in it."""
        asks, self.todo = self.todo, []
        for shard, most_usd in self.shards(asks):
            await self.create(shard, most_usd)

    def worst(self, ask: Ask) -> tuple[Request, float]:
        """The request, and the most that it can cost."""
        request, _ = self.session.start(ask.group)
        if ask.refused is not None:
            request = self.session.ask_again(request, ask.refused)
        return request, self.teacher.most_usd(request, batch=True) or 0.0

    def over_budget(self) -> Stop:
        return self.ledger.stop(self.worst(self.todo[0])[1])

    def shards(self, asks: list[Ask]) -> Iterator[tuple[list[tuple[Ask, Request, dict]], float]]:
        """Parts of `asks` that fit one batch each, by bytes, by count and by what is left of the budget."""
        shard, size, usd = [], 0, 0.0
        for number, ask in enumerate(asks):
            request, most = self.worst(ask)
            parameters = self.teacher.parameters(request)
            length = len(json.dumps(parameters)) + 100  # with its custom_id
            if shard and (size + length > MAX_BYTES or len(shard) >= MAX_COUNT):
                yield shard, usd
                shard, size, usd = [], 0, 0.0
            if not self.ledger.fits(usd + most):
                self.todo = asks[number:]
                break
            shard.append((ask, request, parameters))
            size, usd = size + length, usd + most
        if shard:
            yield shard, usd

    async def create(self, shard: list[tuple[Ask, Request, dict]], most_usd: float) -> None:
        """Save the intent, create the batch, save its id. Raises UserError if the API does not create it."""
        nonce = secrets.token_hex(5)
        requests, asked = [], {}
        for ask, request, parameters in shard:
            custom_id = f"{nonce}-{len(requests)}"
            item = self.session.groups.items[ask.group]
            about = {"item": _name(item), "text": _digest(request.text), "key": self.key(request)}
            asked[custom_id] = about | {"attempt": ask.attempt}
            requests.append({"custom_id": custom_id, "params": parameters})
        whole = hashlib.sha256()
        for request in requests:
            whole.update(json.dumps(request, sort_keys=True).encode())
        record = Record(
            nonce, whole.hexdigest(), len(requests), self.teacher.model, time.time(),
            most_usd if self.teacher.price else None, asked,
        )  # fmt: skip
        self.store.save(record)
        self.ledger.open(f"batch of {record.count}", record.most_usd, entry=_entry(record))
        for attempt in range(CREATE_TRIES):
            error = await self.try_to_create(record, requests)
            if error is None:
                self.remember(record)
                self.out.append(record)
                return
            failure = failure_of(error)
            last = attempt + 1 == CREATE_TRIES or isinstance(error, NotAReply)
            if last or not failure.passing or (failure.retry_after or 0.0) > LONGEST_PAUSE:
                break
            await asyncio.sleep(max(failure.retry_after or 0.0, min(60.0, _BACKOFF * 2**attempt)))
        self.forget(record, failure.reason)  # refused, or searched for and not found
        raise self.as_user_error(error, attempt)

    async def try_to_create(self, record: Record, requests: list[dict]) -> Exception | None:
        """None once the batch's id is on disk; the error if no batch was created."""
        import anthropic

        create = self.client.with_options(max_retries=0, timeout=600.0).messages.batches.create
        try:
            batch = await create(requests=requests)
            if not isinstance(getattr(batch, "id", None), str) or not batch.id:
                raise NotAReply(str(batch))
            record.batch, record.state = batch.id, SUBMITTED
        except (anthropic.AnthropicError, ValueError) as error:
            failure = failure_of(error)
            if not failure.passing or failure.status in (429, 529):
                return error  # refused
            if not await self.found(record):  # an answer that was lost, or a gateway's: the batch may exist
                return error
        self.store.save(record)
        return None

    # -- after a restart -------------------------------------------------------------------------------------

    async def reattach(self, record: Record) -> None:
        """Find the batch of an intent without id, or forget the intent: its items are then asked anew."""
        if await self.found(record):
            cli.print0(
                f"batch {record.batch} of {record.count} requests was created before the client ended: attached"
            )
            self.store.save(record)
        else:
            self.forget(record, "not_created")

    async def found(self, record: Record) -> bool:
        """Whether the API lists a batch that can be this record's: same count, not older, nobody else's."""
        await asyncio.sleep(SETTLE_SECONDS)
        taken = self.store.known_ids() | set(record.not_ours)
        looked = 0
        try:
            async for batch in self.client.messages.batches.list(limit=100):
                looked += 1
                if batch.created_at.timestamp() < record.time - CLOCKS_DIFFER or looked > 100 * LIST_PAGES:
                    break  # newest first
                counts = batch.request_counts
                total = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
                if total == record.count and batch.id not in taken:
                    record.batch, record.state, record.from_list = batch.id, SUBMITTED, True
                    return True
        except Exception as error:
            raise self.as_user_error(error) from None
        return False

    def forget(self, record: Record, reason: str) -> None:
        """The batch of an intent does not exist. One that was taken for it may have been: that counts as a request."""
        self.ledger.settle(_entry(record), 0.0, reason)
        if record.not_ours:
            record.state = COLLECTED
            self.store.save(record)
        else:
            self.store.drop_intent(record)

    def as_user_error(self, error: Exception, retries: int = 6) -> BaseException:
        """The error of a call about a batch as one line for the user; a defect of ours as it is."""
        import anthropic

        if isinstance(error, (anthropic.AnthropicError, ValueError, AttributeError, TypeError)):
            return as_user_error(error, self.teacher, None, self.teacher._key, retries)
        return error

    # -- collecting ------------------------------------------------------------------------------------------

    async def ended(self, record: Record) -> bool:
        import anthropic

        try:
            batch = await self.client.messages.batches.retrieve(record.batch)
            status = getattr(batch, "processing_status", None)
            if status not in ("in_progress", "canceling", "ended"):
                raise NotAReply(str(batch))
        except anthropic.NotFoundError as error:
            if is_account_refusal(error):
                raise self.as_user_error(error) from None
            self.lost(record, f"is not known at {self.client.base_url} (404: {said(error, self.teacher._key)})")
            return False
        except Exception as error:
            raise self.as_user_error(error) from None
        if status != "ended" and time.time() > record.time + LONGEST:
            self.lost(record, "has not ended within 26 hours")
        return status == "ended"

    def lost(self, record: Record, what: str) -> None:
        """End the run because of a batch without usable results: its requests are not paid for again by themselves."""
        self.ends.append(
            UserError(
                f"--batch: batch {record.batch} of {record.count} requests {what}; they may be paid for, so they are "
                "not asked again: look at it in the Console and use the key and --base_url that it was created with, "
                f"or delete {self.store.path(record)} to give it up, then run the same command again"
            )
        )

    async def collect(self, record: Record) -> None:
        """Save the results of a batch that has ended; what failed goes to `todo`."""
        outcomes, error = await self.results(record)
        if not outcomes:
            return
        if error is None:
            for custom_id in record.asked.keys() - outcomes.keys():
                outcomes[custom_id] = Failed("no_result", "the batch has no result for this request", charged=True)
        try:
            waiting = [(record.asked[custom_id], outcome) for custom_id, outcome in outcomes.items()]
            for start in range(0, len(waiting), 64):
                await asyncio.gather(*(self.settle(*each) for each in waiting[start : start + 64]))
        except OSError as failure:
            raise UserError(
                f"cannot write a reply below {self.session.root} ({failure.strerror or failure}); make room, then run "
                f"the same command again: the results of {record.batch} can be fetched again"
            ) from None
        if error is not None:
            self.ends.append(
                UserError(
                    f"--batch: the results of {record.batch} do not arrive whole "
                    f"({said(error, self.teacher._key)}); {len(outcomes)} of {record.count} are saved; run the same "
                    f"command again later, or delete {self.store.path(record)} to have the others asked again"
                )
            )
            return
        record.state = COLLECTED
        self.store.save(record)
        self.out.remove(record)
        usd = _cost(outcomes.values())
        self.ledger.settle(_entry(record), usd, LOST if usd is None and self.teacher.price else "reply")
        self.end_if_refused(record, outcomes)

    def end_if_refused(self, record: Record, outcomes: dict[str, Reply | Failed]) -> None:
        """End the run where the account was refused or the user has cancelled the batch."""
        failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failed)]
        refusal = next((outcome for outcome in failed if outcome.account), None)
        if refusal:
            self.ends.append(
                Stop(
                    f"{KEY}: the API refuses the whole account in batch {record.batch} ({refusal.reason}: "
                    f"{refusal.said}); see billing and limits in the Console, then run this again to go on",
                    STOP_STATUS,
                )
            )
        cancelled = Counter(outcome.reason for outcome in failed)["canceled"]
        if cancelled:
            self.ends.append(
                UserError(
                    f"--batch: batch {record.batch} was cancelled before {cancelled} of its {record.count} requests "
                    "were processed; nothing is asked again in this run: run the same command again to ask them"
                )
            )

    async def results(self, record: Record) -> tuple[dict[str, Reply | Failed], Exception | None]:
        """(outcome of each request by custom_id, the error that kept the others from arriving).

        Without outcomes the batch is lost, or not ours; both are then dealt with.
        """
        import anthropic

        error = None
        for attempt in range(CREATE_TRIES):
            found: dict[str, Reply | Failed] = {}
            foreign = 0
            try:
                async for line in await self.stream(record):
                    custom_id = getattr(line, "custom_id", None)
                    if custom_id in record.asked:
                        found[custom_id] = self.outcome(getattr(line, "result", None), record)
                    else:
                        foreign += 1
                error = None
            except anthropic.NotFoundError as failure:
                self.lost(record, f"has no results (404: {said(failure, self.teacher._key)})")
                return {}, None
            except Exception as failure:  # whatever a stream that breaks off raises
                if isinstance(failure, anthropic.APIStatusError) and not failure_of(failure).passing:
                    raise self.as_user_error(failure) from None
                error = failure
            if len(found) == record.count or foreign and not found:
                break
            # every request has a result, expired ones too: a stream without an error may have ended early, too
            await asyncio.sleep(min(60.0, _BACKOFF * 2**attempt))
        if found:
            return found, error if len(found) < record.count else None
        if foreign and record.from_list:
            await self.disown(record)
        else:
            what = f"holds {foreign} results of other requests" if foreign else "gives back no result"
            self.lost(record, what if error is None else f"{what} ({said(error, self.teacher._key)})")
        return {}, None

    async def stream(self, record: Record) -> Any:
        """The lines of a batch's results, from the documented path below our own address.

        The SDK's `results` follows `results_url`, which may be missing, or lead with the key to another host.
        """
        from anthropic.resources.messages import batches as sdk

        return await self.client.get(
            f"/v1/messages/batches/{quote(record.batch, safe='')}/results",
            cast_to=sdk.AsyncJSONLDecoder[sdk.MessageBatchIndividualResponse],
            options={"headers": {"Accept": "application/binary"}},
            stream=True,
        )

    def outcome(self, result: Any, record: Record) -> Reply | Failed:
        """A small record of a result: 100,000 of the SDK's own objects would fill the memory."""
        kind = getattr(result, "type", None)
        if kind == "errored":
            error = error_body(result.error)
            why = redact(" ".join(str(error["message"] or "")[:4000].split()), self.teacher._key)[:300]
            name = str(error["type"] or "unknown")
            account = is_account_refusal(result.error) or name in ("authentication_error", "permission_error")
            return Failed(f"errored_{name}", why, not account and name not in (*PASSING, "unknown"), account)
        if kind in ("expired", "canceled"):
            return Failed(kind, "the batch ended before this request was processed")
        try:
            return self.teacher.reply(result.message, batch=record.batch)
        except (AttributeError, TypeError, ValueError) as error:
            return Failed(
                "broken_reply", said(error, self.teacher._key), account=is_account_refusal(error), charged=True
            )

    async def disown(self, record: Record) -> None:
        """The batch that was found in the list is somebody else's: look for another, or ask anew."""
        record.not_ours.append(record.batch)
        record.batch, record.state, record.from_list = None, INTENT, False
        self.store.save(record)
        await self.reattach(record)
        if record.batch is None:
            self.out.remove(record)
            for group in {self.group_of.get(asked["item"]) for asked in record.asked.values()}:
                if group in self.session.groups:
                    self.ask(group)

    async def settle(self, asked: dict[str, Any], outcome: Reply | Failed) -> None:
        """One result: saved, asked again, or given up. An item that is answered or has changed is passed over.

        `asked` is the request's entry in the record, and is told what came of it.
        """
        session, group = self.session, self.group_of.get(asked["item"])
        if group not in session.groups:
            return
        request, sidecar = session.start(group)
        if _digest(request.text) != asked["text"]:  # the rationale was exported anew since
            self.ask(group)
            return
        if isinstance(outcome, Failed):
            asked |= {"reason": outcome.reason, "said": outcome.said, "permanent": outcome.permanent}
            if outcome.account or outcome.reason == "canceled":  # free, and the run ends: no attempt
                asked["attempt"] -= 1
                return
        else:
            session.report.add(outcome)
            copies = len(session.groups.waiting(group)) - 1
            refused = await asyncio.to_thread(
                session.lay_down, group, request, outcome, sidecar | {"attempt": asked["attempt"]}
            )
            if refused is None:
                session.report.copied += copies
                session.finish(group, None)
                return
            why = str(refused).removeprefix(refused.reason).removeprefix(": ")
            asked |= {"reason": refused.reason, "said": why, "replied": True}
        self.ask(group)


def _cost(outcomes: Any) -> float | None:
    """Dollars of a batch; None if a reply of unknown cost is among them."""
    costs = [outcome.cost_usd for outcome in outcomes if isinstance(outcome, Reply)]
    charged = any(outcome.charged for outcome in outcomes if isinstance(outcome, Failed))
    return None if charged or None in costs else sum(costs)


def _name(item: Item) -> str:
    return f"{item.action}/p{item.rank}/{item.qid}"


def _entry(record: Record) -> str:
    return f"batch-{record.nonce}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
