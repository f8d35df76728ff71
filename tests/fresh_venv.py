"""A virtual environment that shares other people's packages with this one, so that it is there at
once and offline, and has nothing of ours: that must come from wheels.

Also a command, for .ci/wheels: python tests/fresh_venv.py FOLDER
"""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path

OURS = ("fusion_zoo", "_fusion_zoo", "__editable__", "_editable", "zoo")


def fresh_venv(folder: Path) -> Path:
    """Make it, and give its Python; `-m pip` is among what is shared."""
    venv.create(folder, symlinks=True)
    shared = folder / "shared"
    shared.mkdir()
    for place in map(Path, sys.path):
        if any(place.glob("*.dist-info")):
            for entry in place.iterdir():
                link = shared / entry.name
                if (not entry.name.lower().startswith(OURS) and entry.suffix != ".pth"
                        and not link.is_symlink()):
                    link.symlink_to(entry)
    site = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    Path(site, "shared.pth").write_text(f"{shared}\n")
    return folder / "bin" / "python"


if __name__ == "__main__":
    fresh_venv(Path(sys.argv[1]).absolute())
