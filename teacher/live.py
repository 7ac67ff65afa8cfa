"""Asking live: every open request of a session (teacher/session.py), `teacher.concurrency` at a time.

After a failure, a budget stop or the first Ctrl-C no new request is sent; replies to requests in flight are saved.
"""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ares import cli, files
from teacher.api_teacher import TooLarge
from teacher.handoff import Refused
from teacher.interface import Request, Stopped, Unanswered
from teacher.session import Session

WRITERS = 4  # threads that save replies: their flushes to disk overlap


def ask_live(session: Session) -> None:
    """Answer the session's open requests. Raises UserError for what ends the run; replies so far are kept."""
    if session.open:
        asyncio.run(_Live(session).run())


@dataclass
class _Ask:
    """One request to send, about the rationales of a unit. `refused`: why the replies before could not be used."""

    prepared: Mapping[str, tuple[Request, dict[str, Any]]]  # key -> its own request and sidecar
    attempt: int = 1
    refused: Mapping[str, Refused] = field(default_factory=dict)
    length_factor: int = 1

    def alone(self) -> list[_Ask]:
        """The same for each rationale by itself."""
        return [dataclasses.replace(self, prepared={key: each}) for key, each in self.prepared.items()]


class _Live:
    def __init__(self, session: Session):
        self.session, self.teacher = session, session.teacher
        self.failure: cli.UserError | None = None
        self.writers = ThreadPoolExecutor(WRITERS)

    async def run(self) -> None:
        units = self.session.units()  # of keys: texts and images are read when a request is sent
        todo, total = iter(units), len(self.session.open)
        with cli.progress(desc=self.teacher.name, total=total, unit="rationale") as bar:
            async with self.teacher:
                self.catch_signals()
                workers = [self.work(todo, bar) for _ in range(min(self.teacher.concurrency, len(units)))]
                ends = await asyncio.gather(*workers, return_exceptions=True)
        self.writers.shutdown()
        if end := next(filter(None, ends), self.failure):  # a bug of ours first
            cli.print0(f"stopped; {self.session.report.summary()}")
            raise end

    def catch_signals(self) -> None:
        """The first Ctrl-C, or a scheduler's SIGTERM, lets requests in flight finish; the second does not."""
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()

        def end(name: str) -> None:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            cli.print0(f"{name}: waiting for the requests in flight; Ctrl-C again to drop them")
            self.stop(cli.Stop(f"ended by {name}; run the same command again to go on", status=130))

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end, number.name)

    def stop(self, failure: cli.UserError) -> None:
        self.failure = self.failure or failure
        self.teacher.stop()

    async def work(self, todo: Iterator[Sequence[str]], bar: Any) -> None:
        for keys in todo:
            if self.failure:
                return
            try:
                await self.ask(keys)
            except Stopped:
                return
            except (cli.UserError, OSError) as error:
                self.stop(self.session.fault(error))
                return
            except BaseException:  # after a bug of ours nothing new is paid for
                self.teacher.stop()
                raise
            bar.update(len(keys))
            report, pace = self.session.report, getattr(self.teacher, "pace", None)
            words = f"{len(report.unusable)} failed, {report.usage.total() / 1e6:.2f}M tokens, ${report.cost_usd:.3f}"
            words += f", {int(pace.limit)} at a time" if pace and pace.limit < pace.most else ""
            bar.set_postfix_str(words, refresh=False)

    async def ask(self, keys: Sequence[str]) -> None:
        """Ask about the rationales of a unit until each has a usable reply, at most `attempts` replies for each."""
        todo = [_Ask({key: self.session.prepare(key) for key in keys})]
        while todo:
            todo += await self.ask_once(todo.pop(0))

    async def ask_once(self, ask: _Ask) -> list[_Ask]:
        """Send one request and save its reply for all items. Returns what is to be asked again."""
        session, keys = self.session, list(ask.prepared)
        requests, sidecars = zip(*ask.prepared.values(), strict=True)
        why = [ask.refused[key] for key in keys] if ask.refused else []
        request = session.join(requests, ask.length_factor, why)
        try:
            reply = await self.teacher.answer(request)
        except (Unanswered, TooLarge) as failure:
            if len(keys) > 1:  # perhaps only one of them is refused
                return ask.alone()
            if isinstance(failure, TooLarge):
                raise
            permanent = failure.permanent and ask.attempt == 1  # later ones carry a note that may be the cause
            session.give_up(keys[0], failure.reason, failure.message, permanent)
            return []
        session.report.add(reply)
        sidecars = [sidecar | {"attempt": ask.attempt} for sidecar in sidecars]
        save = partial(session.save_replies, keys, request, reply, sidecars)
        loop = asyncio.get_running_loop()
        refused = save() if session.free else await loop.run_in_executor(self.writers, save)
        if full := files.disk_full():
            self.stop(full)
        for key in keys:
            if key not in refused:
                session.finish(key, f"{reply.teacher} {reply.model}")
        if ask.attempt == session.attempts:
            for key, each in refused.items():
                session.give_up(key, each.reason, str(each).partition(": ")[2])
            return []
        if not refused:
            return []
        left = {key: ask.prepared[key] for key in refused}
        again = _Ask(left, ask.attempt + 1, refused, request.length_factor)
        return again.alone() if again.attempt == session.attempts else [again]
