"""What forms of an int8 KV cache cost at least: with scales of the judged text itself, and others.

No calibration knows a text's ranges as well as the text does, so what scales made from it lose is a
floor of their form. It is no proof for every scale: none of these is chosen by the KL itself.

    min-max         each channel's scale: the text's largest value / 127; nothing is clipped
    least error     that times what of CLIPS has the least squared error: some is clipped
    pairs turned    min-max, and each RoPE pair of q and k turned by one more angle: scores stay,
                    and the angle has the least sum of q_c^2 step_c^2 over the pair's channels
    K with offsets  min-max, and K by both of its ends; an offset of K is free in softmax
    by token        a scale for each token and head, at run time
    V by token      min-max for K, by token for V

K and V are so rounded in the float model's own program in float32; all else is float. Two passes
over the text measure. With --w8a8 a directory is judged instead, by parts (floor_linears.py).
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from kvc8.backends.runtime import model as runtime
from kvc8.ir import ops
from kvc8.ir.capture.trace import capture
from kvc8.ir.checkpoint.reader import Checkpoint, open_checkpoint
from kvc8.ir.expression import make
from kvc8.ir.program import Program, argument
from kvc8.tools.benchmarks.rows import CacheLoss
from kvc8.tools.evaluator.divergence import Figures
from kvc8.tools.evaluator.windows import windows_of
from kvc8.tools.quantizer.transforms.pairs import STEP, at_each_angle, best_turns, turn_pairs

CLIPS = (1.0, 0.97, 0.94, 0.9, 0.86, 0.82, 0.78, 0.74, 0.7, 0.65, 0.6, 0.5)
BLOCK = 128  # tokens; a program may take any
Rounded = Callable[["JudgedCache", Tensor], Tensor]  # rows [T, H, D] to what the cache gives back


@dataclass
class JudgedCache:
    """What the text's own rows of a K or V cache are."""

    name: str  # of the cache: k_cache_0
    low: Tensor | None = None  # [H, D]
    high: Tensor | None = None
    errors: Tensor | None = None  # by clip, squared: [CLIPS, H, D]
    tops: Tensor | None = None  # of K at each angle: [ANGLES, H, D]
    power: Tensor | None = None  # of the queries of K at each angle: [ANGLES, H, D]

    @property
    def side(self) -> str:
        """Whether it holds k or v."""
        return self.name[0]

    @property
    def top(self) -> Tensor:
        """The largest value of each channel."""
        assert self.low is not None
        assert self.high is not None
        return self.high.maximum(-self.low)


def reach(cache: JudgedCache, rows: Tensor) -> Tensor:
    """First pass: how far rows reach; they stay as they are."""
    low, high = rows.amin(0), rows.amax(0)
    cache.low = low if cache.low is None else low.minimum(cache.low)
    cache.high = high if cache.high is None else high.maximum(cache.high)
    if cache.side == "k":
        tops = at_each_angle(rows, lambda x: x.abs().amax(0))
        cache.tops = tops if cache.tops is None else tops.maximum(cache.tops)
    return rows


def clip(cache: JudgedCache, rows: Tensor) -> Tensor:
    """Second pass: what each clip costs; rows stay as they are."""
    found = torch.stack([(symmetric(rows, cache.top * c) - rows).square().sum(0) for c in CLIPS])
    cache.errors = found if cache.errors is None else cache.errors + found
    return rows


def symmetric(rows: Tensor, top: Tensor) -> Tensor:
    """Rows through int8 where `top` has the code 127."""
    scale = (top / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round(rows / scale).clamp(-128, 127) * scale


def minmax(cache: JudgedCache, rows: Tensor) -> Tensor:
    """Each channel by its largest value."""
    return symmetric(rows, cache.top)


def least_error(cache: JudgedCache, rows: Tensor) -> Tensor:
    """Each channel by what costs least."""
    assert cache.errors is not None
    return symmetric(rows, cache.top * torch.tensor(CLIPS)[cache.errors.argmin(0)])


def pairs_turned(cache: JudgedCache, rows: Tensor) -> Tensor:
    """K's pairs are turned, rounded and turned back; V by its largest values."""
    if cache.side == "v":
        return minmax(cache, rows)
    assert cache.tops is not None
    assert cache.power is not None
    turns = best_turns(cache.tops, cache.power)
    top = cache.tops.gather(0, turns.repeat(1, 2)[None])[0]
    return turn_pairs(symmetric(turn_pairs(rows, turns * STEP), top), -turns * STEP)


def k_with_offsets(cache: JudgedCache, rows: Tensor) -> Tensor:
    """Each channel of K from its least to its largest value; V by its largest values."""
    if cache.side == "v":
        return minmax(cache, rows)
    assert cache.low is not None
    assert cache.high is not None
    middle = (cache.low + cache.high) / 2
    return symmetric(rows - middle, cache.high - middle) + middle


def by_token(_: JudgedCache, rows: Tensor) -> Tensor:
    """Each head of each token by its largest value."""
    return symmetric(rows, rows.abs().amax(-1, keepdim=True))


def v_by_token(cache: JudgedCache, rows: Tensor) -> Tensor:
    """K by its channels' largest values, V by its tokens' (KIVI, Liu et al. 2024)."""
    return minmax(cache, rows) if cache.side == "k" else by_token(cache, rows)


FORMS: Mapping[str, Rounded] = MappingProxyType(
    {
        "min-max": minmax,
        "least error": least_error,
        "pairs turned": pairs_turned,
        "K with offsets": k_with_offsets,
        "by token": by_token,
        "V by token": v_by_token,
    }
)
SIDES = MappingProxyType(  # of forms that share a side with another
    {"pairs turned": ("k", "kv"), "K with offsets": ("k", "kv"), "V by token": ("kv",)}
)


@dataclass
class CacheProbe:
    """What each cache of a program does to its rows, by the name of the cache."""

    caches: dict[str, JudgedCache] = field(default_factory=dict)
    sides: str = "kv"  # those that are rounded; others stay as they are
    form: Rounded = reach

    def put(self, program: Program) -> None:
        """Let the program's caches give back what the form makes of their rows."""
        for write in program.calls(ops.cache_write):
            name = argument(write, 0).name
            self.caches[name] = JudgedCache(name)
            write.target = self._write(self.caches[name])
        for call in program.calls(ops.paged_attention):
            keys = argument(argument(call, 1), 0).name
            call.target = self._attend(self.caches[keys])

    def _write(self, cache: JudgedCache) -> Callable[..., Tensor]:
        def write(pages: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
            rounded = self.form(cache, rows) if cache.side in self.sides else rows
            found: Tensor = ops.cache_write(pages, rounded, slots)
            return found

        return write

    def _attend(self, cache: JudgedCache) -> Callable[..., Tensor]:
        def attend(q: Tensor, *args: object, **kwargs: object) -> Tensor:
            if self.form is reach:
                assert cache.low is not None
                heads = q.unflatten(1, (len(cache.low), -1)).transpose(1, 2)
                power = at_each_angle(heads, lambda x: x.square().sum((0, 1)))
                cache.power = power if cache.power is None else cache.power + power
            found: Tensor = ops.paged_attention(q, *args, **kwargs)
            return found

        return attend


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what this benchmark takes."""
    parser.add_argument("model", type=Path, help="a float model")
    parser.add_argument("--w8a8", type=Path, help="judge this directory made of it, by parts")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8, help="of it; default: 8")
    parser.add_argument("--window", type=int, default=1024, help="tokens of one; default: 1024")


@torch.no_grad()
def rows(args: argparse.Namespace) -> list[CacheLoss]:
    """One row a form and side: K alone, V alone, both."""
    texts = windows_of(args.text, args.model, args.windows, args.window)
    checkpoint = open_checkpoint(args.model)
    program, probe = capture(checkpoint, torch.float32), CacheProbe()
    probe.put(program)
    logits = runner(program, checkpoint, args.window)
    for form in (reach, clip):
        probe.form = form
        for text in texts:
            logits(text)
    cases = [(name, sides) for name in FORMS for sides in SIDES.get(name, ("k", "v", "kv"))]
    figures = {case: Figures() for case in cases}
    alone = Figures()
    for text in texts:
        tokens = torch.tensor(text)
        probe.sides = ""
        reference = logits(text)
        alone.add_alone(reference, tokens)
        for (name, sides), seen in figures.items():
            probe.form, probe.sides = FORMS[name], sides
            seen.add(logits(text), reference, tokens)
    return [told(case, seen, alone.perplexity) for case, seen in figures.items()]


def runner(program: Program, checkpoint: Checkpoint, window: int) -> Callable[[list[int]], Tensor]:
    """What gives the logits of each token of a text of at most `window` tokens."""
    pages = range(-(-window // BLOCK))
    model = runtime.load(
        {"prefill": program, "decode": program},
        lambda expression: make(expression, checkpoint.read),
        blocks=len(pages),
        block_size=BLOCK,
    )
    return lambda text: model.prefill([text], [pages], every=True)


def told(case: tuple[str, str], seen: Figures, own: float) -> CacheLoss:
    """The row of a form and of what it rounds; `own` is the float model's perplexity."""
    change = round(seen.perplexity / own - 1, 6)
    return CacheLoss(*case, change, round(seen.kl_mean, 6), round(seen.kl_p99, 5), seen.top1)
