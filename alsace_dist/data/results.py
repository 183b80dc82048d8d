"""The files of a scoring pass: which parts of a dataset have scores already, and, in the end, whether all are whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from alsace_dist.data.dealing import Part
from alsace_dist.data.texts import TextCounts, read_texts, total
from alsace_dist.files import manifest
from alsace_dist.files.manifest import FileEntry
from alsace_dist.files.scores import check_rows, is_part, parts_of, put_together, read_metadata
from alsace_dist.files.shards import ShardInfo
from alsace_dist.files.written import Written


@dataclass(frozen=True)
class Results:
    """Score files in a directory. ``metadata``: what all of them say; each says beside that of which shard it is.
    ``written``: what this rank has written of them, or found whole."""

    directory: Path
    metadata: dict[str, str]
    written: Written

    def path(self, part: Part) -> Path:
        """The file of a part."""
        return self.directory / f"{part.name}.parquet"

    def metadata_of(self, part: Part) -> dict[str, str]:
        """What the file of a part says."""
        return self.metadata | {"shard": part.shard.sha256}

    def is_done(self, part: Part) -> bool:
        """Whether a part has scores of this model and these data, as they were written."""
        found, wanted = read_metadata(self.path(part)) or {}, self.metadata_of(part)
        return {name: found.get(name) for name in wanted} == wanted and self.written.is_whole(self.path(part))

    def parts_written(self) -> dict[str, FileEntry]:
        """The files of parts that this rank has written or found whole."""
        return {name: entry for name, entry in self.written.entries.items() if is_part(name)}

    def finish(
        self, shards: Sequence[ShardInfo], written: Mapping[str, FileEntry]
    ) -> tuple[dict[str, FileEntry], dict[str, TextCounts]]:
        """Make whole files of files of parts, and check that every (group, language) of these shards is there once.

        ``written``: the files of parts, as the ranks have written them. Returns the files as a manifest lists them, and
        what the tokenizer has made of their texts. Raises ``UserError`` if a file is broken or lacks rows.
        """
        parts = parts_of(self.directory)
        entries: dict[str, FileEntry] = {}
        texts: dict[str, TextCounts] = {}
        for whole in map(Part, shards):
            path, files = self.path(whole), parts.get(whole.shard.stem, [])
            if files and not self.is_done(whole):
                as_written = [file for file in files if written.get(file.name) == manifest.file_entry(file)]
                put_together(path, as_written, self.metadata_of(whole))
                self.written.add(path)
            for file in files:
                file.unlink()
            check_rows(path, whole.shard.num_examples)
            entries[path.name] = manifest.file_entry(path)
            texts = total([texts, read_texts(path)])
        return entries, texts
