"""The second tier's memory: saved blocks in a file without a name, gone when this process ends.

It is read and written with pread and pwrite. So a full or failing disk is an OSError; with a mapped
file it would end the process. And saved blocks count as the system's file cache, not as memory of
this process.
"""

import os
import tempfile
import weakref

from ..errors import CapacityError

__all__ = ["SwapFile"]


class SwapFile:
    """`num_slots` slots of `slot_bytes` each."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        """Raises CapacityError where the disk has no room for the file."""
        self.slot_bytes = slot_bytes
        self.folder = tempfile.gettempdir()
        try:
            with tempfile.TemporaryFile(prefix="pellucid-kv-") as file:
                os.posix_fallocate(file.fileno(), 0, num_slots * slot_bytes)
                self._file = os.dup(file.fileno())
        except OSError as error:
            raise CapacityError(
                f"swap_space of {num_slots * slot_bytes} bytes cannot be had in "
                f"{self.folder}: {error.strerror}"
            ) from error
        weakref.finalize(self, os.close, self._file)

    def write(self, slot: int, block: memoryview) -> None:
        """Fill a slot. Raises OSError where the disk fails."""
        done = 0
        while done < self.slot_bytes:  # a call may write only a part
            done += os.pwrite(self._file, block[done:], slot * self.slot_bytes + done)

    def read(self, slot: int, block: memoryview) -> None:
        """Read a slot into a buffer. Raises OSError if the disk fails."""
        done = 0
        while done < self.slot_bytes:
            place = slot * self.slot_bytes + done
            count = os.preadv(self._file, [block[done:]], place)
            if count == 0:
                raise OSError("the swap file ends too early")
            done += count
