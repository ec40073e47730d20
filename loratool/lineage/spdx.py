"""A bill as SPDX 3.0.1 in JSON-LD, by the bindings that SPDX makes of its model; models have the AI profile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from typing import Any

from loratool import __version__
from loratool.lazy import spdx
from loratool.lineage.bill import Part
from loratool.lineage.documents import address, facts_of, identity_of, license_id, moment


class Writer:
    """The elements of a document, each under an address of its own."""

    def __init__(self, identity: str) -> None:
        self.home = f"urn:loratool:{identity}"
        self.elements: list[Any] = []
        self.licenses: dict[str, Any] = {}
        self.about = spdx.CreationInfo(_id="_:creation", specVersion="3.0.1", created=moment())
        self.about.createdBy.append(self.add("agent", spdx.SoftwareAgent, name=f"loratool {__version__}").spdxId)

    def add(self, key: str, kind: Any, **fields: Any) -> Any:
        """A new element."""
        made = kind(spdxId=f"{self.home}#{key}", creationInfo=self.about, **fields)
        self.elements.append(made)
        return made

    def relate(self, kind: str, one: Any, others: Sequence[Any]) -> None:
        """A new relationship of an element to others."""
        if others:
            self.add(
                f"relationship-{len(self.elements)}",
                spdx.Relationship,
                from_=one,
                to=[*others],
                relationshipType=getattr(spdx.RelationshipType, kind),
            )

    def model(self, part: Part, name: str) -> Any:
        """A part with its files, licence and inputs."""
        made = self.add(
            name,
            spdx.ai_AIPackage,
            name=part.name,
            software_primaryPurpose=spdx.software_SoftwarePurpose.model,
            ai_typeOfModel=["low-rank adapter" if part.kind == "adapter" else "model"],
        )
        if part.revision:
            made.software_packageVersion = part.revision
        if found := address(part):
            made.software_downloadLocation = found
        made.ai_hyperparameter = [spdx.DictionaryEntry(key=k, value=v) for k, v in facts_of(part).items()]
        if part.gain is not None:
            made.ai_metric = [spdx.DictionaryEntry(key="gain", value=f"{part.gain:g}")]
        self.relate("contains", made, [self.file(file, f"{name}-file-{n}") for n, file in enumerate(part.files)])
        if part.license:
            self.relate("hasDeclaredLicense", made, [self.license(part.license)])
        self.relate("descendantOf", made, [self.model(each, f"{name}-{n}") for n, each in enumerate(part.inputs)])
        return made

    def file(self, file: Any, name: str) -> Any:
        """A file with its digest."""
        made = self.add(name, spdx.software_File, name=file.name)
        if file.sha256:
            made.verifiedUsing = [spdx.Hash(algorithm=spdx.HashAlgorithm.sha256, hashValue=file.sha256)]
        return made

    def license(self, name: str) -> Any:
        """A licence: an expression of SPDX, or a text where its list does not have it."""
        if name not in self.licenses:
            number, known = f"license-{len(self.licenses)}", license_id(name)
            self.licenses[name] = (
                self.add(number, spdx.simplelicensing_LicenseExpression, simplelicensing_licenseExpression=known)
                if known
                else self.add(number, spdx.simplelicensing_SimpleLicensingText, simplelicensing_licenseText=name)
            )
        return self.licenses[name]


def document(bill: Part) -> dict[str, Any]:
    """The bill as an object of JSON."""
    writer = Writer(identity_of(bill))
    root = writer.model(bill, "output")
    every = [*writer.elements]
    profiles = ("core", "software", "ai", "simpleLicensing")
    writer.add(
        "document",
        spdx.SpdxDocument,
        name=bill.name,
        profileConformance=[getattr(spdx.ProfileIdentifierType, each) for each in profiles],
        rootElement=[root],
        element=every,
    )
    objects = spdx.SHACLObjectSet()
    for element in writer.elements:
        objects.add(element)
    stream = BytesIO()
    spdx.JSONLDSerializer().write(objects, stream)
    written: dict[str, Any] = json.loads(stream.getvalue())
    return written
