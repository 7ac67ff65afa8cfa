"""Asking live: every open request of a session, `teacher.concurrency` at a time.

At a failure, a budget stop or the first Ctrl-C nothing new is sent; replies to requests in flight are saved.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ares import cli, files
from teacher.interface import Stopped, Unanswered
from teacher.session import Session

WRITERS = 4  # threads that save replies: their flushes to disk overlap


def ask_live(session: Session) -> None:
    """Answer the session's open groups. Raises UserError for what ends the run; what is answered by then is kept."""
    if session.groups:
        asyncio.run(_Live(session).run())


class _Live:
    def __init__(self, session: Session):
        self.session = session
        self.teacher = session.teacher
        self.failure: cli.UserError | None = None
        self.writers = ThreadPoolExecutor(WRITERS)

    async def run(self) -> None:
        report = self.session.report
        todo = iter(self.session.groups)  # numbers: texts and images are read when their turn comes
        total = len(self.session.groups)
        with cli.progress(desc=self.teacher.name, total=total, unit="request") as bar:
            async with self.teacher:
                self.catch_signals()
                workers = min(self.teacher.concurrency, total)
                ends = await asyncio.gather(*(self.work(todo, bar) for _ in range(workers)), return_exceptions=True)
        self.writers.shutdown()
        defect = next((end for end in ends if isinstance(end, BaseException)), None)
        if defect or self.failure:
            cli.print0(f"stopped; {report.summary()}")
            raise defect or self.failure

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
                self.teacher.stop()  # nothing new is paid for after a defect of ours
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
                reason, said = failure.reason, failure.message
                break
            report.add(reply)
            about = sidecar | {"attempt": attempt}
            refused = await asyncio.get_running_loop().run_in_executor(
                self.writers, session.lay_down, group, request, reply, about
            )
            if full := files.out_of_room():
                self.stop(full)
            if refused is None:
                report.copied += copies
                return session.finish(group, None)
            reason, said = refused.reason, str(refused).partition(": ")[2]
            request = session.ask_again(request, refused)
        return session.finish(group, reason, said)
