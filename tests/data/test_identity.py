"""Files and the text of a run are recognised by their content."""

from longctx.config import TextSource
from longctx.data import identity
from longctx.data.identity import digest, text_digests


def test_large_file_is_hashed_by_its_size_and_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_MAX_HASHED", 10)
    monkeypatch.setattr(identity, "_END", 3)
    digests = []
    for number, content in enumerate((b"abc-middle-xyz", b"abc-MIDDLE-xyz", b"abc-middle-xyZ", b"abc-middle--xyz")):
        file = tmp_path / str(number)
        file.write_bytes(content)
        digests.append(digest(file))
    assert digests[0].startswith("ends-sha256:") and digests[0] == digests[1]
    assert len(set(digests)) == 3, "another end, another size"


def test_text_is_recognised_by_content_and_order(tmp_path):
    for folder, contents in (("a", "xy"), ("moved", "xy"), ("swapped", "yx")):
        (tmp_path / folder).mkdir()
        for name, content in zip(("1.txt", "2.txt"), contents, strict=True):
            (tmp_path / folder / name).write_text(content)
    text, moved, swapped = (TextSource(path=str(tmp_path / name)) for name in ("a", "moved", "swapped"))
    assert text_digests([text]) == text_digests([moved]) != text_digests([swapped])
    assert text_digests([TextSource(pydoc="train"), text]) == [[], *text_digests([text])]
