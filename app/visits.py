"""Who compares: the conversations of a tab with several models, and a context that it had grown.

A tab tells its name, made by the browser, when it is opened. So one whose connection broke, or that was loaded again,
has what it had; the states are freed meanwhile.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from app.compare import Compare
from app.grow import Grow

LEFT_S, MOST_LEFT = 3600, 32  # how long, and how many visits stay whose tab seems closed
MOST_EMPTY = 1024  # the same of those that hold nothing; such a tab that comes back has lost nothing


@dataclass(eq=False)
class Visit:
    """`session` is Gradio's, new with every load of the page; `left_s` is when the tab was left, None while it is
    there."""

    session: str
    compare: Compare | None = None
    grow: Grow | None = None
    left_s: float | None = None

    @property
    def is_empty(self) -> bool:
        return (self.compare is None or self.compare.shown is None) and self.grow is None

    def rest(self) -> None:
        if self.compare is not None:
            self.compare.rest()
        if self.grow is not None:
            self.grow.stop()

    def close(self) -> None:
        if self.compare is not None:
            self.compare.close()
        if self.grow is not None:
            self.grow.stop()
        self.compare = self.grow = None


class Visits:
    """By session, and by the name of the tab."""

    def __init__(self) -> None:
        self._visits: dict[str, Visit] = {}
        self._tabs: dict[str, Visit] = {}

    def open(self, session: str, tab: str) -> Visit:
        """The visit of a tab that was loaded, perhaps not for the first time. A second tab of one name, a duplicate,
        takes it over."""
        self._drop_left()
        visit = self._tabs.get(tab) if tab else None
        if visit is None:
            visit = self._visits.get(session) or Visit(session)
        self._visits.pop(visit.session, None)
        visit.session, visit.left_s = session, None
        self._visits[session] = visit
        if tab:
            self._tabs[tab] = visit
        return visit

    def get(self, session: str) -> Visit | None:
        """None if the server let it go, or never knew it: then it was another server's, before this one was started."""
        visit = self._visits.get(session)
        if visit is not None and visit.left_s is not None:
            visit.left_s = time.monotonic()  # its browser does not tell a second time that it has left
        return visit

    def leave(self, session: str) -> None:
        """The tab was closed, or its connection broke, which looks the same."""
        visit = self._visits.get(session)
        if visit is not None:
            visit.rest()
            visit.left_s = time.monotonic()
        self._drop_left()

    def _drop_left(self) -> None:
        left = sorted((v for v in self._visits.values() if v.left_s is not None), key=lambda v: v.left_s or 0.0)
        for visits, most in (
            ([v for v in left if not v.is_empty], MOST_LEFT),
            ([v for v in left if v.is_empty], MOST_EMPTY),
        ):
            for i, visit in enumerate(visits):
                if i < len(visits) - most or time.monotonic() - (visit.left_s or 0.0) > LEFT_S:
                    visit.close()
                    del self._visits[visit.session]
        self._tabs = {tab: visit for tab, visit in self._tabs.items() if self._visits.get(visit.session) is visit}
