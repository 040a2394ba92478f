"""`batch --share-across`: converted adapters of one base put on bases that several of them share.

    group     adapters of the same base, modules, shapes and dtype
    batch     at most `TOGETHER` of them, in order of identity, that were not decided about before
    looked at for bases that are there already and for new ones                  `clustering`
    decided   bases of a cluster land, then the journal says who uses which, then each adapter is written anew

An adapter's error in each module stays within that of its separate conversion (`fit.joint`), a module is shared where that stores
fewer bytes, and an adapter only where it saves more than what its files say about it. What is decided once stays.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from bslora_convert.bslora import bases
from bslora_convert.bslora.bases import Basis, Cores, Uses
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.storage import CONFIG_NAME, WEIGHTS_NAME, load_compact
from bslora_convert.conversion.writing import Extras, write_result
from bslora_convert.errors import BsloraConvertError, InputError, OutputError, Refused
from bslora_convert.files.address import STATE
from bslora_convert.files.hashing import sha256
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.landing import landing
from bslora_convert.files.record import FIDELITY_NAME
from bslora_convert.files.tensorfile import write_tensors
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.fit.source import measure
from bslora_convert.library.clustering import Member, clustered, fit_cluster, join
from bslora_convert.library.fetch import local_copy
from bslora_convert.library.items import Item
from bslora_convert.library.jobs import Result, figures, mark
from bslora_convert.library.journal import Entry, read_journal, write_journal
from bslora_convert.lora import load_lora
from bslora_convert.process.progress import Progress, silent
from bslora_convert.report import REPORT_NAME

TOGETHER = 32  # adapters looked at together: what they hold in memory and what their stacked updates cost stay bounded
TOGETHER_BYTES = 4 << 30  # of their weight files


@dataclass(slots=True)
class Sharing:
    """A run: where results are, where adapters came from, what was decided, their rows, and why some could not be looked at."""

    out: Path
    items: Mapping[str, Item]
    journal: dict[str, Entry]
    rows: dict[str, Result]
    reasons: dict[str, str] = field(default_factory=dict)

    def sort(self, row: Result) -> str | None:
        """The group of an adapter that is to be decided about; what was decided and not carried out is carried out."""
        group, file = _state(self.out / row.id)
        entry = self.journal.get(row.id)
        if entry is None or entry.group != group or (file is not None and file != entry.bases):
            return group
        if entry.bases is not None and file is None:
            if not (self.out / bases.DIRECTORY / f"{entry.bases}.safetensors").is_file():
                return group
            with local_copy(self.items[row.id]) as place:
                found = bases.read(bases.find(self.out / row.id, entry.bases))
                self.rows[row.id] = _write(_load(row, place, self.out), entry.bases, found, self.out)
        return None

    def decide(self, batch: Sequence[Result], group: str) -> None:
        """Decides about some adapters of a group, writes that down, and carries it out."""
        with ExitStack() as stack:
            members, alone = [], []
            for row in batch:
                self.journal.pop(row.id, None)
                try:
                    members.append(_load(row, stack.enter_context(local_copy(self.items[row.id])), self.out))
                except Refused:  # converted without a fit, from another layout than PEFT's
                    alone.append(row)
                except Exception as error:  # a damaged record or a store that fails: it is this adapter's own
                    self.reasons[row.id] = _said(error)
            known = sorted({entry.bases for entry in self.journal.values() if entry.group == group and entry.bases})
            joined = {member.row.id: join(member, known, self.out) for member in members}
            rest = [member for member in members if joined[member.row.id] is None]
            decided = [cluster for cluster in joined.values() if cluster is not None]
            decided += [cluster for cluster in map(fit_cluster, clustered(rest)) if cluster is not None]
            landed = [(cluster, cluster.file or _land(cluster.bases, self.out)) for cluster in decided]
            files = {member.row.id: file for cluster, file in landed for member in cluster.members}
            for row in (*(member.row for member in members), *alone):
                self.journal[row.id] = Entry(row.key, group, files.get(row.id), _size(self.out / row.id))
            write_journal(self.out, self.journal)
            for cluster, file in landed:
                for member in cluster.members:
                    try:
                        self.rows[member.row.id] = _write(member, file, cluster.bases, self.out)
                    except OutputError:
                        raise
                    except Exception as error:  # the next run carries out what the journal says
                        self.reasons[member.row.id] = _said(error)


def share(
    rows: Sequence[Result], items: Mapping[str, Item], out: Path, progress: Progress = silent
) -> tuple[list[Result], dict[str, str]]:
    """Shares bases among the adapters of a converted library; their rows, and the reasons of those that could not be looked at.

    items: by identity, where each came from.

    :raises OutputError: when the output can't be written.
    """
    keys = {row.id: row.key for row in rows}
    journal = {name: entry for name, entry in read_journal(out).items() if keys.get(name, entry.key) == entry.key}
    run = Sharing(out, items, journal, {row.id: row for row in rows})
    good = [row for row in rows if row.status in ("ok", "skipped")]
    waiting: dict[str, list[Result]] = {}
    with modules_over_cores():
        for done, row in enumerate(good):
            progress("reading what was decided", done, len(good))
            try:
                group = run.sort(row)
            except OutputError:
                raise
            except Exception as error:  # whatever it was, it is this adapter's and not the library's
                run.reasons[row.id] = _said(error)
            else:
                if group is not None:
                    waiting.setdefault(group, []).append(row)
        done = 0
        for group, members in waiting.items():
            for batch in _batches(members):
                progress("looking for bases to share", done, sum(map(len, waiting.values())))
                run.decide(batch, group)
                done += len(batch)
    return [run.rows[row.id] for row in rows], run.reasons


def _said(error: Exception) -> str:
    """An error of ours as it is, another one with its kind."""
    return str(error) if isinstance(error, BsloraConvertError | OSError) else f"{type(error).__name__}: {error}"


def _state(directory: Path) -> tuple[str, str | None]:
    """(Group, hash of the bases in use) of a converted adapter, from its configuration."""
    path = directory / CONFIG_NAME
    config = read_json(path)
    layout = Layout.parse(config, path)
    modules = {name: [*entry.shape, entry.kind] for name, entry in layout.modules.items()}
    same = [config.get("base_model_name_or_path"), config.get("revision"), config.get("dtype"), modules]
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
    return digest, bases.parse(config, layout.modules, path).file if config.get("bases") is not None else None


def _batches(rows: Sequence[Result]) -> Iterator[list[Result]]:
    """Rows in order, as many together as may be."""
    batch: list[Result] = []
    for row in rows:
        size = sum(other.source_bytes or 0 for other in (*batch, row))
        if batch and (len(batch) == TOGETHER or size > TOGETHER_BYTES):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _load(row: Result, place: Path, out: Path) -> Member:
    """A converted adapter beside its source.

    :raises InputError: when one of them is damaged or they don't belong together. :raises Refused: when the source can't be read.
    """
    compact = load_compact(out / row.id)
    record = read_json(out / row.id / FIDELITY_NAME)
    said = record.get("recipe", {})
    source = load_lora(place, alpha=said.get("lora_alpha"), rslora=said.get("use_rslora"))
    if compact.uses is not None:
        raise InputError(f"{compact.path}: it takes bases that no run decided on; convert it again with --no-resume")
    if sha256(source.weights) != record["source"]["sha256"] or set(source.modules) != set(compact.form.modules):
        raise InputError(f"{row.id}: its source is not what it was converted from any more")
    return Member(row, source, compact, record)


def _land(found: Mapping[str, Basis], out: Path) -> str:
    """Writes bases under the hash of their bytes and returns it."""
    partial = out / STATE / "bases.partial.safetensors"
    try:
        (out / bases.DIRECTORY).mkdir(exist_ok=True)
        write_tensors(partial, bases.named_tensors(found))
        digest = sha256(partial)
        partial.replace(out / bases.DIRECTORY / f"{digest}.safetensors")
    except OSError as error:
        raise OutputError(f"{out / bases.DIRECTORY}: can't be written ({error.strerror or error})") from error
    return digest


def _write(member: Member, file: str, found: Mapping[str, Basis], out: Path) -> Result:
    """Writes an adapter anew with cores in these bases, reads it back, and marks it."""
    cores, sizes, modules = {}, {}, dict(member.compact.form.modules)
    for name, basis in found.items():
        taken = member.core(name, basis)
        if taken is not None:
            cores[name], local = taken
            sizes[name] = basis.sizes_for(local.rank)
            modules[name] = replace(modules[name], local=local)
    if not cores:
        raise InputError(f"{member.row.id}: the bases {file} that were decided on don't fit it")
    uses = Uses(file, sizes)
    directory, record, source = out / member.row.id, member.record, member.source
    note = f"{len(cores)} modules take their local parts from {bases.DIRECTORY}/{file}.safetensors of the library"
    with landing(directory, overwrite=True) as place:
        written = write_result(
            place,
            replace(member.compact.form, modules=modules),
            source,
            measure(source.modules, source.kinds),
            record["source"]["sha256"],
            record["recipe"],
            Extras(notes=(*record["notes"], note)),
            None,
            html=(directory / REPORT_NAME).is_file(),
            source_name=record["source"]["path"],
            cores=Cores(uses, cores),
        )
    row = replace(member.row, **figures(written))
    mark(out, replace(row, status="ok", seconds=None))
    return row


def _size(directory: Path) -> int:
    """Bytes of weights and configuration."""
    return sum((directory / name).stat().st_size for name in (WEIGHTS_NAME, CONFIG_NAME))
