"""Tables that programs write into notes, between markers."""

from pathlib import Path


def write(notes: Path, text: str, markers: tuple[str, str], title: str) -> None:
    """Put a text between its markers in `notes`, at the end when there are none; title: of a note that is new."""
    begin, end = markers
    before = notes.read_text() if notes.exists() else f"# {title}\n"
    head, found, rest = before.partition(begin)
    tail = rest.partition(end)[2] if found else ""
    head = head if found else head.rstrip("\n") + "\n\n"
    notes.parent.mkdir(parents=True, exist_ok=True)
    notes.write_text(f"{head}{begin}\n\n{text.rstrip(chr(10))}\n\n{end}{tail or chr(10)}")
