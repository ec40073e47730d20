"""The commands that make something, for those that repeat them."""

from __future__ import annotations

from loratool.commands.combine import combine
from loratool.commands.compress import compress
from loratool.commands.convert import convert
from loratool.commands.expand import expand
from loratool.commands.extract import extract
from loratool.commands.merge import MergeAndPushOptions, merge
from loratool.commands.rebase import rebase
from loratool.commands.rescale import rescale
from loratool.commands.resize import resize
from loratool.lineage.makers import Maker, Makers
from loratool.reworking.combine_options import CombineOptions
from loratool.reworking.compressing.compress import adapters_at
from loratool.reworking.compressing.options import CompressOptions, ExpandOptions
from loratool.reworking.converting.convert import ConvertOptions
from loratool.reworking.extracting.options import ExtractOptions
from loratool.reworking.rebasing.rebase import RebaseOptions
from loratool.reworking.rescale import RescaleOptions
from loratool.reworking.resize import ResizeOptions

MAKERS: Makers = {
    "merge": Maker(merge, ("base", "adapters*"), MergeAndPushOptions),
    "rescale": Maker(rescale, ("adapter",), RescaleOptions),
    "resize": Maker(resize, ("adapter",), ResizeOptions),
    "combine": Maker(combine, ("adapters*",), CombineOptions),
    "convert": Maker(convert, ("adapter",), ConvertOptions),
    "extract": Maker(extract, ("base", "tuned"), ExtractOptions),
    "compress": Maker(compress, ("adapters*",), CompressOptions, listed=adapters_at),
    "expand": Maker(expand, ("shared", "name"), ExpandOptions, words=frozenset({"name"})),
    "rebase": Maker(rebase, ("adapter",), RebaseOptions),
}
