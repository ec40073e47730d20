"""`loratool record`."""

import click

from loratool.cli.options import PATH, library_command
from loratool.commands.record import record as function
from loratool.lineage.recording import RecordOptions

record = library_command(
    function,
    RecordOptions,
    click.argument("out", type=PATH),
    help="""Print what an output was made of, as a bill of materials.

    OUT is a folder that loratool made. Its files are first compared with loratool.json and hashed with SHA-256.
    SPDX and CycloneDX need an extra package: pip install "loratool[bom]".

    \b
    Examples:
      loratool record ./merged
      loratool record ./merged --format spdx
      loratool record ./merged --format cyclonedx
    """,
)
