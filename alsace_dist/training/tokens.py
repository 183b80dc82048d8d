"""The encoded rows that a training reads: made once by all ranks together, checked, and opened shard by shard."""

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alsace_dist.config import TaskConfig
from alsace_dist.data.rows import Candidates, EncodedRow, rows_of
from alsace_dist.data.tokens import TokenRows, read_metadata, write_tokens
from alsace_dist.errors import Stopped, UserError
from alsace_dist.files import manifest, written
from alsace_dist.files.manifest import FileEntry, Manifest
from alsace_dist.files.shards import Dataset, read_shard
from alsace_dist.files.written import Written
from alsace_dist.models.family import Family
from alsace_dist.monitor.progress import progress
from alsace_dist.ranks.job import note_position
from alsace_dist.ranks.watchdog import Watchdog

KIND = "tokens"
MANY_ROWS = 50_000  # a core tokenises them in some seconds: fewer need no progress


@dataclass
class Tokens:
    """The rows of some languages of a dataset, encoded for a model."""

    dataset: Dataset
    task: TaskConfig
    languages: Sequence[str]
    model: Family
    _directory: Path = Path()
    _listed: Manifest | None = None
    _verified: set[str] = field(default_factory=set)

    def make(self, directory: Path, fingerprint: dict[str, Any], shards: Collection[int], watchdog: Watchdog) -> None:
        """Write the files of these shards, each rank its share, but for those that are there. Collective.

        ``fingerprint``: everything that the rows depend on; ``watchdog``: hears of each file. Raises
        ``Stopped`` if a stop was agreed (finished files are kept), and as ``read_shard`` and ``Family.encode``.
        """
        self._directory, ranks = directory, watchdog.ranks
        wanted = {"training": manifest.digest_json(fingerprint)}
        names = {self._name(shard) for shard in shards}
        found: list[Manifest | None] = [None]

        def look() -> None:
            found[0] = self._made(wanted, names)

        ranks.main_first(look)
        if not ranks.any_rank(found[0] is not None)[0]:
            found[0] = self._make(wanted, sorted(shards), watchdog)
        # By message: the disk may show a file to other machines later.
        listed = ranks.from_main(found[0].model_dump() if found[0] else None)
        self._listed = Manifest.model_validate(listed)

    def open(self, shard: int) -> TokenRows:
        """The rows of a shard. Raises ``UserError`` if its file is not what was written."""
        assert self._listed is not None, "made before it is opened"
        name = self._name(shard)
        if name not in self._verified:
            manifest.verify_file(self._directory, self._listed, name)
            self._verified.add(name)
        return TokenRows(self._directory / name, self._candidates_of)

    def _name(self, shard: int) -> str:
        return f"{self.dataset.shards[shard].stem}.arrow"

    def _candidates_of(self, language: str) -> Candidates:
        return self.model.candidates(self.model.answers.fixed[language], language)

    def _made(self, wanted: dict[str, str], names: set[str]) -> Manifest | None:
        """The directory's manifest, if it is complete; else it is begun. Raises ``UserError`` as ``manifest.claim``."""
        manifest.claim(self._directory)
        found: Manifest | None = None
        try:
            found = manifest.load_manifest(self._directory, KIND)
            if found.fingerprint == wanted and names <= found.files.keys():
                manifest.verify_files(self._directory, found, hashes=False)
                return found
        except UserError:  # a file is gone, or cut off: it can be made again
            pass
        manifest.begin(self._directory, KIND, wanted)
        written.take_over(self._directory, found.files if found else {})
        (self._directory / manifest.MANIFEST).unlink(missing_ok=True)
        return None

    def _make(self, wanted: dict[str, str], shards: list[int], watchdog: Watchdog) -> Manifest | None:
        """Write what is missing; rank 0's manifest of it."""
        ranks = watchdog.ranks
        own = shards[ranks.rank :: ranks.world_size]
        entries: dict[str, FileEntry] = {}
        completed: list[Manifest] = []
        counts = [self.dataset.shards[shard].num_examples for shard in own]
        num_rows = sum(count.get(language, 0) for count in counts for language in self.languages)

        def make_own() -> None:
            there = Written(self._directory, ranks.rank)
            self.dataset.expect(own)
            is_shown = ranks.is_main and num_rows >= MANY_ROWS
            # In the stage's own directory, where people look how far it is.
            with progress("tokenise", self._directory.parent, len(own), 0, is_shown) as advance:
                for shard in own:
                    watchdog.beat("the tokens of the next shard")
                    if ranks.stop.is_set:
                        break
                    path = self._directory / self._name(shard)
                    about = wanted | {"shard": self.dataset.shards[shard].sha256}
                    if read_metadata(path) != about or not there.is_whole(path):
                        write_tokens(path, self._encoded(shard), bool(self.model.answers.fixed), about)
                        there.add(path)
                    entries[path.name] = there.entries[path.name]
                    advance()
            stack.enter_context(watchdog.waiting_for_others())

        with ExitStack() as stack:
            ranks.each(make_own)
        num_stopped, num_done = ranks.sum(ranks.stop.is_set, len(entries))
        if num_stopped:
            if ranks.is_main:
                note_position(f"{num_done:.0f} shards tokenised")
            raise Stopped(f"stopped while tokenising; {self._directory} keeps what is done")
        together = written.merged(ranks.to_main(entries) or [])

        def complete() -> None:
            completed.append(manifest.write_manifest(self._directory, KIND, wanted, [], {}, together))
            written.drop(self._directory)

        ranks.main_first(complete)
        return completed[0] if completed else None

    def _encoded(self, shard: int) -> list[EncodedRow]:
        groups = read_shard(self.dataset, self.dataset.shards[shard])
        return self.model.encode(rows_of(self.task, groups, self.languages))


def drop(directory: Path) -> None:
    """Delete the tokens of a training that is complete: the files that their manifest lists, and no others."""
    if directory.is_symlink():
        return
    try:
        listed = manifest.load_manifest(directory, KIND)
    except UserError:  # somebody has changed what is there: it stays
        return
    for name in listed.files:
        (directory / name).unlink(missing_ok=True)
    manifest.remove_own(directory, written.NAMES)
