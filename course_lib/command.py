"""`posttrain` before anything is imported: Ctrl-C in its first moments ends it without a word."""

from __future__ import annotations

import signal


def main() -> None:
    before = signal.getsignal(signal.SIGINT)  # a job in the background may ignore it
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from course_lib.cli import entry

    signal.signal(signal.SIGINT, before)
    entry()
