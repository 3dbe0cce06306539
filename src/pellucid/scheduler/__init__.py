"""Chooses the requests of the next step: a waiting queue with its policy, and the scheduler.
Integers only: no arrays, no clock, no I/O.
"""

from .events import Event
from .scheduler import ScheduledStep, Scheduler

__all__ = ["Event", "ScheduledStep", "Scheduler"]
