"""What mkdocs is told beside its settings: pages that the navigation does not name, files of the root, notebooks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from notebook_pages import pages

ROOT = Path(__file__).parents[2]
FROM_ROOT = {"changes.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
"""Pages of the site that are files of the repository's root."""

TO_ROOT = {"../README.md": "index.md", **{f"../{source}": name for name, source in FROM_ROOT.items()}}
"""Where a link from a page to a file of the root leads on the site."""

NOTEBOOKS = pages(ROOT / "notebooks")
AFTER = "Use it"
"""The heading of the navigation after which notebooks come."""


def on_config(config: Any) -> Any:
    """Put pages that the navigation does not name under a heading of their own, so that none is lost."""
    named = set(re.findall(r"[\w-]+\.md", str(config["nav"])))
    written = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    config["nav"].append({"More": [name for name in (*written, *FROM_ROOT) if name not in named]})
    place = next(i for i, heading in enumerate(config["nav"], start=1) if AFTER in heading)
    notebooks = [{notebook.title: f"notebooks/{notebook.name}.md"} for notebook in NOTEBOOKS]
    config["nav"].insert(place, {"Notebooks": notebooks})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository's root, with links that hold on the site, and the notebooks."""
    for name, source in FROM_ROOT.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    for path, content in _of_notebooks():
        files.append(File.generated(config, f"notebooks/{path}", content=content))
    return files


def _of_notebooks() -> Iterator[tuple[str, str | bytes]]:
    """Each notebook as a page and as it is, and its pictures."""
    for notebook in NOTEBOOKS:
        yield f"{notebook.name}.md", notebook.text
        source = f"{notebook.name}.ipynb"
        yield source, (ROOT / "notebooks" / source).read_text(encoding="utf-8")
        yield from notebook.pictures.items()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead links to files of the root, and to notebooks, to their pages."""
    for link, name in TO_ROOT.items():
        markdown = markdown.replace(f"]({link})", f"]({name})")
    return re.sub(r"\]\(\.\./notebooks/(\w+)\.ipynb\)", r"](notebooks/\1.md)", markdown)
