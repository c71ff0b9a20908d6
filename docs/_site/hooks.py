"""What mkdocs is told beside its settings: pages that the navigation does not name, and files of the root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
FROM_ROOT = {"changes.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages of the site that are files of the repository's root."""

TO_ROOT = {"../README.md": "index.md", **{f"../{source}": name for name, source in FROM_ROOT.items()}}
"""Where a link from a page to a file of the root leads on the site."""


def on_config(config: Any) -> Any:
    """Put pages that the navigation does not name under a heading of their own, so that none is lost."""
    named = set(re.findall(r"[\w-]+\.md", str(config["nav"])))
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    config["nav"].append({"More": [name for name in (*pages, *FROM_ROOT) if name not in named]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository's root, with links that hold on the site."""
    for name, source in FROM_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to files of the root to their pages."""
    for link, name in TO_ROOT.items():
        markdown = markdown.replace(f"]({link})", f"]({name})")
    return markdown
