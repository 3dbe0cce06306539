"""What a step costs, learned from the steps that run: `StepCosts`.

A step of n requests that decode, with k draft tokens among them, takes

    t(n, k) = t(n, 0) · v(n, k)

seconds. t(n, 0) changes with the length of the contexts and with what else runs on the machine, so
it follows the last steps fast. v, the price of further rows, is nearly a constant of the machine
and the model. It is averaged over many steps, so that noise does not decide.
"""

import math
from itertools import pairwise

__all__ = ["MAX_ROWS", "StepCosts"]

MAX_ROWS = 128  # of a step that is measured
_ROW_COST = 0.08  # of a step of one row: what a further row costs, until it is measured
_FOLLOW = 0.1  # how much of a step's deviation t(n, 0) follows
_AVERAGE = 0.03  # how much of a deviation v follows, after some steps
_MOST_SURPRISE = 0.25  # log of a deviation that is believed: a disturbed step must not count much
_FIRST_SURPRISE = 2.0  # the same, of what was not measured before
_FIRST_STEPS = 3
_FIRST_DRAFTS = 3  # where the cost of none is measured


class _Curve:
    """t(n, k) for one n."""

    def __init__(self, num_requests: int, seconds: float) -> None:
        self.plain = seconds  # t(n, 0)
        self.num_plain = 0
        self.knots: dict[int, float] = {0: 1.0}  # k -> v(n, k), where it was measured
        self.counts: dict[int, int] = {}  # k -> how many steps measured it
        self._last = 0  # k of the last step
        self._slope = _ROW_COST / (1 + _ROW_COST * (num_requests - 1))  # until it is measured
        self._most = max(1, MAX_ROWS - num_requests)
        self.ratios = [1 + self._slope * k for k in range(self._most + 1)]  # v(n, k) for all k

    def inherit(self, other: "_Curve") -> None:
        """A further row is assumed to take as many seconds as with another number of requests."""
        for k, ratio in other.knots.items():
            if 0 < k <= self._most:
                self.knots[k] = 1 + max(0.0, ratio - 1) * other.plain / self.plain
        self._interpolate(0)

    def record(self, extra: int, seconds: float) -> None:
        """A step with so many drafts took so many seconds."""
        if extra > self._most:
            return
        before, self._last = self._last, extra
        surprise = math.log(seconds / (self.plain * self.ratios[extra]))
        is_new = extra > 0 and self.counts.get(extra, 0) < _FIRST_STEPS
        most = _FIRST_SURPRISE if is_new else _MOST_SURPRISE
        bounded = min(max(surprise, -most), most)
        if not extra:
            self.num_plain += 1
            change = math.exp(max(1 / self.num_plain, _FOLLOW) * bounded)
            self.plain *= change
            # The step before tells that t(n, k) has not changed, so v was wrong.
            if before:
                self.knots[before] = max(1.0, self.knots[before] / change)
                self._interpolate(before)
            return
        if not is_new:
            self.plain *= math.exp(_FOLLOW * bounded)
        # What was assumed counts as half a step.
        count = self.counts[extra] = self.counts.get(extra, 0) + 1
        share = max(1 / (count + 0.5), _AVERAGE)
        self.knots[extra] = max(1.0, self.ratios[extra] * math.exp(share * bounded))
        self._interpolate(extra)

    def _interpolate(self, changed: int) -> None:
        """Fill `ratios` around a knot; 0: everywhere."""
        ks = sorted(self.knots)
        for low, high in pairwise(ks):
            if not changed or low == changed or high == changed:
                start, step = self.knots[low], (self.knots[high] - self.knots[low]) / (high - low)
                for k in range(low, high + 1):
                    self.ratios[k] = start + step * (k - low)
        last = ks[-1]
        if changed in (0, last):
            start = self.knots[last]
            # A row behind the last measured number costs what those before it cost on average.
            slope = max((start - 1) / last, self._slope / 4) if last else self._slope
            for k in range(last, self._most + 1):
                self.ratios[k] = start + slope * (k - last)


class StepCosts:
    """Seconds of steps in which all requests decode."""

    def __init__(self) -> None:
        self._curves: dict[int, _Curve] = {}  # by the number of requests

    def record(self, num_requests: int, num_drafts: int, seconds: float) -> None:
        """A step of so many requests and draft tokens took so many seconds."""
        if num_requests + num_drafts > MAX_ROWS or seconds <= 0:
            return
        curve = self._curves.get(num_requests)
        if curve is None:
            near = self._nearest(num_requests)
            curve = self._curves[num_requests] = _Curve(num_requests, seconds)
            if near is not None:
                curve.inherit(near)
            curve.plain = seconds / curve.ratios[num_drafts]
        curve.record(num_drafts, seconds)

    def plain_seconds(self, num_requests: int) -> float | None:
        """What a step without drafts takes; None until a step of so many requests ran."""
        curve = self._curves.get(num_requests)
        return None if curve is None else curve.plain

    def ratios(self, num_requests: int) -> list[float] | None:
        """v(n, k) for k = 0, 1, …: the cost of a step with k drafts beside one without. None until
        a step of so many requests ran.
        """
        curve = self._curves.get(num_requests)
        return None if curve is None else curve.ratios

    def most_trusted(self, num_requests: int) -> int:
        """The most drafts whose cost is measured, or not far from what is."""
        curve = self._curves.get(num_requests)
        return 0 if curve is None else 2 * max(curve.knots) + _FIRST_DRAFTS

    def num_measured(self, num_requests: int, num_drafts: int) -> int:
        """How many steps of so many requests and draft tokens were measured."""
        curve = self._curves.get(num_requests)
        return 0 if curve is None else curve.counts.get(num_drafts, 0)

    def _nearest(self, num_requests: int) -> _Curve | None:
        """The curve of the number of requests that is nearest, by their ratio."""
        if not self._curves:
            return None
        return self._curves[min(self._curves, key=lambda n: abs(math.log(n / num_requests)))]
