"""A bill as CycloneDX 1.6, by the standard's own library: an ML-BOM, whose models are components of that kind.

The library has no model cards, so that of the output is put into what it has written.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

from loratool import __version__
from loratool.lazy import (
    cyclonedx,
    cyclonedx_bom,
    cyclonedx_component,
    cyclonedx_json,
    cyclonedx_license,
    purls,
)
from loratool.lineage.bill import Content, Part
from loratool.lineage.documents import address, facts_of, identity_of, license_id, moment


def document(bill: Part) -> dict[str, Any]:
    """The bill as an object of JSON."""
    identity = identity_of(bill)
    components = {id(part): component(part, f"part-{n}") for n, part in enumerate(bill.all)}
    for part in bill.all:
        if part.inputs:
            components[id(part)].pedigree = cyclonedx_component.Pedigree(
                ancestors=[named(each) for each in part.inputs]
            )
    root = components[id(bill)]
    bom = cyclonedx_bom.Bom(
        serial_number=uuid.UUID(identity[:32]), components=[components[id(part)] for part in bill.all[1:]]
    )
    bom.metadata.timestamp = moment()
    bom.metadata.component = root
    bom.metadata.tools.components.add(
        cyclonedx_component.Component(
            name="loratool", version=__version__, type=cyclonedx_component.ComponentType.APPLICATION
        )
    )
    for part in bill.all:
        bom.register_dependency(components[id(part)], [components[id(each)] for each in part.inputs])
    written: dict[str, Any] = json.loads(cyclonedx_json.JsonV1Dot6(bom).output_as_string())
    written["metadata"]["component"]["modelCard"] = card(bill)
    return written


def named(part: Part, reference: str | None = None) -> Any:
    """A part by its name, and where it is published."""
    purl = purls.PackageURL("huggingface", *part.repo.split("/"), part.revision or None) if part.repo else None
    return cyclonedx_component.Component(
        name=part.name,
        bom_ref=reference,
        type=cyclonedx_component.ComponentType.MACHINE_LEARNING_MODEL,
        version=part.revision or None,
        description=f"{part.kind}, {part.role}",
        purl=purl,
    )


def component(part: Part, reference: str) -> Any:
    """A part with all that is known of it, its files as components in it."""
    made = named(part, reference)
    if found := address(part):
        made.external_references.add(
            cyclonedx.ExternalReference(type=cyclonedx.ExternalReferenceType.DISTRIBUTION, url=cyclonedx.XsUri(found))
        )
    made.licenses.update(licences(part))
    made.properties.update(
        cyclonedx.Property(name=f"loratool:{name}", value=value) for name, value in facts_of(part).items()
    )
    made.components.update(inner(file, f"{reference}-file-{n}") for n, file in enumerate(part.files))
    return made


def licences(part: Part) -> Iterator[Any]:
    if known := license_id(part.license):
        yield cyclonedx_license.DisjunctiveLicense(id=known)
    elif part.license:
        url = cyclonedx.XsUri(part.license_link) if part.license_link.startswith("https://") else None
        yield cyclonedx_license.DisjunctiveLicense(name=part.license, url=url)


def inner(file: Content, reference: str) -> Any:
    """A file as a component."""
    hashes = [cyclonedx.HashType(alg=cyclonedx.HashAlgorithm.SHA_256, content=file.sha256)] if file.sha256 else []
    return cyclonedx_component.Component(
        name=file.name, bom_ref=reference, type=cyclonedx_component.ComponentType.FILE, hashes=hashes
    )


def card(bill: Part) -> dict[str, Any]:
    """The output's model card: what was measured of it."""
    datasets: dict[str, Any] = {"modelParameters": {"modelArchitecture": bill.kind}}
    if bill.gain is not None:
        measured = {"type": "gain: the part of the updates that rounding left", "value": f"{bill.gain:g}"}
        datasets["quantitativeAnalysis"] = {"performanceMetrics": [measured]}
    return datasets
