"""What `mkdocs.yml` needs beside the pages: README.md and its neighbors as pages, and links that leave docs/."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


ROOT = Path(__file__).resolve().parents[1]
# Pages that the repository has in its root, and their names on the site.
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(\]\()(?!https?://|mailto:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for name, page in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Let relative links lead to pages of the site, and those to other files of the repository to GitHub."""
    names = {page: name for name, page in ROOT_PAGES.items()}
    source = ROOT / names.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    depth = "../" * page.file.src_uri.count("/")

    def target(match: re.Match[str]) -> str:
        path = (source.parent / match[2]).resolve().relative_to(ROOT).as_posix()
        if path in ROOT_PAGES:
            return f"{match[1]}{depth}{ROOT_PAGES[path]}"
        if path.startswith("docs/") and (ROOT / path).is_file():
            return f"{match[1]}{depth}{path.removeprefix('docs/')}"
        return f"{match[1]}{config.repo_url}/blob/main/{path}"

    return LINK.sub(target, markdown)
