"""What a verification found: comparisons, and whether every promise holds."""

from __future__ import annotations

from dataclasses import dataclass

from dissect.errors import VerificationError

__all__ = ["Check", "Report", "line"]


@dataclass(frozen=True)
class Check:
    """One comparison: the largest error, relative to the largest reference value, and what was allowed."""

    pair: str
    what: str
    error: float | None
    tolerance: float | None
    ok: bool
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The comparisons of one verification."""

    rows: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Every promise holds."""
        return all(row.ok for row in self.rows)

    def check(self) -> Report:
        """Raise :class:`~dissect.VerificationError` with the broken promises, if there are any; else return itself."""
        if not self.ok:
            broken = [row for row in self.rows if not row.ok]
            raise VerificationError(
                f"{len(broken)} of {len(self.rows)} promises do not hold:\n"
                + "\n".join(f"  {line(row)}" for row in broken)
            )
        return self

    def __str__(self) -> str:
        return "\n".join(line(row) for row in self.rows)


def line(row: Check) -> str:
    """One check as a line of text."""
    if row.error is None:
        error = "not compared"
    elif row.tolerance == float("inf"):
        error = f"{row.error:.1e} (measured, nothing is promised)"
    else:
        error = f"{row.error:.1e} (allowed {row.tolerance:.0e})"
    return f"{'ok  ' if row.ok else 'FAIL'}  {row.pair}: {row.what}: {error}" + (f"; {row.note}" if row.note else "")
