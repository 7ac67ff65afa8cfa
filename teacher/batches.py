"""Message Batches: half the price, results within a day; nothing is paid twice, whenever the client is killed.

    {questions_dir}/teacher/batches/{nonce}.json   one record per batch: intent -> submitted -> collected

With --together a request is about several rationales; its record names the item of each, and each counts its attempts.

1. The intent (count, time, what is asked) is on disk before a batch is created.
2. The batch's id is on disk before polling begins.
3. After a restart an intent without an id is searched for in the API's list of batches, by count and time, before
   anything is submitted again. The list shows no more; each custom_id begins with the record's nonce, so the results
   prove whose batch it is.
4. Results come in any order and are matched by custom_id.

Each record counts as one request of its items, whatever its outcome, and no record of a created batch is deleted. So
an item is asked at most `--attempts` times in all, over restarts and later runs. A batch that the API does not know,
results of other requests, and a cancelled batch end the run: only the user decides to pay again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from ares import cli
from ares.cli import Stop, UserError
from teacher import api_responses
from teacher.api_responses import STOP_STATUS, ApiError, NoAnswer, NotAReply, failure_of, is_account_refusal
from teacher.api_teacher import LONGEST_PAUSE, TooLarge
from teacher.batch_store import COLLECTED, INTENT, SUBMITTED, BatchStore, Record, digest, entry
from teacher.budget import LOST
from teacher.handoff import Refused
from teacher.interface import Failed, Reply, Request
from teacher.session import Session

MAX_COUNT = 100_000  # requests per batch, of the API
MAX_BYTES = 100_000_000  # of 256 MB: a body is held in memory and sent in one piece; images bind before the count
TRIES = 8  # to create a batch, to fetch its results
SETTLE_SECONDS = 30.0  # a batch whose creation was cut off is in the list by then
CLOCKS_DIFFER = 3600.0  # seconds by which our clock may be ahead of the API's
LONGEST = 26 * 3600.0  # seconds; batches expire after 24 h
LIST_LENGTH = 10_000  # batches of the list that are looked at
BACKOFF = 1.0  # seconds, doubled up to 60


def ask_in_batches(session: Session, store: BatchStore, submit_only: bool, poll_seconds: float) -> None:
    """Answer the session's open requests by batches, those of earlier runs first.

    Raises UserError for what ends the run. With `submit_only` it returns once all is submitted.
    """
    pending = store.pending()
    other = next((record.model for record in pending if record.model != session.teacher.model), None)
    if other:
        raise UserError(f"--teacher_model: the pending batches were asked of {other}; name it to collect them")
    if session.open or pending:
        asyncio.run(_Batches(session, store, submit_only, poll_seconds).run())


class _Batches:
    def __init__(self, session: Session, store: BatchStore, submit_only: bool, poll_seconds: float):
        self.session, self.store = session, store
        self.submit_only, self.poll_seconds = submit_only, poll_seconds
        self.teacher, self.ledger = session.teacher, session.teacher.ledger
        self.pending: list[Record] = []  # created, not collected
        self.todo: list[str] = []  # keys of requests to submit
        self.key_of = {item.name: key for key, items in session.open.items() for item in items}
        self.history: dict[str, dict[str, Any]] = {}  # "key" of a record's entry -> the last entry
        self.used_up = 0  # requests given up after --attempts
        self.ends: list[UserError] = []  # what ends the run once all results that are ready are collected

    async def run(self) -> None:
        async with self.teacher:
            try:
                await self.resume()
                with cli.progress(desc="batches", total=len(self.session.open), unit="rationale") as bar:
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
            self.ledger.adopt(record.entry, record.most_usd or 0.0)
            if record.batch is None:
                await self.reattach(record)
        records = self.store.records()
        for record in records:
            self.remember(record)
        self.pending = [record for record in records if record.state != COLLECTED]
        submitted = {self.key_of.get(asked["item"]) for record in self.pending for asked in record.all_asked()}
        for key in [key for key in self.session.open if key not in submitted]:
            self.ask(key)

    def remember(self, record: Record) -> None:
        for asked in record.all_asked():
            last = self.history.get(asked["key"])
            if last is None or asked["attempt"] >= last["attempt"]:
                self.history[asked["key"]] = asked

    async def work(self, bar: Any) -> None:
        """Submit, wait, collect, until nothing is left. Each round uses up attempts, so the rounds are bounded."""
        while self.pending or self.todo or self.submit_only:
            if not self.pending or self.submit_only:
                await self.submit()
            if self.submit_only:
                return
            ended = [record for record in self.pending if await self.ended(record)]
            for record in ended:
                before = len(self.session.open)
                await self.collect(record)
                bar.update(before - len(self.session.open))
            if self.ends:
                raise max(self.ends, key=lambda end: getattr(end, "status", 0))
            bar.set_postfix_str(f"{len(self.pending)} batches pending, {len(self.todo)} to ask again")
            if not ended:
                await asyncio.sleep(self.poll_seconds)

    # -- submitting ------------------------------------------------------------------------------------------

    def ask(self, key: str) -> None:
        """Add a request to `todo`, or give it up if it has had all its attempts or the API calls it invalid."""
        last = self.history.get(key[:16], {"attempt": 0})
        used_up = last["attempt"] >= self.session.attempts
        if used_up or last.get("permanent"):
            self.used_up += used_up
            permanent = bool(last.get("permanent"))
            self.session.give_up(key, last.get("reason", "no_reply"), last.get("said", ""), permanent)
        else:
            self.todo.append(key)

    def units(self, keys: list[str]) -> list[list[str]]:
        """The keys as they are sent: those with one attempt left, or that were called invalid, alone."""
        last = {key: self.history.get(key[:16], {"attempt": 0}) for key in keys}
        alone = {
            key for key in keys if last[key].get("alone") or last[key]["attempt"] + 1 == self.session.attempts > 1
        }
        return self.session.units(keys, alone)

    def worst(self, unit: list[str]) -> tuple[Request, list[dict[str, Any]], float]:
        """The request of a unit, its entries in a record, and the most that it can cost."""
        own = [self.session.prepare(key)[0] for key in unit]
        before = [self.history.get(key[:16], {}) for key in unit]
        refused = [Refused(last["reason"], last["said"]) for last in before if last.get("replied")]
        request = self.session.join(own, max(last.get("length_factor", 1) for last in before), refused)
        factor = request.length_factor
        entries = [
            entry(self.session.open[key][0].name, each.text, key[:16], last.get("attempt", 0) + 1, factor)
            for key, each, last in zip(unit, own, before, strict=True)
        ]
        return request, entries, self.teacher.most_usd(request, batch=True) or 0.0

    async def submit(self) -> None:
        """Create batches for `todo`; what exceeds the budget stays in it. Raises Stop if nothing can go on then."""
        keys, self.todo = self.todo, []
        for shard, most_usd in self.shards(self.units(keys)):
            await self.create(shard, most_usd)
        if self.submit_only:
            count = sum(record.count for record in self.pending)
            cli.print0(f"{len(self.pending)} batches with {count} requests are pending; collect them with --batch")
        if self.todo and (self.submit_only or not self.pending):
            raise self.ledger.stop(self.worst(self.units(self.todo)[0])[-1])

    def shards(self, units: list[list[str]]) -> Iterator[tuple[list[tuple[list[dict], dict]], float]]:
        """Parts of `units` that fit one batch each, by bytes, by count and by what is left of the budget; of each unit
        its entries and its request's body."""
        shard, size, usd = [], 0, 0.0
        left = deque(units)
        while left:
            unit = left.popleft()
            request, entries, most = self.worst(unit)
            try:
                parameters = self.teacher.parameters(request)
            except TooLarge:
                if len(unit) == 1:
                    raise
                left.extendleft([key] for key in reversed(unit))
                continue
            length = len(json.dumps(parameters)) + 100  # with its custom_id
            if shard and (size + length > MAX_BYTES or len(shard) >= MAX_COUNT):
                yield shard, usd
                shard, size, usd = [], 0, 0.0
            if not self.ledger.fits(usd + most):
                self.todo = [*unit, *itertools.chain.from_iterable(left)]
                break
            shard.append((entries, parameters))
            size, usd = size + length, usd + most
        if shard:
            yield shard, usd

    async def create(self, shard: list[tuple[list[dict], dict]], most_usd: float) -> None:
        """Save the intent, create the batch, save its id. Raises UserError if the API does not create it."""
        nonce = secrets.token_hex(5)
        requests, asked = [], {}
        for number, (entries, parameters) in enumerate(shard):
            requests.append({"custom_id": f"{nonce}-{number}", "params": parameters})
            asked[f"{nonce}-{number}"] = entries if len(entries) > 1 else entries[0]
        most = most_usd if self.teacher.price else None
        record = Record(nonce, len(requests), self.teacher.model, time.time(), most, asked)
        self.store.save(record)
        self.ledger.open(f"batch of {record.count}", record.most_usd, entry=record.entry)
        for attempt in range(TRIES):
            try:
                record.batch, record.state = await self.teacher.create_batch(requests), SUBMITTED
            except (ApiError, NoAnswer, ValueError) as failed:
                error, failure = failed, failure_of(failed)
            refused = record.batch is None and (not failure.retryable or failure.overloaded)
            # after a lost answer, or a gateway's, the batch may exist
            if record.batch or not refused and await self.found(record):
                self.store.save(record)
                self.remember(record)
                self.pending.append(record)
                return
            pause = failure.retry_after or 0.0
            if isinstance(error, NotAReply) or not failure.retryable or pause > LONGEST_PAUSE:
                break
            if attempt + 1 < TRIES:
                await asyncio.sleep(max(pause, _backoff(attempt)))
        self.forget(record, failure.reason)  # refused, or searched for and not found
        raise self.user_error(error, attempt)

    # -- after a restart -------------------------------------------------------------------------------------

    async def reattach(self, record: Record) -> None:
        """Find the batch of an intent without id, or forget the intent: its items are then asked anew."""
        if await self.found(record):
            what = f"batch {record.batch} of {record.count} requests"
            cli.print0(f"{what} was created before the client ended: attached")
            self.store.save(record)
        else:
            self.forget(record, "not_created")

    async def found(self, record: Record) -> bool:
        """Whether the API lists a batch that can be this record's: same count, not older, nobody else's."""
        await asyncio.sleep(SETTLE_SECONDS)
        taken = {other.batch for other in self.store.records()} | set(record.not_ours)
        looked = 0
        try:
            async for batch, created, count in self.teacher.list_batches():
                looked += 1
                if created < record.time - CLOCKS_DIFFER or looked > LIST_LENGTH:
                    break  # newest first
                if count == record.count and batch not in taken:
                    record.batch, record.state, record.from_list = batch, SUBMITTED, True
                    return True
        except Exception as error:
            raise self.user_error(error) from None
        return False

    def forget(self, record: Record, reason: str) -> None:
        """The batch of an intent does not exist. A batch in `not_ours` may have been paid for: it stays recorded."""
        self.ledger.settle(record.entry, 0.0, reason)
        if record.not_ours:
            record.state = COLLECTED
            self.store.save(record)
        else:
            self.store.path(record).unlink(missing_ok=True)

    def user_error(self, error: Exception, retries: int = 6) -> Exception:
        """The error of a call about a batch as one line for the user; a bug of ours as it is."""
        known = (ApiError, NoAnswer, ValueError, AttributeError, TypeError)
        return api_responses.as_user_error(error, self.teacher, None, retries) if isinstance(error, known) else error

    def said(self, error: Exception) -> str:
        return api_responses.said(error, self.teacher.secret)

    # -- collecting ------------------------------------------------------------------------------------------

    async def ended(self, record: Record) -> bool:
        try:
            ended = await self.teacher.batch_ended(record.batch)
        except Exception as error:
            if _is_unknown(error) and not is_account_refusal(error):
                self.lost(record, f"is not known at {self.teacher.address} (404: {self.said(error)})")
                return False
            raise self.user_error(error) from None
        if not ended and time.time() > record.time + LONGEST:
            self.lost(record, "has not ended within 26 hours")
        return ended

    def lost(self, record: Record, what: str) -> None:
        """End the run because of a batch without usable results: only the user decides to pay for it again."""
        fault = (
            f"--batch: batch {record.batch} of {record.count} requests {what}; they may be paid for, so they are not "
            "asked again: look at it in the Console and use the key and --base_url that it was created with, or "
            f"delete {self.store.path(record)} to give it up, then run the same command again"
        )
        self.ends.append(UserError(fault))

    async def collect(self, record: Record) -> None:
        """Save the results of a batch that has ended; what failed goes to `todo`."""
        outcomes, error = await self.results(record)
        if not outcomes:
            return
        if error is None:
            for custom_id in record.asked.keys() - outcomes.keys():
                outcomes[custom_id] = Failed("no_result", "the batch has no result for this request", charged=True)
        try:
            waiting = [(record.asked_as(custom_id), outcome) for custom_id, outcome in outcomes.items()]
            for start in range(0, len(waiting), 64):
                await asyncio.gather(*(self.save_outcome(*each) for each in waiting[start : start + 64]))
        except OSError as failure:  # the results can be fetched again
            raise self.session.fault(failure) from None
        if error is not None:
            fault = (
                f"--batch: the results of {record.batch} do not arrive whole ({self.said(error)}); {len(outcomes)} of "
                f"{record.count} are saved; run the same command again later, or delete {self.store.path(record)} to "
                "have the others asked again"
            )
            self.ends.append(UserError(fault))
            return
        record.state = COLLECTED
        self.store.save(record)
        self.pending.remove(record)
        costs = [outcome.cost_usd for outcome in outcomes.values() if isinstance(outcome, Reply)]
        charged = any(outcome.charged for outcome in outcomes.values() if isinstance(outcome, Failed))
        usd = None if charged or None in costs else sum(costs)  # None: not known
        self.ledger.settle(record.entry, usd, LOST if usd is None and self.teacher.price else "reply")
        self.end_if_refused(record, outcomes)

    def end_if_refused(self, record: Record, outcomes: Mapping[str, Reply | Failed]) -> None:
        """End the run where the account was refused or the user has cancelled the batch."""
        failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failed)]
        for refusal in [outcome for outcome in failed if outcome.account][:1]:
            fault = (
                f"{self.teacher.key_name}: the API refuses the whole account in batch {record.batch} "
                f"({refusal.reason}: {refusal.said}); see billing and limits in the Console, then run this again to "
                "go on"
            )
            self.ends.append(Stop(fault, STOP_STATUS))
        if cancelled := sum(outcome.reason == "canceled" for outcome in failed):
            fault = (
                f"--batch: batch {record.batch} was cancelled before {cancelled} of its {record.count} requests were "
                "processed; nothing is asked again in this run: run the same command again to ask them"
            )
            self.ends.append(UserError(fault))

    async def results(self, record: Record) -> tuple[dict[str, Reply | Failed], Exception | None]:
        """(outcome of each request by custom_id, the error that kept the others from arriving).

        Without outcomes the batch is lost, or not ours; both cases are handled here.
        """
        for attempt in range(TRIES):
            found: dict[str, Reply | Failed] = {}
            foreign, error = 0, None
            try:
                async for custom_id, outcome in self.teacher.batch_results(record.batch):
                    if isinstance(custom_id, str) and custom_id in record.asked:
                        found[custom_id] = outcome
                    else:
                        foreign += 1
            except Exception as failure:  # whatever a stream that breaks off raises
                error = failure
                if _is_unknown(error):
                    self.lost(record, f"has no results (404: {self.said(error)})")
                    return {}, None
                if isinstance(error, ApiError) and not failure_of(error).retryable:
                    raise self.user_error(error) from None
            if len(found) == record.count or foreign and not found:
                break
            # every request has a result, expired ones too: a stream without an error may have ended early, too
            await asyncio.sleep(_backoff(attempt))
        if found:
            return found, error if len(found) < record.count else None
        if foreign and record.from_list:
            await self.disown(record)
        else:
            what = f"holds {foreign} results of other requests" if foreign else "gives back no result"
            self.lost(record, what if error is None else f"{what} ({self.said(error)})")
        return {}, None

    async def disown(self, record: Record) -> None:
        """The batch that was found in the list is somebody else's: look for another, or ask anew."""
        record.not_ours.append(record.batch)
        record.batch, record.state, record.from_list = None, INTENT, False
        self.store.save(record)
        await self.reattach(record)
        if record.batch is None:
            self.pending.remove(record)
            for key in {self.key_of.get(asked["item"]) for asked in record.all_asked()}:
                if key in self.session.open:
                    self.ask(key)

    async def save_outcome(self, asked: list[dict[str, Any]], outcome: Reply | Failed) -> None:
        """Save a reply; a failed or unusable one is asked again or given up. Skips items that are answered by now.

        `asked`: the request's entries in the record, one for each rationale; a failure is noted there.
        """
        session, keys = self.session, [self.key_of.get(each["item"]) for each in asked]
        prepared = [session.prepare(key) if key in session.open else None for key in keys]
        wanted: dict[str, dict[str, Any]] = {}  # key -> its entry
        for place, (key, mine) in enumerate(zip(keys, asked, strict=True)):
            if prepared[place] and digest(prepared[place][0].text) == mine["text"]:
                wanted[key] = mine
            else:
                if prepared[place]:  # the rationale was exported anew since
                    self.ask(key)
                keys[place] = prepared[place] = None
        if not wanted:
            return
        if isinstance(outcome, Failed):
            self.note_failure(wanted, outcome, single=len(asked) == 1)
            return
        session.report.add(outcome)
        request = next(each[0] for each in prepared if each)
        if len(asked) > 1:
            rationales = tuple(each[0].sentences if each else () for each in prepared)
            request = dataclasses.replace(request, rationales=rationales)
        abouts = [each[1] if each else {} for each in prepared]
        sidecars = [about | {"attempt": mine["attempt"]} for about, mine in zip(abouts, asked, strict=True)]
        refused = await asyncio.to_thread(session.save_replies, keys, request, outcome, sidecars)
        for key, mine in wanted.items():
            if key in refused:
                why = str(refused[key]).removeprefix(refused[key].reason).removeprefix(": ")
                mine |= {"reason": refused[key].reason, "said": why, "replied": True}
                self.ask(key)
            else:
                session.finish(key, f"{outcome.teacher} {outcome.model}")

    def note_failure(self, wanted: Mapping[str, dict[str, Any]], failed: Failed, single: bool) -> None:
        """Note in the entries of a request why it has no reply, and ask again unless the run ends."""
        for key, mine in wanted.items():
            mine |= {"reason": failed.reason, "said": failed.said, "permanent": failed.permanent and single}
            if failed.account or failed.reason == "canceled":  # free, and the run ends: no attempt
                mine["attempt"] -= 1
                continue
            if failed.permanent and not single:  # perhaps because of one rationale only
                mine["alone"] = True
            self.ask(key)


def _backoff(attempt: int) -> float:
    return min(60.0, BACKOFF * 2**attempt)


def _is_unknown(error: Exception) -> bool:
    return isinstance(error, ApiError) and error.status == 404
