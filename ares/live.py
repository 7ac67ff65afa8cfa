"""Asking live: every open request of a session, `teacher.concurrency` at a time.

At a failure, a budget stop or the first Ctrl-C nothing new is sent, and what is on its way comes home.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from typing import Any

from ares import cli, files
from ares.answering import Session
from ares.asking import Stopped, Unanswered
from ares.feedback import Refused


def ask_live(session: Session) -> None:
    """Answer the session's open groups. Raises UserError for what ends the run; what is answered by then is kept."""
    if session.groups:
        asyncio.run(_Live(session).run())


class _Live:
    def __init__(self, session: Session):
        self.session = session
        self.teacher = session.teacher
        self.failure: cli.UserError | None = None
        self.desk = _Desk(self.session)

    async def run(self) -> None:
        report = self.session.report
        todo = iter(self.session.groups)  # numbers: texts and images are read when their turn comes
        total = len(self.session.groups)
        with cli.progress(desc=self.teacher.name, total=total, unit="request") as bar:
            async with self.teacher:
                self.catch_signals()
                workers = min(self.teacher.concurrency, total)
                ends = await asyncio.gather(*(self.work(todo, bar) for _ in range(workers)), return_exceptions=True)
        defect = next((end for end in ends if isinstance(end, BaseException)), None)
        if defect or self.failure:
            cli.print0(f"stopped; {report.summary()}")
            raise defect or self.failure

    def catch_signals(self) -> None:
        """The first Ctrl-C, or a scheduler's SIGTERM, ends the run in good order; the second ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()

        def end(name: str) -> None:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            flight = "requests on their way come home; Ctrl-C again to drop them"
            cli.print0(f"{name}: {flight}")
            self.stop(cli.Stop(f"ended by {name}; run the same command again to go on", status=130))

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end, number.name)

    def stop(self, failure: cli.UserError) -> None:
        self.failure = self.failure or failure
        self.teacher.stop()

    async def work(self, todo: Iterator[int], bar: Any) -> None:
        for group in todo:
            if self.failure:
                return
            try:
                await self.ask(group)
            except cli.UserError as error:
                self.stop(error)
                return
            except Stopped:
                return
            except OSError as error:
                what = f"cannot write a reply below {self.session.root} ({error.strerror or error})"
                self.stop(cli.UserError(f"{what}; make room, then run the same command again to go on"))
                return
            except BaseException:
                self.teacher.stop()  # nothing new is paid for after a defect of ours; what is on its way comes home
                raise
            bar.update()
            bar.set_postfix_str(self.state(), refresh=False)

    def state(self) -> str:
        """failed, tokens, dollars, and the pace where it was slowed."""
        report = self.session.report
        tokens = report.usage.total()
        words = [f"{len(report.unusable)} failed", f"{tokens / 1e6:.2f}M tokens" if tokens else ""]
        if report.cost_usd:
            words.append(f"${report.cost_usd:.3f}")
        pace = getattr(self.teacher, "pace", None)
        if pace is not None and pace.limit < pace.most:
            words.append(f"{int(pace.limit)} at a time")
        return ", ".join(filter(None, words))

    async def ask(self, group: int) -> None:
        """Ask about one rationale, at most `attempts` times, and give every item of the group the reply."""
        session, report = self.session, self.session.report
        request, sidecar = session.start(group)
        copies = len(session.groups.waiting(group)) - 1
        for attempt in range(1, session.attempts + 1):
            try:
                reply = await self.teacher.answer(request)
            except Unanswered as failure:
                reason = failure.reason
                break
            report.add(reply)
            refused = await self.desk.lay_down(group, request, reply, sidecar | {"attempt": attempt})
            if full := files.out_of_room():
                self.stop(full)
            if refused is None:
                report.copied += copies
                reason = None
                break
            reason = refused.reason
            request = session.ask_again(request, refused)
        session.finish(group, reason)


class _Desk:
    """Lays replies down in threads, so that their flushes to disk overlap: all that have come in go along at once.

    A thread for each reply would cost more CPU time in handing over than the writing itself.
    """

    THREADS = 2

    def __init__(self, session: Session):
        self.session = session
        self.waiting: list[tuple[tuple, asyncio.Future]] = []
        self.tasks: set[asyncio.Task] = set()  # held here, or the loop may drop them
        self.at_work = 0

    async def lay_down(self, *about: Any) -> Any:
        """`Session.lay_down`, when its turn comes."""
        done = asyncio.get_running_loop().create_future()
        self.waiting.append((about, done))
        if self.at_work < self.THREADS:
            self.at_work += 1
            task = asyncio.create_task(self.work())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        return await done

    async def work(self) -> None:
        try:
            await self.clear()
        finally:
            # in the same step as the last look at `waiting`: a done callback runs later, and a reply that came in
            # between would find every clerk taken and nobody to lay it down
            self.at_work -= 1

    async def clear(self) -> None:
        while self.waiting:
            batch, self.waiting = self.waiting, []
            try:
                outcomes = await asyncio.to_thread(self.lay_all_down, [about for about, _ in batch])
            except Exception as error:  # the machine gives no more threads: whoever waits must hear of it
                outcomes = [error] * len(batch)
            for (_, done), outcome in zip(batch, outcomes, strict=True):
                if done.cancelled():
                    continue
                if isinstance(outcome, Exception) and not isinstance(outcome, Refused):
                    done.set_exception(outcome)
                else:
                    done.set_result(outcome)

    def lay_all_down(self, batch: list[tuple]) -> list[Any]:
        outcomes = []
        for about in batch:
            try:
                outcomes.append(self.session.lay_down(*about))
            except Exception as error:  # a full disk ends the run, not the other replies of this batch
                outcomes.append(error)
        return outcomes
