"""What a distribution says of itself on the package index: links that lead to the repository.

Where the repository is stands in the variable ``REPOSITORY_URL`` when a release is built. In a build without it the
links of the README stay as they are, relative to the repository, and no address is stated.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

BRANCH = "main"
PAGES = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}


class ReleaseMetadata(MetadataHookInterface):
    """Sets ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the project's metadata."""
        url = os.environ.get("REPOSITORY_URL", "").rstrip("/")
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, url)}
        metadata["urls"] = urls(url)


def urls(repository: str) -> dict[str, str]:
    """The project's addresses; none where the repository's is unknown."""
    if not repository:
        return {}
    pages = {name: f"{repository}/blob/{BRANCH}/{path}" for name, path in PAGES.items()}
    return {"Repository": repository, "Issues": f"{repository}/issues", **pages}


def absolute(text: str, repository: str) -> str:
    """A text whose relative links lead to the repository, and its pictures to their files there."""
    if not repository:
        return text
    text = re.sub(r"!\[([^]]*)\]\((?!\w+:|#)", rf"![\1]({repository}/raw/{BRANCH}/", text)
    return re.sub(r"(?<!!)\[([^]]*)\]\((?!\w+:|#)", rf"[\1]({repository}/blob/{BRANCH}/", text)
