"""Which blocks of the cache are free, whose the others are, and what those hold that may be used again.

A full block can be published under a key that stands for its contents (`engine.prefix`). It keeps them after its last
holder has gone, until the block is needed: those that nobody used for longest go first, and of one sequence's its last.
No tensors here.
"""

from __future__ import annotations

from collections import OrderedDict


class BlockPool:
    """A fixed number of blocks, each holding the keys and values of `block_size` tokens, each counting its holders."""

    def __init__(self, blocks: int, block_size: int) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks, not {blocks} of {block_size} tokens")
        self.total, self.block_size = blocks, block_size
        # Last freed, first used: its memory is warm, and blocks never used stay untouched.
        self._empty = list(range(blocks - 1, -1, -1))
        self._holders = [0] * blocks
        self._keys: list[bytes | None] = [None] * blocks
        self._published: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published, without a holder; longest unused first

    @property
    def free(self) -> int:
        """Return how many blocks can be taken: empty ones, and published ones that nobody holds."""
        return len(self._empty) + len(self._idle)

    @property
    def usage(self) -> float:
        """Return the share that sequences hold, 0 to 1."""
        return 1 - self.free / self.total

    def missing(self, held: int, tokens: int) -> int:
        """Return how many blocks `tokens` tokens need beyond the `held` ones."""
        return max(0, -(-tokens // self.block_size) - held)

    def grow(self, held: list[int], tokens: int) -> bool:
        """Extend `held` until it covers `tokens` tokens; False, and nothing changed, when too few are free."""
        need = self.missing(len(held), tokens)
        if need > self.free:
            return False
        for _ in range(need):
            block = self._empty.pop() if self._empty else self._evict()
            self._holders[block] = 1
            held.append(block)
        return True

    def release(self, held: list[int]) -> None:
        """Take all blocks of `held` back and empty it."""
        for block in reversed(held):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._keys[block] is None:
                    self._empty.append(block)
                else:
                    self._idle[block] = None
        held.clear()

    def publish(self, block: int, key: bytes) -> None:
        """Let others find a block that is held and full. Where one with the same contents is known, that stays."""
        if key not in self._published and self._keys[block] is None:
            self._published[key], self._keys[block] = block, key

    def find(self, key: bytes) -> int | None:
        """Return the block published under a key, now held once more, or None."""
        block = self._published.get(key)
        if block is not None:
            self._idle.pop(block, None)
            self._holders[block] += 1
        return block

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        key = self._keys[block]
        if key is not None:
            del self._published[key]
            self._keys[block] = None
        return block
