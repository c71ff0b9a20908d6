"""Pages whose examples run as they stand and print what the page shows, and whose errors are provoked."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

EXAMPLE = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)


class Page:
    """One page of ``docs/``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")

    def examples(self) -> Iterator[tuple[str, str, str | None]]:
        """The examples, each with the title it stands under and with its output, if the page shows it."""
        for section in re.split(r"^##+ ", self.text, flags=re.MULTILINE):
            for code, output in EXAMPLE.findall(section):
                yield section.splitlines()[0], code, output or None

    def parameters(self, heavy: Sequence[str] = ()) -> list[ParameterSet]:
        """Code and output of each example, for a test; those under ``heavy`` titles are left to `make test-heavy`."""
        found = list(self.examples())
        assert set(heavy) <= {title for title, *_ in found}
        return [
            pytest.param(code, output, id=title, marks=[pytest.mark.heavy] if title in heavy else [])
            for title, code, output in found
        ]

    def section(self, title: str) -> str:
        """What stands under a title, and after it."""
        return self.text.partition(f"## {title}\n")[2]

    def restart(self) -> tuple[str, str]:
        """The example of a restart, and what its second run prints."""
        code, shown = re.findall(r"```(?:python|text)\n(.*?)```", self.section("After a restart"), re.DOTALL)[
            :2
        ]
        return code, shown

    def errors(self) -> list[tuple[str, str]]:
        """The names of the page's errors and a part of what each says."""
        return re.findall(r"^\| `(\w+)` \| `(.+?)` \|", self.section("Troubleshooting"), re.MULTILINE)

    def check_errors(self, provoked: Sequence[Callable[[], object]], number: int) -> None:
        """Check that the error of this number in the page's table is raised, as the page has it."""
        told = self.errors()
        assert len(told) == len(provoked)
        name, says = told[number]
        # Warnings are errors in tests.
        with pytest.raises(Exception, match=re.escape(says)) as raised:
            provoked[number]()
        assert raised.type.__name__ == name


def printed(code: str, name: str = "example") -> str:
    """What an example prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, name, "exec"), {"__name__": "example"})
    return out.getvalue()
