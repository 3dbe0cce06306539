"""The KV cache as the scheduler sees it: what a request hits, what it holds, and what makes room
for what.
"""

from pellucid.kv.manager import KVCacheManager
from pellucid.scheduler import Scheduler

from .canary import CanaryRunner, build_layout, build_request, run_to_the_end


def test_what_follows_a_partly_matching_block_may_go_to_make_room_for_its_copy() -> None:
    """The pool is full, and all that nobody holds is one edge whose first block is to be copied."""
    kv = KVCacheManager(build_layout([None], block_size=4), 4)
    scheduler = Scheduler(kv, max_model_len=12, max_num_batched_tokens=16, max_num_seqs=4)
    runner = CanaryRunner(kv)
    scheduler.add(build_request("old", [0, 1, 2, 0, 1, 2, 0, 1], max_tokens=1))
    run_to_the_end(scheduler, runner)
    scheduler.add(build_request("running", [2, 2, 2, 2, 2], max_tokens=3))
    step = scheduler.schedule()
    scheduler.update(step, runner.execute(step))
    copying = build_request("copying", [0, 1, 0], max_tokens=1)
    scheduler.add(copying)
    run_to_the_end(scheduler, runner)
    assert copying.num_cached_tokens == 2
