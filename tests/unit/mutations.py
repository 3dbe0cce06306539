"""Bugs to plant, one at a time: (what, file, source text, what it becomes). scripts/mutate plants
each in a copy of the package and shows which test finds it, and how. A text that is no longer there
is an error: the list is kept with the code.

MUTATIONS are bugs of the scheduler and the KV cache. FAULTS are bugs of what protects the engine
from a wrong file or a small machine; each has its own tests.

Two changes that nothing finds are not in it, because they change no answer: a preempted request
that keeps its counter (admission sets it), and evicting a tail that its owner still holds (the tree
forgets it, and loses a hit).
"""

MANAGER, TREE, TIER, POOL, LAYOUT = (
    "kv/manager.py",
    "kv/radix_tree.py",
    "kv/second_tier.py",
    "kv/block_pool.py",
    "kv/layout.py",
)
SCHEDULER, WAITING = "scheduler/scheduler.py", "scheduler/waiting.py"

MUTATIONS = [
    (
        "the last block of a request is not given back",
        MANAGER,
        "        for block in kept(held.tables):\n            self._pool.release",
        "        for block in kept(held.tables)[:-1]:\n            self._pool.release",
    ),
    (
        "a hit leaves nothing to compute",
        MANAGER,
        "limit = request.num_reusable",
        "limit = request.num_tokens",
    ),
    (
        "a window is freed one token early",
        LAYOUT,
        "num_computed_tokens - self.window + 1)",
        "num_computed_tokens - self.window + 2)",
    ),
    (
        "a hit needs one token of the window less",
        MANAGER,
        "first = self.layout.groups[group].first_needed(length, size)",
        "first = self.layout.groups[group].first_needed(length + 1, size)",
    ),
    ("a salt is ignored", MANAGER, 'f"salt {request.cache_salt}"', '"salt"'),
    (
        "copy-on-write without the copy",
        MANAGER,
        'BlockOp("copy", source, target)',
        'BlockOp("copy", target, target)',
    ),
    (
        "a block that is not full is published as full",
        MANAGER,
        "stop = request.num_computed_tokens // size * size",
        "stop = -(-request.num_computed_tokens // size) * size",
    ),
    (
        "a partial match is one token too long",
        TREE,
        "            if same > most:\n                partial, most = (candidate, column), same",
        (
            "            if same > most:\n                partial, most = (candidate, column), "
            "min(same + 1, len(rest))"
        ),
    ),
    (
        "blocks of the tier are not loaded",
        TREE,
        "self.ops += [self._tier.load(slot, block) for slot, block in moves]",
        "pass",
    ),
    ("blocks of the tier are not saved", TREE, "self.ops.append(op)", "pass"),
    ("a slot of the tier is free while it is full", TIER, "self._free.pop()", "self._free[-1]"),
    (
        "a node with children in memory is evicted",
        TREE,
        "        if node.locks or any(",
        "        if node.locks or not any(",
    ),
    ("a duplicate is not given up", TREE, "                    self._pool.release(own)\n", ""),
    (
        "a split gives the lower part the upper blocks",
        TREE,
        "node.blocks = [row[columns:] for row in node.blocks]",
        "node.blocks = [row[:columns] for row in node.blocks]",
    ),
    (
        "an idle block is not counted",
        POOL,
        "        if self.is_idle(block):\n            self.num_idle += 1",
        "        if False:\n            self.num_idle += 1",
    ),
    (
        "forgetting keeps what was published",
        MANAGER,
        "held.node, held.num_published = self._tree.root(held.salt), 0",
        "held.node = self._tree.root(held.salt)",
    ),
    (
        "the first in rank is preempted",
        SCHEDULER,
        "victim = self.running[-1]",
        "victim = self.running[0]",
    ),
    (
        "the budget is overrun",
        SCHEDULER,
        "count = min(request.num_tokens - hit.num_tokens, left)",
        "count = request.num_tokens - hit.num_tokens",
    ),
    (
        "room is asked for a token late",
        SCHEDULER,
        "computed + count > request.next_kv_event",
        "computed + count > request.next_kv_event + 1",
    ),
    (
        "a window asks for nothing",
        MANAGER,
        "border = min(border, (first + 1) * size + group.window - 1)",
        "pass",
    ),
    (
        "after a crash nothing is published in time",
        MANAGER,
        "            held.request.next_kv_event = self._next_event(held)\n",
        "",
    ),
    (
        "more run than may",
        SCHEDULER,
        "len(self.running) < self.max_num_seqs",
        "len(self.running) <= self.max_num_seqs",
    ),
    (
        "the larger priority comes first",
        WAITING,
        "request.priority if self.policy",
        "-request.priority if self.policy",
    ),
    ("nobody grows old under lpm", WAITING, " - _PATIENCE * (step - r.queued_step),", ","),
    (
        "lpm takes the shortest match",
        WAITING,
        "-self._cached_tokens(r) -",
        "self._cached_tokens(r) -",
    ),
    (
        "a tenant that comes back starts at nothing",
        WAITING,
        "min(self._served.values(), default=0)",
        "0",
    ),
    ("an output token is for nothing", WAITING, " + _OUTPUT_WEIGHT * num_output_tokens", ""),
    ("a prompt is for nothing", WAITING, "_PROMPT_WEIGHT * num_prompt_tokens + ", ""),
    (
        "a batch is not held to its end",
        SCHEDULER,
        'if self.batching != "continuous" and self.running:',
        "if False:",
    ),
    (
        "lengths are not alike",
        SCHEDULER,
        'first is not None and self.batching == "dynamic"',
        "False",
    ),
    (
        "nobody waits for a prefix that is being computed",
        SCHEDULER,
        "if self._is_being_computed(request, hit):",
        "if False:",
    ),
    (
        "a prompt delays those that decode",
        SCHEDULER,
        "count = min(request.num_tokens - computed, left - self._num_decoding(i + 1))",
        "count = min(request.num_tokens - computed, left)",
    ),
    (
        "the queue forgets its tokens",
        WAITING,
        "        self.num_tokens -= request.num_tokens\n",
        "",
    ),
    (
        "drafts that do not stand count as computed",
        SCHEDULER,
        "request.num_computed_tokens = request.num_tokens - 1",
        "pass",
    ),
    (
        "drafts overrun the budget",
        SCHEDULER,
        "count = min(len(request.draft_token_ids), room, left)",
        "count = min(len(request.draft_token_ids), room)",
    ),
    (
        "drafts overrun the answer's length",
        SCHEDULER,
        "count = min(len(request.draft_token_ids), room, left)",
        "count = min(len(request.draft_token_ids), left)",
    ),
    (
        "drafts have no slots",
        SCHEDULER,
        "if stop <= request.next_kv_event or self.kv.allocate_slots(request, 1 + count):",
        "if True:",
    ),
    (
        "drafts come before prompts that wait",
        SCHEDULER,
        "        if self.waiting.num_tokens and self.num_preemptions == num_preemptions:\n",
        "        self._plan_drafts(planned, left)\n"
        "        left = self.max_num_batched_tokens\n"
        "        left -= sum(r.num_scheduled_tokens for r in planned)\n"
        "        if self.waiting.num_tokens and self.num_preemptions == num_preemptions:\n",
    ),
    (
        "somebody is preempted for a draft",
        SCHEDULER,
        "            # Allocate their slots.\n",
        "            if request.is_decoding:\n"
        "                count += min(len(request.draft_token_ids), left - 1)\n",
    ),
    (
        "blocks of rejected drafts are kept",
        SCHEDULER,
        "                    self.kv.give_back_slots(request, request.num_computed_tokens)\n",
        "",
    ),
    (
        "blocks of a draft model are not taken back",
        SCHEDULER,
        "self._take_from_drafts(planned) and self.kv.allocate_slots(request, count)",
        "False",
    ),
    (
        "a prompt waits for blocks of a draft model",
        SCHEDULER,
        "self._take_from_drafts(planned) and self.kv.admit(request, hit, count)",
        "False",
    ),
    (
        "drafts are published before they are verified",
        SCHEDULER,
        "            request.num_computed_tokens += request.num_scheduled_tokens\n",
        "            drafts = request.draft_token_ids[: request.num_scheduled_drafts]\n"
        "            request.num_computed_tokens += request.num_scheduled_tokens\n"
        "            request.output_token_ids += drafts\n"
        "            self.kv.publish(request)\n"
        "            del request.output_token_ids[len(request.output_token_ids) - len(drafts) :]\n",
    ),
    (
        "a window is trimmed for drafts",
        MANAGER,
        "self._leave_behind(held, request.num_computed_tokens)",
        "self._leave_behind(held, stop - 1)",
    ),
    (
        "a preempted request still decodes",
        SCHEDULER,
        "request.is_decoding, request.draft_token_ids = False, []",
        "request.draft_token_ids = []",
    ),
    (
        "tokens after the end are taken",
        SCHEDULER,
        "                    if reason is not None:\n                        break\n",
        "",
    ),
    (
        "equal priorities preempt each other",
        WAITING,
        "self._queue[0].priority < request.priority",
        "self._queue[0].priority <= request.priority",
    ),
    (
        "a higher priority waits for a sequence",
        SCHEDULER,
        "if by_priority and self.waiting.outranks(request):",
        "if False:",
    ),
    (
        "a higher priority is planned without a place",
        SCHEDULER,
        "if len(self.running) < self.max_num_seqs and self._admit(urgent, hit, count, planned):",
        "if self._admit(urgent, hit, count, planned):",
    ),
]

# (what, file, source text, what it becomes, the tests that should find it)
FAULTS = [
    (
        "memory in use is not subtracted from a control group's limit",
        "host_memory.py",
        "yield limit - max(0, in_use - cache)",
        "yield limit",
        "tests/unit/test_host_memory.py",
    ),
    (
        "only the root's control group is read",
        "control_groups.py",
        "for part in (own, *own.parents):",
        "for part in own.parents[-1:]:",
        "tests/unit/test_host_memory.py",
    ),
    (
        "ulimit -v is not read",
        "host_memory.py",
        "zip((resource.RLIMIT_AS, resource.RLIMIT_DATA), pages_used, strict=True)",
        "zip((resource.RLIMIT_DATA,), pages_used[1:], strict=True)",
        "tests/unit/test_host_memory.py",
    ),
    (
        "a tokenizer may be larger than its model",
        "engine/loader.py",
        "if tokenizer.text_vocab_size > self.model_config.vocab_size:",
        "if False:",
        "tests/engine/test_tokenizer_size.py",
    ),
    (
        "the KV cache takes all free memory",
        "engine/memory.py",
        "(free - block_bytes) // KV_SHARE // block_bytes",
        "(free - block_bytes) // block_bytes",
        "tests/engine/test_memory_plan.py",
    ),
    (
        "activations are not planned",
        "engine/memory.py",
        "        **step_bytes,\n",
        "",
        "tests/engine/test_memory_plan.py",
    ),
    (
        "activations of the native backend are planned for one token",
        "backends/native/backend.py",
        "self.isa, self.threads, num_tokens, num_logits, context)",
        "self.isa, self.threads, 1, num_logits, context)",
        "tests/engine/test_memory_plan.py",
    ),
    (
        "a file gets its name before its bytes are on the disk",
        "files.py",
        "    sync(scratch)\n",
        "",
        "tests/unit/test_files.py",
    ),
    (
        "a name is not on the disk when it is given",
        "files.py",
        "    sync(path.parent)\n",
        "",
        "tests/unit/test_files.py",
    ),
    (
        "the end of a file that was cut short is taken for zeros",
        "files.py",
        "            raise unread(file, offset + done, what)\n",
        "            break\n",
        "tests/models/test_file_faults.py",
    ),
    (
        "a broken scale is not noticed",
        "backends/native/backend.py",
        "check_finite(name, weight.finite)",
        "check_finite(name, True)",
        "tests/unit/test_finite_weights.py",
    ),
    (
        "a broken norm is not noticed",
        "backends/native/backend.py",
        "check_finite(name, bool(np.isfinite(vector).all()))",
        "pass",
        "tests/unit/test_finite_weights.py",
    ),
    (
        "a panic of a library passes",
        "tokenizer/tokenizer.py",
        'type(error).__name__ == "PanicException"',
        "False",
        "tests/unit/test_tokenizer_json.py",
    ),
    (
        "values of a template may be nested at any depth",
        "tokenizer/template_sandbox.py",
        "if depth >= MAX_NESTING:",
        "if False:",
        "tests/unit/test_chat_hostile.py",
    ),
    (
        "a read-only cache is refused",
        "weights/wheels.py",
        "    target = cache_dir / model.file\n",
        "    target = cache_dir / model.file\n    cache_dir.mkdir(parents=True, exist_ok=True)\n",
        "tests/unit/test_hub_wheels.py",
    ),
]
