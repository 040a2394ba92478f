"""The adapters below a directory, each once, whatever links there are; and what is left out, with the reason.

What lies inside of an adapter belongs to it. A link to a directory is followed where it leads out of the library, and said: what
it leads to inside is found at its own place, and one that leads above would never end. Hidden directories are not looked into.
"""

import os
from pathlib import Path

from bslora_convert.errors import InputError
from bslora_convert.lora.adapter import CONFIG_NAME, WEIGHTS_NAMES


class Tree:
    """adapters: directories as they are seen from the root. notes: what was left out or lies elsewhere, each in a line."""

    def __init__(self, root: Path) -> None:
        self.adapters: list[Path] = []
        self.notes: list[str] = []
        self._root, self._home = root, root.resolve()
        self.lost: list[str] = []  # links to nothing: what was there may come back
        self._found: dict[Path, Path] = {}  # where an adapter really is -> as it is seen
        self._followed = {self._home}
        links = self._walk(root)
        while links:
            link = links.pop(0)
            if self._leads_to_more(link):
                links = sorted(links + self._walk(link))

    def _walk(self, top: Path) -> list[Path]:
        """Takes what is below a directory; returns links to directories, which are not followed yet."""
        links: list[Path] = []
        for here, folders, files in os.walk(top, onerror=_unreadable):
            folder = Path(here)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            if CONFIG_NAME in files:
                self._take(folder)
                folders.clear()
                continue
            weights = next((name for name in WEIGHTS_NAMES if name in files), None)
            if weights is not None:
                self._note(folder, f"{weights} without {CONFIG_NAME}, left out")
            linked = [name for name in folders if (folder / name).is_symlink()]
            links += [folder / name for name in linked]
            for name in sorted(files):
                if (folder / name).is_symlink() and not (folder / name).exists():
                    self._note(folder / name, "a link to nothing")
                    self.lost.append(self._seen(folder / name))
        return links

    def _take(self, adapter: Path) -> None:
        real = adapter.resolve()
        if real in self._found:
            self._note(adapter, f"the same as {self._seen(self._found[real])}, left out")
            return
        self._found[real] = adapter
        self.adapters.append(adapter)
        for config in sorted(adapter.rglob(CONFIG_NAME)):
            inside = config.parent.relative_to(adapter).parts
            if inside and not any(part.startswith(".") for part in inside):
                self._note(config.parent, f"inside of the adapter {self._seen(adapter)}, left out")

    def _leads_to_more(self, link: Path) -> bool:
        """Whether a link leads to a directory that is not looked into otherwise."""
        real = link.resolve()
        if real in self._found:
            self._note(link, f"a link to {self._seen(self._found[real])}, left out")
            return False
        if any(real == one or real in one.parents for one in self._followed):
            self._note(link, "a link to the library itself, or above what is in it, left out")
            return False
        inside = next((one for one in self._followed if one in real.parents), None)
        if inside is not None and not self._is_passed_by(real, inside):
            self._note(link, f"a link to {real.relative_to(inside)}, which is looked into at its own place, left out")
            return False
        self._followed.add(real)
        self._note(link, f"a link {'to where nobody looks' if inside else 'out of the library'}, followed: {real}")
        return True

    def _is_passed_by(self, real: Path, top: Path) -> bool:
        """Whether a walk through `top` does not come to a directory: it is hidden, or inside of an adapter."""
        hidden = any(part.startswith(".") for part in real.relative_to(top).parts)
        return hidden or any(above in self._found for above in real.parents)

    def _note(self, path: Path, said: str) -> None:
        self.notes.append(f"{self._seen(path)}: {said}")

    def _seen(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix() if path != self._root else path.resolve().name


def _unreadable(error: OSError) -> None:
    """A directory that can't be read is no empty one: whoever is in it would leave the library.

    :raises InputError: naming it.
    """
    raise InputError(f"{error.filename}: can't be read ({error.strerror or error}); nothing was changed")
