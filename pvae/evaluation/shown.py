"""How results show themselves: a title, a table, and a verdict, as text and in notebooks."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Shown"]


class Shown:
    """A result of `title`, `summary` and `verdict`."""

    @property
    def title(self) -> str:
        """One line: what was found, of what."""
        raise NotImplementedError

    @property
    def verdict(self) -> str:
        """What may be said."""
        raise NotImplementedError

    def summary(self) -> "pd.DataFrame":
        """Its numbers, one row each."""
        raise NotImplementedError

    def __repr__(self) -> str:
        table = self.summary().to_string(float_format="{:.3f}".format, na_rep="")
        return f"{self.title}\n{table}\n{self.verdict}"

    def _repr_html_(self) -> str:
        table = self.summary().to_html(float_format="{:.3f}".format, na_rep="")
        return f"<p>{self.title}</p>{table}<p>{self.verdict}</p>"
