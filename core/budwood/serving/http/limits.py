"""Who may begin: requests and rows of each tenant and of all, and when to come back."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from budwood.serving.http.errors import ApiError
from budwood.serving.http.settings import Limits
from budwood.serving.http.tokens import Tenant

MINUTE = 60.0


class Admission:
    """Counts what is in flight. The event loop's alone.

    Attributes:
        rows: rows in flight or waiting, of all tenants.
    """

    def __init__(self, limits: Limits, max_rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.max_rows, self._clock = limits, max_rows, clock
        self.rows = 0
        self._by_tenant: Counter[str] = Counter()
        self._budgets: dict[str, tuple[float, float]] = {}  # requests left, and when that was
        self._seconds = 1.0  # of a row, averaged

    def count_request(self, tenant: Tenant) -> None:
        """Count a request against its token's rate.

        Raises:
            ApiError: it has sent as many in the last minute as it may.
        """
        rate = tenant.requests_per_minute
        if rate is None:
            return
        now = self._clock()
        left, then = self._budgets.get(tenant.key, (float(rate), now))
        left = min(float(rate), left + (now - then) * rate / MINUTE)
        if left < 1:
            self._budgets[tenant.key] = left, now
            wait = math.ceil((1 - left) * MINUTE / rate)
            raise ApiError(429, f"{rate} requests a minute are the most of this token.", code="rate", retry_after=wait)
        self._budgets[tenant.key] = left - 1, now

    @contextmanager
    def hold(self, tenant: Tenant, rows: int) -> Iterator[None]:
        """Hold rows for a request.

        Raises:
            ApiError: there are too many, of the tenant or in all.
        """
        if tenant.rows is not None and self._by_tenant[tenant.name] + rows > tenant.rows:
            text = f"{tenant.rows} answers at a time are the most of this tenant."
            raise ApiError(429, text, code="concurrency", retry_after=self.retry_after)
        if self.rows and self.rows + rows > self.max_rows + self.limits.waiting:
            text = f"{self.limits.waiting} requests wait already: try again later."
            raise ApiError(429, text, code="queue_full", retry_after=self.retry_after)
        self.rows += rows
        self._by_tenant[tenant.name] += rows
        start = self._clock()
        try:
            yield
        finally:
            self.rows -= rows
            self._by_tenant[tenant.name] -= rows
            if not self._by_tenant[tenant.name]:
                del self._by_tenant[tenant.name]
            self._seconds += 0.1 * (self._clock() - start - self._seconds)

    @property
    def retry_after(self) -> int:
        """Seconds after which a row should be free, from how long rows took lately."""
        rounds = math.ceil(max(self.rows - self.max_rows, 1) / self.max_rows)
        return min(max(math.ceil(self._seconds * rounds), 1), 60)
