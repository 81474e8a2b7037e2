"""Where the links of README, docs and the other pages lead. `python -m tests.links` asks the external ones, with a network.

A link into the repository must name a file that is there and, behind #, a heading of it. An external link must be https and of
a host that is listed here, so that a slip of the hand is seen without a network.
"""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tests import ROOT

#: Hosts that pages may link to.
HOSTS = {"github.com", "keepachangelog.com", "semver.org"}
#: Addresses on the reader's own machine, in examples.
LOCAL = {"127.0.0.1", "localhost"}
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_BARE = re.compile(r"https?://[^\s)>\"'`\]]+")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def pages() -> list[Path]:
    """Every Markdown file of the repository."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split()]


def targets(text: str) -> list[str]:
    """What the links of a page point to, in order, code left out."""
    return _LINK.findall(_CODE.sub("", _FENCE.sub("", text)))


def external(text: str) -> set[str]:
    """Addresses on the web that a page names, in links or bare, in code too; not those of the reader's machine."""
    found = {url.rstrip(".,;:") for url in _BARE.findall(text)}
    return {url for url in found if urllib.parse.urlsplit(url).hostname not in LOCAL}


def anchors(text: str) -> set[str]:
    """Names of a page's headings, as both the site and the code host's view of a repository make them."""
    names: list[str] = []
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "").lower()
        names.append(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain).strip()))
    return {name for name in names if names.count(name) == 1 and "--" not in name}


def wrong(page: Path, text: str) -> list[str]:
    """What is wrong with the links of a page, a line each."""
    found = []
    for target in targets(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = urllib.parse.unquote(target).partition("#")
        file = page if not path else page.parent / path
        if not file.exists() or not file.resolve().is_relative_to(ROOT):
            found.append(f"{page.relative_to(ROOT)} points to {target}, which is not there")
        elif anchor and (
            file.suffix != ".md" or anchor not in anchors(file.read_text(encoding="utf-8") if path else text)
        ):
            found.append(f"{page.relative_to(ROOT)} points to {target}; that page has no such heading")
    for url in sorted(external(text)):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "https" or parts.hostname not in HOSTS:
            found.append(f"{page.relative_to(ROOT)} names {url}; expected https and a host of tests/links.py")
    return found


def answer(url: str) -> str:
    """What a server says to an address: its status, or why there is none."""
    request = urllib.request.Request(url, headers={"User-Agent": "stagevar-tune, check of links"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return str(response.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError as error:
        return f"no answer ({error})"


def main() -> int:
    """Prints what is wrong and what each external address answers; 1 where anything is not as it should be."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    failures = [line for page, text in texts.items() for line in wrong(page, text)]
    print(*failures, sep="\n", end="\n" * bool(failures))
    for url in sorted({url for text in texts.values() for url in external(text)}):
        said = answer(url)
        print(f"{said:>4}  {url}")
        failures += [url] if said != "200" else []
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
