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


def test_loading_a_hit_does_not_drop_the_saved_block_in_which_it_ends() -> None:
    """The second tier is full, so what is evicted for a load takes the place of a saved block."""
    kv = KVCacheManager(build_layout([None], block_size=4), 4, num_slots=3)
    scheduler = Scheduler(kv, max_model_len=16, max_num_batched_tokens=16, max_num_seqs=1)
    runner = CanaryRunner(kv, num_slots=3)
    old = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    scheduler.add(build_request("old", old, max_tokens=1))
    scheduler.add(build_request("other", [2] * 15, max_tokens=1))
    run_to_the_end(scheduler, runner)
    again = build_request("again", [*old[:9], 2], max_tokens=1)
    scheduler.add(again)
    run_to_the_end(scheduler, runner)
    assert again.num_cached_tokens == 9
