"""Archives are unpacked once, and nothing in them gets out of their folder."""

import io
import os
import tarfile
import zipfile

import pytest

from amb import data


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as out:
        for name, content in files.items():
            out.writestr(name, content)


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as out:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            out.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.mid")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(link)


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_only_midi_and_csv_inside_the_folder(tmp_path, write, capsys):
    files = {name: os.urandom(50) for name in ("set/a.mid", "set/deep/b.MIDI", "labels.csv", "set/Op. 3: Nr. 1.mid")}
    bad = {name: b"x" for name in ("../out.mid", "/abs.mid", "run.py", "a/../../c.mid", "__MACOSX/a.mid", "C:/d.mid")}
    source = tmp_path / "set.archive"
    write(source, files | bad | {"empty.mid": b"", "huge.mid": bytes(data.LARGEST_MEMBER + 1)})
    cache = tmp_path / "cache"
    folder = data.midi_folder(source, cache)
    assert "4 files left out: their names lead outside" in (err := capsys.readouterr().err)
    assert "2 files left out: empty, or larger" in err
    assert ("1 files left out: links" in err) == (write is write_tar)
    unpacked = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert unpacked == files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "set.archive"]
    assert list(cache.iterdir()) == [folder]
    (folder / "mark").write_text("")
    assert (data.midi_folder(source, cache) / "mark").exists()  # not unpacked again


def test_damaged_and_useless_archives_are_one_line(tmp_path):
    write_zip(tmp_path / "other.zip", {"readme.txt": "nothing"})
    write_zip(tmp_path / "cut.zip", {f"{number}.mid": os.urandom(5000) for number in range(5)})
    content = bytearray((tmp_path / "cut.zip").read_bytes())
    content[100:9000] = bytes(8900)
    (tmp_path / "cut.zip").write_bytes(content)
    for name in ("other.zip", "cut.zip"):
        with pytest.raises(ValueError, match=name) as error:
            data.midi_folder(tmp_path / name, tmp_path)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.zip", "other.zip"]
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(ValueError, match="neither a folder nor an archive"):
        data.midi_folder(tmp_path / "text.zip", tmp_path)
