"""Which blocks of the cache are free, and whose the others are. No tensors here."""

from __future__ import annotations


class BlockPool:
    """A fixed number of blocks, each holding the keys and values of `block_size` tokens."""

    def __init__(self, blocks: int, block_size: int) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks, not {blocks} of {block_size} tokens")
        self.total, self.block_size = blocks, block_size
        # Last freed, first used: its memory is warm, and blocks never used stay untouched.
        self._free = list(range(blocks - 1, -1, -1))

    @property
    def free(self) -> int:
        """Return how many blocks are free."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """Return the share in use, 0 to 1."""
        return 1 - len(self._free) / self.total

    def missing(self, held: int, tokens: int) -> int:
        """Return how many blocks `tokens` tokens need beyond the `held` ones."""
        return max(0, -(-tokens // self.block_size) - held)

    def grow(self, held: list[int], tokens: int) -> bool:
        """Extend `held` until it covers `tokens` tokens; False, and nothing changed, when too few are free."""
        need = self.missing(len(held), tokens)
        if need > len(self._free):
            return False
        for _ in range(need):
            held.append(self._free.pop())
        return True

    def release(self, held: list[int]) -> None:
        """Take all blocks of `held` back and empty it."""
        self._free.extend(reversed(held))
        held.clear()
