"""The page of settings is the one that the declarations make."""

from __future__ import annotations

from pathlib import Path

from support.settings_page import page


def test_the_page_of_settings_is_up_to_date() -> None:
    written = Path(__file__).parents[2] / "docs" / "settings.md"
    assert written.read_text(encoding="utf-8") == page(), (
        "python tests/support/settings_page.py > docs/settings.md"
    )
