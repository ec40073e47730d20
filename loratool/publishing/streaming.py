"""`stream()`: a merge whose output goes to the Hub file by file, for disks smaller than the model.

For each output file: fetch its source, merge it, upload it, delete both. A journal in the repository tells which
files of which plan are there, in the same commit as the file itself; the last commit brings index, config and card
and takes the journal away. So the repository cannot be loaded before it is whole, and a run that was interrupted
asks it what is left to do.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import stored_tensors
from loratool.adapters.formats.known import PEFT_CONFIG
from loratool.arguments import PathLike, Progress, several
from loratool.errors import HubError, InputError, UsageError, VerificationError, printable
from loratool.fetching import HubPath, local
from loratool.fetching.bases import chosen_base, told_choice
from loratool.fetching.client import endpoint
from loratool.fetching.outline import Remote, look_up, read_small
from loratool.fetching.pieces import BaseFiles, bring, opened
from loratool.files.digests import Digest, is_hex, read_recorded, why_unlike
from loratool.files.folders import CARD, MODEL_INDEX, PROVENANCE, REMOTE_JOURNAL, LeftOut
from loratool.files.journal import FETCHED, MODEL, FinishedShard
from loratool.files.open_sources import OpenSources
from loratool.files.outputs import as_json, check_stage
from loratool.files.pipelines import identities, is_index, itself
from loratool.files.shard_writer import LocalFolder
from loratool.files.staging import Stage, check_space, workplace
from loratool.files.untrusted import json_object
from loratool.lazy import installed
from loratool.merging.engine import Engine
from loratool.merging.fingerprints import content_fingerprint
from loratool.merging.gain import Gains
from loratool.merging.inputs import check_all_there, planned, read_all
from loratool.merging.merge import NOTHING, check_values, repeated
from loratool.merging.merge_options import MergeOptions
from loratool.merging.reporting import cost, describe
from loratool.merging.resources import check_limit, runtime_for
from loratool.merging.small_files import write_small_files
from loratool.merging.tasks import Job
from loratool.provenance.inputs import ModelDigests, told_model, weights_of
from loratool.publishing.committing import Commit, Upload, check, commit, files_of, full_name, open_repo
from loratool.publishing.options import CommitOptions
from loratool.publishing.selecting import KNOWN, UNKNOWN, check_message, check_secrets, matches, never
from loratool.results.stream import StreamReport

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from loratool.fetching.answers import RemoteFile
    from loratool.files.safefile import SafeFile
    from loratool.merging.output_layout import ShardPlan
    from loratool.merging.plan import Plan
    from loratool.notes import Note
    from loratool.results.base import Cost
    from loratool.results.merge import AdapterEffect

COPIES = "the repository contains only copies of the base's weights, so delete it"


@dataclass(frozen=True, kw_only=True)
class StreamOptions(MergeOptions, CommitOptions):
    """Of a merge whose files go to the Hub one by one."""


def check_fits_streaming(options: StreamOptions) -> None:
    """Raise `UsageError` for options that a merge without an output folder has no use for."""
    if options.shard_size is not None:
        raise UsageError("a streaming merge keeps the base's shards, so it does not take --shard-size")
    if options.verify or options.sha256:
        flag = "--verify" if options.verify else "--sha256"
        raise UsageError(
            f"a streaming merge does not take {flag}: the Hub knows the SHA-256 of every file, and it is compared"
        )


def stream(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    repo: str,
    options: StreamOptions,
    progress: Progress | None = None,
) -> StreamReport:
    """Merge, and upload each output file before the next is made; `loratool.commands.stream` says all of it."""
    started = time.monotonic()
    check_fits_streaming(options)
    check_message(options.message)
    words = several(adapters)
    ways = options.readings(len(words))
    check_all_there(base, words)
    paths = [local(adapter, "adapter") for adapter in words]
    repo = repo if options.dry_run else full_name(repo)  # so that a long way is not gone in vain
    with ExitStack() as stack:
        home = Path.cwd() / f"{Path(repo).name or 'merged'}.streaming"
        check_stage(home)
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loratool-")))
        draft = stack.enter_context(workplace(temporary / home.name))
        # a dry run, or one that is refused, makes nothing in the working directory
        stage = cache(lambda: draft if options.dry_run else stack.enter_context(workplace(home)))
        source = stack.enter_context(opened(chosen := chosen_base(base, paths), lambda name: stage().place_for(name)))
        plan = planned(told_choice(source.checkpoint, base, chosen), read_all(paths, ways), options)
        runtime = runtime_for(plan.spans, options)
        check_values(plan)
        invoked = repeated(plan, paths, options, f" --stream --push-to-hub {repo}")
        others = partial(small_files, plan, repo=repo, options=options)
        early = [  # a secret is found before anything is sent
            *others(draft, invoked),
            *(Upload(shard.name, content=shard.layout.header) for shard in plan.shards),
        ]
        notes = [*plan.notes, *check_secrets(plan.base.name, early, options.allow_secret)]
        digests = [adapter.digests() for adapter in plan.adapters]
        check_space(Path.cwd(), most_on_disk(plan, plan.shards))
        report = expected(plan, repo, options, notes, cost(runtime, started))
        if options.dry_run:
            return report
        check_limit(plan.spans, runtime.result(), options)
        private = open_repo(repo, options.public, options.revision, notes)[1]
        name = fingerprint(plan, source, digests, options.device)
        there = Repository(repo, options.revision, plan, name, stage())
        done = there.begin(options.overwrite)
        effects: tuple[AdapterEffect, ...] = ()
        gains = Gains(None, {})
        resumed = tuple(sorted(there.finished))
        if done is None:
            Engine([Job(plan, there)], runtime, options.threads, options.max_memory, progress).run()
            unchanged = f"{printable(repo)}: not completed, {NOTHING}; {COPIES}"
            merged = describe(plan, there.finished, digests, invoked, unchanged)
            notes, effects, gains = [*notes, *there.doubts, *merged.notes], merged.effects, merged.gains
            last = others(there.stage, with_base(merged.table, source) | {"plan": name})
            done = there.end(last, options.message or "Merge with loratool")
        return replace(
            report,
            url=done.url,
            commit=done.oid,
            private=private,
            adapters=effects,
            resumed=resumed,
            most_on_disk=there.most,
            gain=gains.total,
            gains=gains.modules,
            notes=tuple(notes),
            digests={s.name: str(s.digest) for _, s in sorted(there.finished.items())},
            cost=cost(runtime, started),
        )


def with_base(table: Mapping[str, Any], source: BaseFiles) -> dict[str, Any]:
    """A record with the entry of a base whose files come one by one; the Hub tells the SHA-256 of each."""
    model = source.checkpoint
    told = told_model(model, ModelDigests.of(model, compute=False))
    for (name, file), sha256 in zip(weights_of(model).items(), source.contents(), strict=True):
        if is_hex(sha256):
            told["files"][name] = Digest(file.layout.size, sha256).record()
    return {**table, "base": {**table["base"], **told}}


def expected(plan: Plan, repo: str, options: StreamOptions, notes: Sequence[Note], cost: Cost) -> StreamReport:
    """What a streaming merge would do."""
    return StreamReport(
        repo=repo,
        url="",
        commit="",
        private=not options.public,
        edited=len(plan.edited),
        adapters=(),
        copied=plan.copied,
        files=len(plan.shards),
        bytes_written=plan.bytes_written,
        resumed=(),
        most_on_disk=most_on_disk(plan, plan.shards),
        gain=None,
        gains={},
        left_out=(
            *plan.left_out,
            *(str(LeftOut(f.name, why)) for f in plan.side_files if (why := why_kept(f.name, options.exclude))),
        ),
        notes=tuple(notes),
        digests={},
        dry_run=options.dry_run,
        cost=cost,
    )


def sources_of(plan: Plan, shard: ShardPlan) -> list[SafeFile]:
    """The base's files that an output file is made of, those with a weight on which a bias depends among them."""
    own = identities(plan.base.shards)
    edits = (edit for span in shard.spans for edit in span.edits)
    beside = (tensor for edit in edits for tensor in stored_tensors(edit.update))
    every = (*(tensor for span in shard.spans for tensor in span.weight.tensors), *beside)
    files = {id(itself(tensor.file)): itself(tensor.file) for tensor in every}
    return [file for key, file in files.items() if key in own]


def most_on_disk(plan: Plan, shards: Iterable[ShardPlan]) -> int:
    """Bytes of the largest of some output files and its source together."""
    return max(s.layout.size + sum(int(file.layout.size) for file in sources_of(plan, s)) for s in shards)


def fingerprint(plan: Plan, source: BaseFiles, digests: Sequence[Mapping[str, str]], device: str) -> str:
    """What the repository's journal knows a merge by: files of another machine are continued, those of other work not."""
    facts = [content_fingerprint(plan, digests, source.contents()), device, installed("torch")]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def small_files(plan: Plan, stage: Stage, table: Mapping[str, Any], repo: str, options: StreamOptions) -> list[Upload]:
    """Everything but the weights, made in the stage, where nothing else is left: config, index, tokenizer, card, record."""
    stage.clear(but={MODEL})
    stage.files = {name: shard.digest for name, shard in stage.finished.items()}
    replaced = {CARD} if options.card else set()
    sent = [file for file in plan.side_files if not why_kept(file.name, options.exclude) and file.name not in replaced]
    write_small_files(stage, plan, sent, table, repo, not matches(CARD, options.exclude))
    return [Upload(name, stage.folder / name) for name in stage.files if name not in stage.finished]


def why_kept(name: str, exclude: Sequence[str]) -> str:
    """Empty for a file beside the base that is sent; else the reason it is not."""
    unknown = "" if matches(name, KNOWN) else UNKNOWN
    return never(name) or unknown or ("excluded" if matches(name, exclude) else "")


class Repository(LocalFolder):
    """A repository as the destination of a merge: each file is committed when it is made, and leaves this disk."""

    def __init__(self, repo: str, revision: str | None, plan: Plan, plan_name: str, stage: Stage) -> None:
        super().__init__(stage)
        self.repo, self.revision, self.plan, self.plan_name = repo, revision, plan, plan_name
        self.doubts: list[Note] = []  # about how packed weights are decoded
        self.most = 0  # bytes of weight files that were on this disk at one time

    def rounds(self, names: Sequence[str]) -> Iterator[Sequence[str]]:
        """One file a round: at its widest its source and itself are on the disk."""
        for number, shard in enumerate(self.plan.shards, 1):
            if shard.name in names:
                self.stage.expect([shard.name])
                self.most = max(self.most, most_on_disk(self.plan, [shard]))
                with OpenSources() as sources:
                    for file in sources_of(self.plan, shard):
                        bring(sources.of(file))  # until nobody needs it
                    self.doubts += self.plan.check_packed(shard.spans)
                    yield [shard.name]
                self.send(shard.name, f"{number} of {len(self.plan.shards)}")

    def send(self, name: str, number: str) -> None:
        """Commit a file that is made, and the journal with it; then remove the file."""
        upload, shard = Upload(name, self.stage.folder / name), self.finished[name]
        named = replace(shard, digest=replace(shard.digest, sha256=upload.sha256))  # as the Hub knows it
        if why_unlike(self.stage.folder / name, shard.digest):
            raise VerificationError(f"{printable(name)}: changed on disk after it was written; run the command again")
        self.stage.keep(named)
        commit(self.repo, self.revision, [upload, self.journal()], f"Merged weights {number}")
        self.stage.clear(but={MODEL, FETCHED})

    def begin(self, overwrite: bool) -> Commit | None:
        """Find out what the repository holds, and begin or go on; the last commit where all is done already."""
        there = files_of(self.repo, self.revision)
        journal = self.read(REMOTE_JOURNAL, there)
        if journal.get("plan") == self.plan_name:
            self.keep(finished_in(journal.get("finished"), there))
            return None
        whole = self.read(PROVENANCE, there)
        if whole.get("plan") == self.plan_name and not journal:
            weights = {shard.name for shard in self.plan.shards}
            listed = {name: digest.record() for name, digest in read_recorded(whole).items() if name in weights}
            found = finished_in(listed, there)
            if set(found) == weights:
                self.keep(found)
                head = self.head()
                return Commit(head.commit, f"{endpoint()}/{self.repo}/commit/{head.commit}")
        model = [name for name in there if self.is_of_a_model(name)]
        if model and not journal and not overwrite:
            raise UsageError(
                f"{self.repo}: already contains a model or an adapter; pass --overwrite to replace it",
                hint="--overwrite",
            )
        # config and index go first: at no time do they stand beside weights they do not belong to
        commit(self.repo, self.revision, [self.journal()], "Start a merge with loratool", delete=model)
        return None

    def is_of_a_model(self, name: str) -> bool:
        """Whether a loader reads a file with the model: at the top of the repository, or in a component's folder.

        The config of an adapter is one of them, which transformers would put on top of the model.
        """
        folder, _, file = name.rpartition("/")
        return folder in ("", *self.plan.base.components) and (
            file in ("config.json", MODEL_INDEX, PEFT_CONFIG) or file.endswith(".safetensors") or is_index(file)
        )

    def keep(self, found: Mapping[str, FinishedShard]) -> None:
        """Count files that are there already."""
        for shard in found.values():
            self.stage.keep(shard)

    def head(self) -> Remote:
        return look_up(HubPath(self.repo, self.revision))

    def read(self, name: str, there: Mapping[str, RemoteFile]) -> dict[str, Any]:
        """A small JSON file of the repository; empty where there is none that can be read."""
        if name not in there:
            return {}
        head = self.head()
        try:
            return json_object(read_small(head, PurePath(name))) if name in head.files else {}
        except (ValueError, InputError):
            return {}

    def journal(self) -> Upload:
        table = {
            "plan": self.plan_name,
            "finished": {name: s.record() for name, s in sorted(self.finished.items())},
        }
        return Upload(REMOTE_JOURNAL, content=as_json(table))

    def end(self, uploads: Sequence[Upload], message: str) -> Commit:
        """The commit that makes a model of the weights, and a look at all that is there."""
        there = files_of(self.repo, self.revision)
        names = {*self.finished, *(upload.name for upload in uploads)}
        stale = [n for n in there if n not in names and (self.is_of_a_model(n) or n == REMOTE_JOURNAL)]
        done = commit(self.repo, self.revision, uploads, message, delete=stale)
        check(self.repo, done.oid, uploads)
        there = files_of(self.repo, done.oid)
        found = finished_in({name: shard.record() for name, shard in self.finished.items()}, there)
        if missing := sorted(set(self.finished) - set(found)):
            raise HubError(f"{self.repo}: uploaded weights are missing or have changed:", map(printable, missing))
        return done


def finished_in(table: object, there: Mapping[str, RemoteFile]) -> dict[str, FinishedShard]:
    """The files of a journal or a provenance that are in the repository with the content it tells."""
    entries = table.items() if isinstance(table, dict) else ()
    tables = ({"changed": True, **entry, "name": name} for name, entry in entries if isinstance(entry, dict))
    shards = [shard for each in tables if (shard := FinishedShard.of_record(each)) is not None]
    return {
        shard.name: shard
        for shard in shards
        if (file := there.get(shard.name)) is not None
        and file.size == shard.size
        and file.sha256 in ("", shard.digest.sha256)  # of a small file the Hub tells the size alone
    }
