"""The blocks of a paged KV cache: which are free, and how many sequences have each other one."""

from collections.abc import Iterable

from kvc8.ir.errors import TargetError


class Blocks:
    """Hands out the numbers of blocks, 0 to count - 1, and takes them back from their last user."""

    def __init__(self, count: int, block_size: int) -> None:
        self.count, self.block_size = count, block_size
        self.most_used = 0
        self._free = list(range(count - 1, -1, -1))
        self._users: dict[int, int] = {}  # of each block that somebody has

    @property
    def free(self) -> int:
        """How many blocks nobody has."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many blocks somebody has."""
        return len(self._users)

    def needed(self, tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """Give `count` blocks that nobody has. Raises TargetError where there are fewer."""
        if count > self.free:
            raise TargetError(
                "KV cache", f"{count} blocks wanted and {self.free} free", "ask for more"
            )
        taken = [self._free.pop() for _ in range(count)]
        self._users.update(dict.fromkeys(taken, 1))
        self.most_used = max(self.most_used, self.used)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Let one more have blocks that somebody has."""
        for block in blocks:
            self._users[block] += 1

    def give_back(self, blocks: Iterable[int]) -> list[int]:
        """Take blocks back; gives those that nobody has now.

        Raises TargetError at one that nobody had.
        """
        freed = []
        for block in blocks:
            if block not in self._users:
                raise TargetError("KV cache", f"block {block} is free already", "give it back once")
            self._users[block] -= 1
            if not self._users[block]:
                del self._users[block]
                self._free.append(block)
                freed.append(block)
        return freed
