"""Which files below a folder are images, links followed: one rule for training, prediction and caches."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from datasets.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".gif", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif",
              ".tiff", ".webp")
LEFT_BEHIND = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "#recycle", "@recycle", "lost+found",
               "$recycle.bin", "system volume information", "icon\r", "#snapshot", "@recently-snapshot", "@tmp",
              "found.000", "network trash folder", "temporary items", "ehthumbs_vista.db"}  # in lower case


@dataclass(kw_only=True)
class Listing:
    """What is below a folder: paths relative to it, in no particular order."""
    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)  # those in it, not those below
    left_out: Counter[str] = field(default_factory=Counter)  # files that are no images, by extension, and hidden names
    unreadable: dict[str, str] = field(default_factory=dict)  # links to nothing, closed folders, pipes: with the reason

    def add(self, entry: os.DirEntry[str], name: str) -> bool:
        """Sort one name in; whether it is a folder to look into."""
        extension = os.path.splitext(name)[1].lower()
        if is_hidden(entry.name):
            self.left_out["hidden"] += 1  # as one, whatever is in it
            return False
        try:
            if entry.is_dir():
                return True
            is_file = entry.is_file()
        except OSError as error:  # a link to itself, or into a folder that cannot be entered
            self.unreadable[name] = str(error.strerror)
            return False
        if entry.is_symlink() and not is_file and not os.path.exists(entry.path):
            self.unreadable[name] = "a link to nothing"
        elif extension not in EXTENSIONS:
            self.left_out[extension or "without extension"] += 1
        elif not is_file:
            self.unreadable[name] = "not a regular file"
        else:
            self.images.append(name)
        return False


def is_hidden(name: str) -> bool:
    """Whether a name counts for nothing: hidden, or left behind by an archive or a desktop."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def list_images(root: Path, *, flag: str = "") -> Listing:
    """All images below a folder; no file is opened. DataError, with the flag, if it cannot be read, or for a circle."""
    listing = Listing()
    pending: list[tuple[str, tuple[str, ...]]] = [("", ())]  # folders, each with where the links were that led to it
    while pending:
        folder, trail = pending.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    name = os.path.join(folder, entry.name)
                    if listing.add(entry, name):
                        if not folder:
                            listing.folders.append(name)
                        pending.append((name, follow(entry, trail) if entry.is_symlink() else trail))
        except OSError as error:
            if not folder:
                raise DataError(f"{flag}{root}: cannot be read ({error.strerror}); check its permissions") from None
            listing.unreadable[folder] = str(error.strerror)
    return listing


def follow(link: os.DirEntry[str], trail: tuple[str, ...]) -> tuple[str, ...]:
    """The trail after one more link; DataError if that leads back to where an earlier link was, or this one is."""
    target = os.path.realpath(link.path)
    trail = (*trail, os.path.realpath(os.path.dirname(link.path)))
    if any(os.path.commonpath([target, place]) == target for place in trail):
        raise DataError(f"{link.path}: is a link to {target}, a folder that holds it; remove it")
    return trail


def describe_left_out(counts: Counter[str]) -> str:
    """Such as `; left out: 8 .heic, 1 hidden`, the most frequent first; empty if nothing was."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "; left out: " + ", ".join(f"{count} {what}" for what, count in ordered) if ordered else ""


def find_images(path: Path) -> tuple[list[Path], Counter[str]]:
    """A file itself, whatever its name; or all images below a folder, sorted, with what was left out. What cannot be
    read is among them: reading it says why. DataError for nothing of that name, or no image in the folder."""
    if not os.path.isdir(path):
        if not os.path.lexists(path):
            raise DataError(f"{path}: no such file or folder; check the name")
        return [path], Counter()
    listing = list_images(path)
    found = sorted(path / name for name in (*listing.images, *listing.unreadable))
    if not found:
        raise DataError(f"{path}: holds no image ({' '.join(EXTENSIONS)}){describe_left_out(listing.left_out)}; name "
                        f"another folder")
    return found, listing.left_out
