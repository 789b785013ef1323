"""An artifact's last steps: it is measured, held against its gates, described, and put in its place.

What misses a gate is kept as `<output>.failed`, so that nothing takes it for a good one; what is there under the
output's own name stays.
"""

from __future__ import annotations

from pathlib import Path

from compressor.checkpoints import Checkpoint
from compressor.core.artifact import CARD, NOT_NEEDED, PAGE, REPORT, failed_directory, file_digest, sealed, text_of
from compressor.core.files import sync_tree, write_text
from compressor.core.locking import LOCK
from compressor.core.report import Report, Size
from compressor.core.tensors import EncodedTensors
from compressor.report.card import write_card
from compressor.report.page import write_page
from compressor.run.place import FINISHED, WORK, Place


def artifact_size(directory: Path, original: Checkpoint) -> Size:
    """Bytes of every file that running the artifact needs, largest first, beside the original's."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in (*NOT_NEEDED, LOCK)]
    files = {str(path.relative_to(directory)): path.stat().st_size for path in paths}
    files = {name: n for name, n in files.items() if not name.startswith(f"{WORK}/")}
    ordered = dict(sorted(files.items(), key=lambda item: (-item[1], item[0])))
    return Size(bytes=sum(ordered.values()), files=ordered, original_bytes=original.describe()["file_bytes"])


def largest_tensors(tensors: EncodedTensors, n: int = 3) -> str:
    """The tensors that take the most bytes, as a sentence; for an artifact that is too large."""
    found = sorted(((tensors[name].encoding.nbytes, name) for name in tensors), reverse=True)[:n]
    return "largest are " + ", ".join(f"{name} with {size / 1e6:.2f} MB" for size, name in found)


def deliver(place: Place, report: Report) -> Path:
    """Hashes into the report, report and page written, the artifact renamed, its working folder away; its directory.

    Whenever the process ends, there is either the artifact with nothing else in it, or what `--resume` goes on from.

    Raises:
        ChangedError: What the artifact was made of is no longer what it was, or something else stands in its place.
    """
    partial, output = place.partial, place.output
    assert report.size is not None
    assert report.gates is not None
    report.sha256 = {name: file_digest(partial / name) for name in sorted(report.size.files)}
    write_text(partial / REPORT, report.text())
    write_page([partial], partial / PAGE, title=output.name)
    write_card(partial, title=output.name)
    digests = {name: file_digest(partial / name) for name in (PAGE, CARD)}
    write_text(partial / REPORT, text_of(sealed(report.as_json(), digests)))
    finished = place.work / FINISHED
    finished.mkdir()
    for path in sorted(partial.iterdir()):
        if path.name not in (WORK, LOCK):
            path.rename(finished / path.name)
    sync_tree(finished)
    place.refuse_changes()
    target = output if report.gates.passed else failed_directory(output)
    place.put(target)
    place.put_away(failed_directory(output), target)
    place.close()
    return target
