"""`stream()`: a merge whose output goes to the Hub file by file, for disks smaller than the model.

For each output file: fetch its source, merge it, upload it, delete both. A journal in the repository tells which
files of which plan are there, in the same commit as the file itself; the last commit brings index, config and card
and takes the journal away. So the repository cannot be loaded before it is whole, and a run that was interrupted
asks it what is left to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from loratool.adapters.adapter import moved, stored_tensors
from loratool.adapters.formats import read_adapter
from loratool.bases.same_base import unlike_bases
from loratool.bases.weights import moved_weight
from loratool.devices import Runtime, resident_memory, start_torch
from loratool.errors import FitError, HubError, InputError, UsageError, VerificationError, printable
from loratool.fetching import local
from loratool.fetching.bases import chosen_base
from loratool.fetching.outline import Remote, read_small
from loratool.fetching.pieces import BaseFiles, opened
from loratool.files.checkpoint import INDEX_SUFFIX, PROVENANCE, LeftOut
from loratool.files.digests import Digest, digest_of_bytes, read_recorded, recorded
from loratool.files.inputs import json_object
from loratool.files.journal import FETCHED, MODEL, FinishedShard
from loratool.files.outputs import check_stage
from loratool.files.process import peak_memory
from loratool.files.safefile import read_safefile
from loratool.files.shard_writer import LocalFolder
from loratool.files.staging import Stage, check_space, workplace
from loratool.merging.effects import effect_notes, effects_of, size_notes
from loratool.merging.engine import Engine
from loratool.merging.fingerprints import content_fingerprint, installed
from loratool.merging.merge import (
    MergeOptions,
    PathLike,
    Progress,
    as_text,
    check_values,
    merged_card,
    provenance,
)
from loratool.merging.planning import plan_merge
from loratool.merging.resources import choose_resources
from loratool.merging.row_blocks import Totals
from loratool.provenance.cards import CARD, command, is_nobodys
from loratool.publishing.committing import REMOTE_JOURNAL, Commit, Upload, check, commit, files_of, full_name, open_repo
from loratool.publishing.pushing import CommitOptions
from loratool.publishing.selecting import KNOWN, UNKNOWN, check_message, check_secrets, matches, never
from loratool.results.base import Cost
from loratool.results.stream import StreamReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from loratool.fetching.answers import RemoteFile
    from loratool.files.safefile import SafeFile
    from loratool.merging.output_layout import ShardPlan
    from loratool.merging.plan import MergePlan
    from loratool.notes import Note


@dataclass(frozen=True, kw_only=True)
class StreamOptions(MergeOptions, CommitOptions):
    """Of a merge whose files go to the Hub one by one."""


def stream(
    base: PathLike,
    adapters: Sequence[PathLike] | PathLike,
    repo: str,
    options: StreamOptions,
    progress: Progress | None = None,
) -> StreamReport:
    """Merge, and upload each output file before the next is made; `loratool.commands.stream` says all of it."""
    started = time.monotonic()
    if options.shard_size is not None:
        raise UsageError("a streaming merge keeps the base's files, so --shard-size has no use here")
    check_message(options.message)
    words = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
    ways = options.readings(len(words))
    paths = [local(adapter, "adapter") for adapter in words]
    repo = repo if options.dry_run else full_name(repo)  # so that a long way is not gone in vain
    runtime = start_torch(options.device)
    with ExitStack() as stack:
        place = Workplace.of(repo, stack, options.dry_run)
        source = stack.enter_context(opened(chosen_base(base, paths), place.place_for))
        planned = plan_merge(
            source.checkpoint,
            [read_adapter(path, way) for path, way in zip(paths, ways, strict=True)],
            options,
        )
        check_values(planned)
        told = command("merge", [planned.base.root, *paths], options, out=False)
        told = f"{told} --stream --push-to-hub {repo}"
        others = partial(last_files, planned, repo=repo, card=options.card, exclude=options.exclude)
        headers = [Upload(shard.name, content=shard.layout.header) for shard in planned.shards]
        early = [*others(table={"command": told}, weights={}), *headers]  # a secret is found before anything is sent
        secrets = check_secrets(planned.base.name, early, options.allow_secret)
        streaming = Streaming(planned, source, place, repo, options, runtime, progress)
        made = (*planned.notes, *unlike_bases(planned.base, planned.adapters))
        notes = [*made, *secrets]
        digests = [adapter.digests() for adapter in planned.adapters]
        check_space(place.home.parent, most_on_disk(planned))
        if options.dry_run:
            return streaming.report(Commit("", ""), not options.public, (), notes, started)
        choose_resources(
            planned.spans, runtime.result().devices, options.workers, options.max_memory, resident_memory()
        )
        place.open()
        private = open_repo(repo, options.public, options.revision, notes)[1]
        streaming.plan_name = fingerprint(planned, source, digests, options.device)
        done = streaming.begin(options.overwrite)
        resumed = tuple(sorted(streaming.finished))
        if done is None:
            streaming.run()
            on_gpu = any(name.startswith("cuda") for name in runtime.result().devices)
            effects = effects_of(planned, streaming.totals)
            ratios = {name: ratio for shard in streaming.finished.values() for name, ratio in shard.ratios.items()}
            notes += [*effect_notes(effects), *size_notes(planned, ratios)]
            whole = replace(planned, notes=(*made, *effect_notes(effects)))  # those on the repository are of this run
            table = provenance(whole, digests, effects, on_gpu, told) | {"plan": streaming.plan_name}
            weights_sent = {name: shard.digest for name, shard in streaming.finished.items()}
            done = streaming.end(others(table=table, weights=weights_sent), options.message or "Merge with loratool")
        return streaming.report(done, private, resumed, notes, started)


@dataclass
class Workplace:
    """The folder of a streaming merge, in the working directory; made when there is something to put into it.

    It is no stage of a local merge, whatever that one's output is called: both can be interrupted side by side.
    """

    home: Path
    stack: ExitStack  # of the run, at whose end the folder goes
    dry_run: bool
    stage: Stage | None = None

    @classmethod
    def of(cls, repo: str, stack: ExitStack, dry_run: bool) -> Workplace:
        """That of a merge into a repository. Raises `StorageError` where its name is taken by what is not ours."""
        home = Path.cwd() / f"{Path(repo).name or 'merged'}.streaming"
        check_stage(home)
        return cls(home, stack, dry_run)

    def open(self) -> Stage:
        """The folder, locked and empty to begin with: what a killed run left goes first."""
        if self.stage is None:
            self.stage = self.stack.enter_context(workplace(self.home))
        return self.stage

    def place_for(self, name: str) -> Path:
        """Where a file of the Hub is fetched to."""
        if self.dry_run:  # which makes nothing in the working directory
            return Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="loratool-")))
        return self.open().place_for(name)


def sources_of(plan: MergePlan, shard: ShardPlan) -> list[SafeFile]:
    """The base's files that an output file is made of, those with a weight on which a bias depends among them."""
    own = {id(file): file for file in plan.base.shards}
    edits = (edit for span in shard.spans for edit in span.edits)
    beside = (tensor for edit in edits for tensor in stored_tensors(edit.update))
    every = (*(tensor for span in shard.spans for tensor in span.weight.tensors), *beside)
    return list({id(tensor.file): tensor.file for tensor in every if id(tensor.file) in own}.values())


def most_on_disk(plan: MergePlan) -> int:
    """Bytes of the largest output file and its source together."""
    return max(s.layout.size + sum(int(file.layout.size) for file in sources_of(plan, s)) for s in plan.shards)


def fingerprint(plan: MergePlan, source: BaseFiles, digests: Sequence[Mapping[str, str]], device: str) -> str:
    """What the repository's journal knows a merge by: files of another machine are continued, those of other work not."""
    facts = [content_fingerprint(plan, digests, source.contents()), device, installed("torch")]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def last_files(
    plan: MergePlan,
    table: Mapping[str, Any],
    weights: Mapping[str, Digest],
    repo: str,
    card: bool,
    exclude: Sequence[str],
) -> list[Upload]:
    """Everything but the weights, which are there already: config, index, tokenizer, card, provenance."""
    sent = (file for file in plan.side_files if not why_kept(file.name, exclude))
    uploads = {file.name: Upload(file.name, file.source, file.content) for file in sent}
    unwanted = matches(CARD, exclude)
    if not unwanted and (card or CARD not in uploads or is_nobodys(uploads[CARD].path)):
        uploads[CARD] = Upload(CARD, content=merged_card(plan, table, repo))
    files = {**weights, **{name: digest_of_bytes(upload.read()) for name, upload in uploads.items()}}
    uploads[PROVENANCE] = Upload(PROVENANCE, content=as_text({**table, "files": recorded(files)}))
    return list(uploads.values())


def why_kept(name: str, exclude: Sequence[str]) -> str:
    """Empty for a file beside the base that is sent; else the reason it is not."""
    unknown = "" if matches(name, KNOWN) else UNKNOWN
    return never(name) or unknown or ("excluded" if matches(name, exclude) else "")


def kept_back(plan: MergePlan, exclude: Sequence[str]) -> Iterator[str]:
    """Files beside the base that are not sent, with the reason."""
    for file in plan.side_files:
        if reason := why_kept(file.name, exclude):
            yield str(LeftOut(file.name, reason))


@dataclass
class Streaming:
    """One streaming merge on its way."""

    plan: MergePlan
    source: BaseFiles
    place: Workplace
    repo: str
    options: StreamOptions
    runtime: Future[Runtime]
    progress: Progress | None
    plan_name: str = ""
    finished: dict[str, FinishedShard] = field(default_factory=dict)
    totals: Totals = field(default_factory=Totals)  # what adapters did to the files that are finished
    most: int = 0  # bytes of weight files that were on this disk at one time
    done: int = 0  # bytes of tensors

    @property
    def total(self) -> int:
        return sum(span.placed.nbytes for span in self.plan.spans)

    def begin(self, overwrite: bool) -> Commit | None:
        """Find out what the repository holds, and begin or go on; the last commit where all is done already."""
        there = files_of(self.repo, self.options.revision)
        journal = self.read(REMOTE_JOURNAL, there)
        if journal.get("plan") == self.plan_name:
            self.finished = finished_in(journal.get("finished"), there)
            self.totals.measured |= effects_in(journal.get("measured"), self.plan)
            self.totals.effective |= effects_in(journal.get("effective"), self.plan) & self.totals.measured
            return None
        whole = self.read(PROVENANCE, there)
        if whole.get("plan") == self.plan_name and not journal:
            weights = {shard.name for shard in self.plan.shards}
            listed = {name: digest.record() for name, digest in read_recorded(whole).items() if name in weights}
            found = finished_in(listed, there)
            if set(found) == weights:
                self.finished = found
                head = self.head()
                return Commit(head.commit, f"{self.page}/commit/{head.commit}")
        model = [name for name in there if is_of_a_model(name)]
        if model and not journal and not overwrite:
            raise UsageError(f"{self.repo}: holds a model already; --overwrite replaces it")
        # config and index go first: at no time do they stand beside weights they do not belong to
        commit(self.repo, self.options.revision, [self.journal()], "Begin a merge with loratool", delete=model)
        return None

    @property
    def page(self) -> str:
        from loratool.fetching.client import endpoint

        return f"{endpoint()}/{self.repo}"

    def head(self) -> Remote:
        from loratool.fetching import HubPath
        from loratool.fetching.outline import look_up

        return look_up(HubPath(self.repo, self.options.revision))

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
            "measured": sorted(self.totals.measured),
            "effective": sorted(self.totals.effective),
        }
        return Upload(REMOTE_JOURNAL, content=as_text(table))

    def run(self) -> None:
        """Every output file that the repository has not: fetch, merge, upload, delete."""
        for number, shard in enumerate(self.plan.shards, 1):
            if shard.name not in self.finished:
                self.carry(shard, f"{number} of {len(self.plan.shards)}")
            self.done += sum(span.placed.nbytes for span in shard.spans)
            if self.progress:
                self.progress(self.done, self.total)
        if not (self.plan.replaces or any(shard.changed for shard in self.finished.values())):
            raise FitError(
                f"{printable(self.repo)}: not completed, for every weight rounds to what it was: nothing changes; what is "
                "there are copies of the base's weights, so delete the repository"
            )

    def carry(self, shard: ShardPlan, number: str) -> None:
        """One output file's way: at its widest its source and itself are on the disk."""
        stage = replace(self.place.open(), finished={}, files={})
        stage.expect([shard.name])
        fetched = {id(file): self.source.fetch(file) for file in sources_of(self.plan, shard)}
        here = {key: read_safefile(path) for key, path in fetched.items()}
        spans = tuple(
            replace(
                span,
                weight=moved_weight(span.weight, here),
                edits=tuple(replace(edit, update=moved(edit.update, here)) for edit in span.edits),
            )
            for span in shard.spans
        )
        base = replace(self.plan.base, shards=tuple(here.values()))
        part = replace(self.plan, base=base, shards=(replace(shard, spans=spans),))
        before = self.done
        tell: Callable[[int, int], None] = lambda done, _all: self.progress and self.progress(before + done, self.total)  # noqa: E731
        totals = Engine(
            part, LocalFolder(stage), self.runtime, self.options.workers, self.options.max_memory, tell
        ).run()
        self.totals.measured |= totals.measured
        self.totals.effective |= totals.effective
        fetched_bytes = sum(path.stat().st_size for path in fetched.values())
        self.most = max(self.most, fetched_bytes + shard.layout.size)
        for path in fetched.values():
            self.source.drop(path)
        finished = stage.finished[shard.name]
        upload = Upload(shard.name, stage.folder / shard.name)
        if not finished.digest.has_sha256(upload.sha256):
            raise VerificationError(f"{printable(shard.name)}: changed on this disk after it was written; run it again")
        self.finished[shard.name] = finished
        commit(self.repo, self.options.revision, [upload, self.journal()], f"Merged weights {number}")
        stage.clear(but={MODEL, FETCHED})

    def end(self, uploads: Sequence[Upload], message: str) -> Commit:
        """The commit that makes a model of the weights, and a look at all that is there."""
        there = files_of(self.repo, self.options.revision)
        names = {*self.finished, *(upload.name for upload in uploads)}
        stale = [name for name in there if name not in names and (is_of_a_model(name) or name == REMOTE_JOURNAL)]
        done = commit(self.repo, self.options.revision, uploads, message, delete=stale)
        check(self.repo, done.oid, uploads)
        there = files_of(self.repo, done.oid)
        found = finished_in({name: shard.record() for name, shard in self.finished.items()}, there)
        if missing := sorted(set(self.finished) - set(found)):
            raise HubError(f"{self.repo}: weights are gone or others than were sent:", map(printable, missing))
        return done

    def report(
        self,
        done: Commit,
        private: bool,
        resumed: tuple[str, ...],
        notes: Sequence[Note],
        started: float,
    ) -> StreamReport:
        return StreamReport(
            repo=self.repo,
            url=done.url,
            commit=done.oid,
            private=private,
            edited=len(self.plan.edited),
            adapters=effects_of(self.plan, self.totals) if self.totals.measured else (),
            copied=self.plan.copied,
            files=len(self.plan.shards),
            bytes_written=self.plan.bytes_written,
            resumed=resumed,
            most_on_disk=most_on_disk(self.plan) if self.options.dry_run else self.most,
            left_out=(*self.plan.left_out, *kept_back(self.plan, self.options.exclude)),
            notes=tuple(notes),
            digests={s.name: str(s.digest) for _, s in sorted(self.finished.items())},
            dry_run=self.options.dry_run,
            cost=Cost(
                ", ".join(self.runtime.result().devices),
                time.monotonic() - started,
                self.runtime.result().seconds,
                peak_memory(),
            ),
        )


def is_of_a_model(name: str) -> bool:
    """Whether a file at the top of a repository is what a loader takes for a model."""
    return "/" not in name and (name == "config.json" or name.endswith((".safetensors", INDEX_SUFFIX)))


def effects_in(table: object, plan: MergePlan) -> set[tuple[int, str]]:
    """The updates, as (number of the adapter, target), that a journal lists and the plan has."""
    known = {(number, target) for number, adapter in enumerate(plan.adapters) for target in adapter.updates}
    entries = table if isinstance(table, list) else []
    listed = {tuple(entry) for entry in entries if isinstance(entry, list) and [*map(type, entry)] == [int, str]}
    return known & listed


def finished_in(table: object, there: Mapping[str, RemoteFile]) -> dict[str, FinishedShard]:
    """The files of a journal or a provenance that are in the repository with the content it tells."""
    found: dict[str, FinishedShard] = {}
    for name, entry in table.items() if isinstance(table, dict) else ():
        shard = FinishedShard.of_record({"changed": True, **entry, "name": name}) if isinstance(entry, dict) else None
        file = there.get(name)
        if shard is None or file is None or file.size != shard.size:
            continue
        if not file.sha256 or shard.digest.has_sha256(file.sha256):  # of a small file the Hub tells the size alone
            found[name] = shard
    return found
