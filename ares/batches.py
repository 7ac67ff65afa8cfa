"""Message Batches: half the price, results within a day, and nothing paid twice if the client dies at any point.

    {questions_dir}/teacher/batches/{nonce}.json   one record per batch: intent -> submitted -> collected

1. The intent (hash of the body, count, time, what was asked) is on disk before a batch is created.
2. The batch's id is on disk before polling begins.
3. After a restart an intent without an id is searched for in the API's list of batches, by count and time, before
   anything is submitted again. The list shows no more; each custom_id begins with the record's nonce, so the results
   prove whose batch it is.
4. Results come in any order and are matched by custom_id; what expired or failed is asked again.

Leaves out live asking (ares/live.py).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ares import cli
from ares.answering import Session
from ares.api_errors import explain, failure_of
from ares.asking import Reply, Request
from ares.batch_records import Record, Store
from ares.budget import LOST
from ares.claude import LONGEST_PAUSE
from ares.cli import UserError
from ares.feedback import Item, Refused

MAX_COUNT = 100_000  # requests per batch, of the API
MAX_BYTES = 100_000_000  # of 256 MB: a body is held in memory and sent in one piece; images bind before the count
MAX_FAILURES = 3  # times that a request may expire or fail, besides --attempts for unusable replies
CREATE_TRIES = 8
SETTLE_SECONDS = 30.0  # a batch whose creation was cut off shows in the list by then
CLOCKS_DIFFER = 3600.0  # seconds by which our clock may be ahead of the API's
LONGEST = 26 * 3600.0  # seconds; batches expire after 24 h
LIST_PAGES = 100
_BACKOFF = 1.0  # seconds, doubled up to 60


@dataclass
class Ask:
    """A group's request in the making."""

    group: int
    attempt: int = 1
    failures: int = 0
    refused: Refused | None = None


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
        self.todo: list[Ask] = []
        self.group_of: dict[str, int] = {}  # 0/p0/12 -> its open group

    async def run(self) -> None:
        groups = self.session.groups
        self.group_of = {_name(item): group for group in groups for item in groups.waiting(group)}
        async with self.teacher:
            self.client = self.teacher.client.with_options(max_retries=6)
            for record in self.store.pending():
                self.ledger.adopt(_entry(record), record.most_usd or 0.0)
                if record.batch is None:
                    await self.reattach(record)
            pending = self.store.pending()
            out = {self.group_of.get(asked["item"]) for record in pending for asked in record.asked.values()}
            self.todo = [Ask(group) for group in groups if group not in out]
            with cli.progress(desc="batches", total=len(groups), unit="request") as bar:
                await self.work(bar)

    async def work(self, bar: Any) -> None:
        """Submit, wait, collect, until nothing is left. Each round uses up attempts, so the rounds are bounded."""
        if self.submit_only:
            await self.submit()
            pending = self.store.pending()
            count = sum(record.count for record in pending)
            cli.print0(f"{len(pending)} batches with {count} requests are out; collect them with --batch")
            if self.todo:
                raise self.ledger.stop(self.worst(self.todo[0])[1])
            return
        while True:
            pending = self.store.pending()
            if not pending:
                if not self.todo:
                    return
                await self.submit()
                if not self.store.pending():
                    raise self.ledger.stop(self.worst(self.todo[0])[1])
                continue
            ended = [record for record in pending if await self.ended(record)]
            for record in ended:
                before = len(self.session.groups)
                await self.collect(record)
                bar.update(before - len(self.session.groups))
            bar.set_postfix_str(f"{len(pending) - len(ended)} batches out, {len(self.todo)} to ask again")
            if not ended:
                await asyncio.sleep(self.poll_seconds)

    # -- submitting ------------------------------------------------------------------------------------------

    async def submit(self) -> None:
        """Create batches for `todo`; what the budget does not allow stays in it."""
        asks, self.todo = self.todo, []
        for shard, most_usd in self.shards(asks):
            await self.create(shard, most_usd)

    def worst(self, ask: Ask) -> tuple[Request, float]:
        request, _ = self.session.start(ask.group)
        if ask.refused is not None:
            request = self.session.ask_again(request, ask.refused)
        return request, self.teacher.most_usd(request, batch=True) or 0.0

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
        """Intent to disk, batch to the API, its id to disk."""
        nonce = secrets.token_hex(5)
        requests, asked = [], {}
        for ask, request, parameters in shard:
            custom_id = f"{nonce}-{len(requests)}"
            item = self.session.groups.items[ask.group]
            asked[custom_id] = {
                "item": _name(item),
                "text": _digest(request.text),
                "attempt": ask.attempt,
                "failures": ask.failures,
            }
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
            if await self.try_to_create(record, requests, attempt):
                return
            await asyncio.sleep(min(60.0, _BACKOFF * 2**attempt))
        raise UserError(
            f"--batch: the API creates no batch after {CREATE_TRIES} tries; run the same command again later"
        )

    async def try_to_create(self, record: Record, requests: list[dict], attempt: int) -> bool:
        """True once the batch's id is on disk. Raises UserError for an error that does not pass."""
        import anthropic

        create = self.client.with_options(max_retries=0, timeout=600.0).messages.batches.create
        try:
            batch = await create(requests=requests)
            record.batch, record.state = batch.id, "submitted"
        except (anthropic.AnthropicError, ValueError, AttributeError) as error:
            failure = failure_of(error)
            if not failure.passing:
                self.forget(record, failure.reason)
                raise UserError(explain(error, self.teacher, None, self.teacher._key, attempt)) from None
            if failure.status in (429, 529):  # refused: nothing was created
                await asyncio.sleep(min(failure.retry_after or 0.0, LONGEST_PAUSE))
                return False
            if not await self.found(record):
                return False
        self.store.save(record)
        return True

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
        await asyncio.sleep(max(0.0, min(SETTLE_SECONDS, record.time + SETTLE_SECONDS - time.time())))
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
                    record.batch, record.state = batch.id, "submitted"
                    return True
        except Exception as error:
            raise self.fatal(error) from None
        return False

    def forget(self, record: Record, reason: str) -> None:
        self.ledger.settle(_entry(record), 0.0, reason)
        self.store.drop(record)

    def fatal(self, error: Exception) -> BaseException:
        """The API's errors as one line for the user; anything else as it is."""
        import anthropic

        if isinstance(error, anthropic.AnthropicError):
            return UserError(explain(error, self.teacher, None, self.teacher._key, 6))
        return error

    # -- collecting ------------------------------------------------------------------------------------------

    async def ended(self, record: Record) -> bool:
        import anthropic

        try:
            batch = await self.client.messages.batches.retrieve(record.batch)
        except anthropic.NotFoundError:
            return True  # `collect` deals with it
        except Exception as error:
            raise self.fatal(error) from None
        if batch.processing_status != "ended" and time.time() > record.time + LONGEST:
            raise UserError(f"--batch: batch {record.batch} has not ended within 26 hours; look at it in the Console")
        return batch.processing_status == "ended"

    async def collect(self, record: Record) -> None:
        """Lay down the results of a batch that has ended; what failed goes to `todo`."""
        results = await self.results(record)
        if results is None:
            return
        usd, left = 0.0, dict(record.asked)
        work = []
        for custom_id, outcome in results:
            asked = left.pop(custom_id, None)
            if isinstance(outcome, Reply):
                usd = None if usd is None or outcome.cost_usd is None else usd + outcome.cost_usd
            if asked is not None:
                work.append(self.settle(asked, outcome))
            if len(work) >= 64:
                await asyncio.gather(*work)
                work = []
        await asyncio.gather(*work, *(self.settle(asked, "expired") for asked in left.values()))
        record.state = "collected"
        self.store.save(record)
        self.ledger.settle(_entry(record), usd, "reply")

    async def results(self, record: Record) -> list[tuple[str, Reply | str]] | None:
        """(custom_id, Reply or what happened instead) of each; None if gone or not ours, which is then dealt with."""
        import anthropic

        error = None
        for attempt in range(CREATE_TRIES):
            found = []
            try:
                stream = await self.client.messages.batches.results(record.batch)
                async for line in stream:
                    found.append((line.custom_id, self.outcome(line.result, record)))
                    if not line.custom_id.startswith(f"{record.nonce}-"):
                        return await self.disown(record)
                if len(found) >= record.count or attempt + 1 == CREATE_TRIES:
                    return found
                error = EOFError()  # every request has a result, expired ones too: the stream ended early
            except anthropic.APIStatusError as failure:
                if failure.status_code == 404:
                    return self.gone(record)
                error = failure
            except Exception as failure:  # whatever a stream that breaks off raises; bounded, then told
                if "results_url" in str(failure):
                    return self.gone(record)
                error = failure
            await asyncio.sleep(min(60.0, _BACKOFF * 2**attempt))
        raise UserError(
            f"--batch: the results of {record.batch} do not arrive whole ({type(error).__name__}); "
            "run the same command again later"
        )

    def outcome(self, result: Any, record: Record) -> Reply | str:
        """A small record of a result: 100,000 of the SDK's own objects would fill the memory."""
        if result.type == "errored":
            return f"errored_{getattr(result.error.error, 'type', 'unknown')}"
        if result.type != "succeeded":
            return result.type
        try:
            return self.teacher.reply(result.message, batch=record.batch)
        except (AttributeError, TypeError, ValueError):
            return "broken_reply"

    async def disown(self, record: Record) -> None:
        """The batch that was attached after a kill is somebody else's: look for another, or ask anew."""
        record.not_ours.append(record.batch)
        record.batch, record.state = None, "intent"
        self.store.save(record)
        await self.reattach(record)
        if record.batch is None:
            self.again(record)

    def gone(self, record: Record) -> None:
        """Results are kept for 29 days."""
        cli.warn0(f"batch {record.batch} or its results are gone; its {record.count} requests are asked again")
        self.ledger.settle(_entry(record), None, LOST)
        self.store.drop(record)
        self.again(record)

    def again(self, record: Record) -> None:
        groups = {self.group_of.get(asked["item"]) for asked in record.asked.values()}
        self.todo += [Ask(group) for group in groups if group in self.session.groups]

    async def settle(self, asked: dict[str, Any], outcome: Reply | str) -> None:
        """One result: laid down, asked again, or given up. What is answered by now, or has changed, is passed over."""
        session, group = self.session, self.group_of.get(asked["item"])
        if group not in session.groups:
            return
        request, sidecar = session.start(group)
        if _digest(request.text) != asked["text"]:
            self.todo.append(Ask(group))  # the rationale was exported anew since
            return
        if isinstance(outcome, str):
            if asked["failures"] + 1 >= MAX_FAILURES:
                session.finish(group, outcome)
            else:
                self.todo.append(Ask(group, asked["attempt"], asked["failures"] + 1))
            return
        session.report.add(outcome)
        copies = len(session.groups.waiting(group)) - 1
        refused = await asyncio.to_thread(
            session.lay_down, group, request, outcome, sidecar | {"attempt": asked["attempt"]}
        )
        if refused is None:
            session.report.copied += copies
            session.finish(group, None)
        elif asked["attempt"] >= session.attempts:
            session.finish(group, refused.reason)
        else:
            self.todo.append(Ask(group, asked["attempt"] + 1, asked["failures"], refused))


def _name(item: Item) -> str:
    return f"{item.action}/p{item.rank}/{item.qid}"


def _entry(record: Record) -> str:
    return f"batch-{record.nonce}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
