"""What the cost of a step is worked out for: a device, and how much the step has to do.

It imports nothing heavy, for commands have these as arguments.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """What a device moves and computes in a second, and who says so."""

    bandwidth: float = 1.6e12  # bytes/s
    int8: float = 707.8e12  # operations/s, a multiplication and an addition being two
    half: float = 353.9e12  # float16 and bfloat16
    source: str = (
        "Atlas A2 with 64 GB: 1.6 TB/s (cann/ops-cv cross_platform_migration_guide); 24 cube cores "
        "at 1.8 GHz (CANN platform_config/Ascend910B2C.ini)"
    )
    link: float = 56e9  # bytes/s from a card to each other one
    # No document of the vendor's was found that has the rate; if 56 is of both ways, links are
    # half as fast and the bound still is one. HIXL measured 19.4 GB/s for a copy over one link.
    link_source: str = (
        "a link of 56 GB/s between any two of 8 cards, 392 GB/s a card: third parties have it so "
        "(arthurchiao.art, GPU notes 2, 2023)"
    )


@dataclass(frozen=True)
class Workload:
    """The sizes of a step."""

    batch: int = 1
    context: int = 8192
    block_size: int = 128
    chunk: int = 512
    cards: int = 1

    def new(self, phase: str) -> int:
        """The tokens that a step takes of each sequence."""
        return {"decode": 1, "chunk": min(self.chunk, self.context)}.get(phase, self.context)

    def size(self, phase: str, name: str) -> int:
        """A named size of a program (ir/types.py); N counts the blocks in use."""
        blocks = -(-self.context // self.block_size)
        if name.startswith("M") and name != "M":  # blocks that a window of so many tokens touches
            return min(blocks, -(-int(name[1:]) // self.block_size) + 1)
        sizes = {"T": self.batch * self.new(phase), "B": self.batch, "R": self.batch, "M": blocks}
        whole = {"L": self.batch * self.context, "N": self.batch * blocks, "S": self.block_size}
        return {**sizes, **whole}[name]
