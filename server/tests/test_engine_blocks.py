"""Whatever is cancelled, preempted, paused or guessed: tokens are right, departments apart, and no block is lost."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from toy import VOCABULARY, answer, drain, submit, toy_engine

from nioserve.models.cache import BLOCK_SIZE

DEPARTMENTS = ("cardiology", "oncology")
# Few beginnings, so that requests share them; departments ask the same.
BEGINNINGS = [[(n * k) % VOCABULARY for n in range(48)] for k in (1, 3)]


class EngineMachine(RuleBasedStateMachine):
    """Drives an engine by requests, cancellations and steps, and looks at every block after each."""

    @initialize(
        seats=st.integers(1, 5),
        spare=st.integers(0, 60),
        blocks=st.sampled_from([8, 12, 24, 50]),
        guesses=st.sampled_from([0, 3]),
    )
    def start(self, seats, spare, blocks, guesses):
        self.engine = toy_engine(
            max_num_seqs=seats, max_num_batched_tokens=seats + spare, kv_cache_tokens=blocks * BLOCK_SIZE,
            speculate_tokens=guesses, speculate_max_num_seqs=3,
        )  # fmt: skip
        self.expected: dict[str, list[int]] = {}
        self.got: dict[str, list[int]] = {}
        self.writers: dict[int, str] = {}
        self._watch()

    def _watch(self):
        """Note who writes each block, and that nobody reads what another department wrote."""
        schedule = self.engine.scheduler.schedule

        def watched():
            slices = schedule()
            for part in slices:
                sequence, first = part.sequence, part.sequence.computed // BLOCK_SIZE
                for block in sequence.blocks[:first]:
                    assert self.writers[block] == sequence.department
                if sequence.computed % BLOCK_SIZE:
                    assert self.writers[sequence.blocks[first]] == sequence.department
                last = (sequence.computed + part.count + len(part.drafts) - 1) // BLOCK_SIZE
                for block in sequence.blocks[first : last + 1]:
                    self.writers[block] = sequence.department
            budget = self.engine.limits.max_num_batched_tokens
            assert sum(part.count + len(part.drafts) for part in slices) <= budget
            assert slices or not self.engine.scheduler.has_work, "it stands still"
            return slices

        self.engine.scheduler.schedule = watched

    @rule(
        departments=st.lists(st.sampled_from(DEPARTMENTS), min_size=1, max_size=4),
        beginning=st.sampled_from(BEGINNINGS), shared=st.sampled_from([0, 16, 32, 48]), rest=st.integers(0, 20),
        length=st.sampled_from([1, 20, 60]), long=st.booleans(),
    )  # fmt: skip
    def ask(self, departments, beginning, shared, rest, length, long):
        prompt = beginning[:shared] + [(shared + rest) % VOCABULARY] * rest or [1]
        for department in departments:
            name = str(len(self.expected))
            assert submit(self.engine, name, prompt, length, department=department, long_conversation=long) is None
            self.expected[name] = answer(prompt, length)

    @rule(number=st.integers(0, 50))
    def cancel(self, number):
        self.engine.cancel(b"w", str(number))
        if str(number) in self.expected and len(self.got.get(str(number), [])) < len(self.expected[str(number)]):
            self.expected[str(number)] = self.got.get(str(number), [])

    @rule(count=st.integers(1, 12))
    def run(self, count):
        for _ in range(count):
            if self.engine.has_work:
                self._take(self.engine.step().outputs)

    def _take(self, outputs):
        for output in outputs.get(b"w", []):
            self.got.setdefault(output.request_id, []).extend(output.tokens)

    @invariant()
    def every_block_is_counted(self):
        if not hasattr(self, "engine"):
            return
        scheduler, pool = self.engine.scheduler, self.engine.scheduler.pool
        held = Counter(block for sequence in scheduler.sequences for block in sequence.blocks)
        assert [held[block] for block in range(pool.total)] == pool._holders
        assert len(held) + pool.free == pool.total
        free = [*pool._empty, *pool._idle]
        assert len(set(free)) == len(free)
        assert not set(free) & set(held)
        assert {pool._keys[block]: block for block in range(pool.total) if pool._keys[block]} == pool._published
        assert len(scheduler.running) <= self.engine.limits.max_num_seqs
        assert sum(queue.running for queue in scheduler.queues) == len(scheduler.running)
        holding = [one for queue in scheduler.queues for one in queue.waiting if one.blocks]
        assert set(holding) == set(scheduler._paused)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        for name, tokens in drain(self.engine).items():
            self.got.setdefault(name, []).extend(tokens)
        assert {name: self.got.get(name, []) for name in self.expected} == self.expected
        assert self.engine.scheduler.pool.free == self.engine.scheduler.pool.total


EngineMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
TestEngine = EngineMachine.TestCase
