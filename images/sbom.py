"""The software bill of materials of the image that this runs in, as CycloneDX 1.5 JSON on standard output.

    images/run_inside steps images/sbom.py NAME > sbom.json

It lists the interpreter, the installed Python distributions and the Debian packages, by their own metadata. What a
wheel carries inside (shared libraries, vendored modules) is a part of that wheel and not listed. It needs nothing but
the standard library, because it has to run in an image as it is.
"""

import json
import platform
import re
import sys
import uuid
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

DPKG_STATUS = Path("/var/lib/dpkg/status")


def python_components() -> list[dict[str, Any]]:
    """The interpreter and what is installed for it, sorted by name."""
    version = platform.python_version()
    interpreter = {
        "type": "platform",
        "bom-ref": f"python@{version}",
        "name": platform.python_implementation(),
        "version": version,
        "purl": f"pkg:generic/python@{version}",
    }
    found = {}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        purl = f"pkg:pypi/{name}@{quote(distribution.version)}"
        component: dict[str, Any] = {
            "type": "library",
            "bom-ref": purl,
            "name": name,
            "version": distribution.version,
            "purl": purl,
        }
        # An expression is SPDX by its definition; the older field is free text, sometimes the whole licence.
        if expression := distribution.metadata.get("License-Expression"):
            component["licenses"] = [{"expression": expression}]
        elif (text := distribution.metadata.get("License")) and len(text.splitlines()) == 1:
            component["licenses"] = [{"license": {"name": text}}]
        found.setdefault(name, component)  # the first one on the path is the one that is imported
    return [interpreter, *(found[name] for name in sorted(found))]


def debian_components(status: str, codename: str) -> list[dict[str, Any]]:
    """The installed packages of a dpkg status file."""
    components = []
    for paragraph in status.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, flags=re.MULTILINE))
        if not fields.get("Status", "").endswith(" installed"):
            continue
        name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
        distro = f"&distro={codename}" if codename else ""
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}{distro}"
        components.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    return components


def bill_of_materials(image: str) -> dict[str, Any]:
    """The whole document, for the image of this name."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    status = DPKG_STATUS.read_text(encoding="utf-8") if DPKG_STATUS.is_file() else ""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {"type": "container", "bom-ref": image, "name": image},
        },
        "components": python_components() + debian_components(status, codename),
    }


if __name__ == "__main__":
    json.dump(bill_of_materials(*sys.argv[1:]), sys.stdout, indent=1)
    print()
