"""The rows of benchmarks' tables: each prints itself as a line; its fields are what JSON has."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """What a candidate took of one case: a step, or a run."""

    case: str
    candidate: str
    ms: float  # the median of the turns
    ratio: float  # to the case's first candidate, or of the whole that this is part of
    threads: int
    turns: int

    def __str__(self) -> str:
        return f"{self.case:>16}  {self.candidate:<26} {self.ms:>9} ms  {self.ratio:>7}x"


@dataclass(frozen=True)
class CommandCost:
    """What a command took: medians of the turns."""

    case: str
    candidate: str
    cpu_s: float  # of user time
    peak_mb: int  # resident
    ratio: float  # of user time to the first candidate's
    threads: int
    turns: int

    def __str__(self) -> str:
        cost = f"{self.cpu_s:>7} s of user CPU  {self.peak_mb:>6} MB"
        return f"{self.candidate:<26} {cost}  {self.ratio:>7}x"


Seconds = tuple[float, float]  # of user time, and of wall time


@dataclass(frozen=True)
class Stages:
    """What each stage of a compile took: medians of the turns."""

    model: str
    imports: Seconds
    headers: Seconds
    capture: Seconds
    passes: Seconds
    write: Seconds
    all: Seconds  # and the start and the end of the interpreter
    peak_mb: int  # resident

    def __str__(self) -> str:
        each = (*(getattr(self, name) for name in STAGES), self.all)
        cells = ["/".join(f"{x:.1f}" for x in seconds).rjust(9) for seconds in each]
        return " ".join([self.model.ljust(14), *cells, f"{self.peak_mb:>5}"])


STAGES = ("imports", "headers", "capture", "passes", "write")
STAGES_HEAD = " ".join(
    ["user/wall s".ljust(14), *(name.rjust(9) for name in (*STAGES, "all")), "   MB"]
)


@dataclass(frozen=True)
class CacheLoss:
    """What rounding the cache, or a model, one way costs, against the float model."""

    scales: str
    rounded: str  # k, v or kv; of W8A8 w, wc, wa or wac (floor_linears.py)
    perplexity_change: float
    kl_mean: float  # nats
    kl_p99: float
    top1: float  # the share of tokens whose likeliest next token is the float model's

    def __str__(self) -> str:
        what = f"{self.scales:<16} {self.rounded:>3}  perplexity {self.perplexity_change:+.3%}"
        kl = f"KL {self.kl_mean:.5f}, 99 % {self.kl_p99:.4f}"
        return f"{what}  {kl}  top-1 {self.top1:.2%}"


Row = Timing | CommandCost | Stages | CacheLoss
