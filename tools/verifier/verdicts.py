"""What the check of a pass found: each value that was compared, and the sentence of a breach."""

from dataclasses import dataclass, field

from kvc8.ir.errors import IRError
from kvc8.tools.verifier.gaps import CodeGap, Gap


@dataclass(frozen=True)
class ComparedValue:
    """One value that was compared: the largest difference beyond its bound, or else the largest."""

    phase: str
    layer: str
    node: str
    old: str
    figure: float
    bound: float
    call: int  # the number of its call
    own: Gap | CodeGap  # from what it was, in the program's own dtypes; not judged

    @property
    def holds(self) -> bool:
        """Whether it is within its bound."""
        return self.figure <= self.bound


@dataclass
class Verdict:
    """What the check of one pass found. `refused` is why verify refused what it gave."""

    name: str
    contract: str
    sites: list[ComparedValue] = field(default_factory=list)
    kept: int = 0  # values that no pass touched, found equal to the last bit
    refused: IRError | None = None
    node: str = ""  # that verify refused

    @property
    def breaches(self) -> list[ComparedValue]:
        """Sites beyond their bound, the first offender first."""
        return [site for site in self.sites if not site.holds]

    @property
    def worst(self) -> ComparedValue | None:
        """The first breach, or the site that comes nearest to its bound."""
        ranked = sorted(self.sites, key=lambda s: -(s.figure / s.bound if s.bound else s.figure))
        return next(iter([*self.breaches, *ranked]), None)

    @property
    def error(self) -> IRError | None:
        """What is wrong, if anything."""
        if self.refused:
            return self.refused.within(self.name)
        if not self.breaches:
            return None
        site = self.breaches[0]
        where = f"breaks its contract {self.contract} in {site.layer}, {site.phase}"
        what = f"{site.node} differs from {site.old} by {site.figure:.3g}, bound {site.bound:.3g}"
        return IRError(
            self.name, f"{where}: {what}", "see its repro by kvc8-verify passes --bisect"
        )

    @property
    def sentence(self) -> str:
        """The same as text; "" where nothing is wrong."""
        return str(self.error or "")
