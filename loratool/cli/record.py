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

    OUT is a folder that loratool made. Its files are compared with loratool.json first, and get the SHA-256 of all
    their bytes. SPDX and CycloneDX take the extra package: pip install "loratool[bom]".

    \b
    Examples:
      loratool record ./merged
      loratool record ./merged --format spdx
      loratool record ./merged --format cyclonedx
    """,
)
