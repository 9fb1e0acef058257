"""The largest parts of the image that this runs in, in bytes of their files: packages, then the rest of the system.

images/run_inside steps images/largest_parts.py
"""

import os
import sysconfig
from collections import Counter
from pathlib import Path

NUMBER = 10
PACKAGES = Path(sysconfig.get_paths()["purelib"])


def part(path: Path) -> str:
    """What a file belongs to: a package with its shared libraries, or a folder of the base."""
    if path.is_relative_to(PACKAGES):
        return path.relative_to(PACKAGES).parts[0].removesuffix(".libs")
    return "/" + "/".join(path.parts[1:3])


def sizes() -> Counter[str]:
    """Bytes of each part; a file with several names counts once."""
    root = os.stat("/").st_dev
    seen: set[int] = set()
    found: Counter[str] = Counter()
    for folder, folders, files in os.walk("/"):
        folders[:] = [name for name in folders if os.lstat(os.path.join(folder, name)).st_dev == root]
        for name in files:
            path = os.path.join(folder, name)
            file = os.lstat(path)
            if file.st_nlink == 1 or file.st_ino not in seen:
                seen.add(file.st_ino)
                found[part(Path(path))] += file.st_size
    return found


if __name__ == "__main__":
    found = sizes()
    for name, size in found.most_common(NUMBER):
        print(f"{size / 1e6:8.1f} MB  {name}")
    print(f"{found.total() / 1e6:8.1f} MB  everything, {len(found)} parts")
