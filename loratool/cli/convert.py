"""`loratool convert`."""

from loratool.cli.options import ADAPTER, MAKING, OUT, PUSHING, library_command
from loratool.commands.convert import convert as function
from loratool.reworking.converting.convert import ConvertOptions

convert = library_command(
    function,
    ConvertOptions,
    ADAPTER,
    OUT,
    help="""Write the same adapter in another tool's dialect, and prove that it is the same.

    The output is read back and compared before it is published. What a dialect cannot express is refused, unless
    --accept-loss is passed.

    \b
    Examples:
      loratool convert ./my-adapter -o ./for-mlx --to mlx
      loratool convert ./style.safetensors -o ./for-diffusers --to diffusers
      loratool convert ./my-adapter -o ./to-serve --for vllm
    """,
    progress=MAKING["convert"],
    push_progress=PUSHING,
)
