"""Who runs in this step. Sans I/O: no clock, no arrays, no threads; integers in, integers out."""

from .scheduler import ScheduledRequest, ScheduledStep, Scheduler

__all__ = ["ScheduledRequest", "ScheduledStep", "Scheduler"]
