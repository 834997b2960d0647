"""Files are whole whenever they are there."""

import pytest

from mnc_d2.files import open_atomically


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "file.txt"
    with open_atomically(path, "w", encoding="utf-8") as file:
        file.write("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [None, "before"])
def test_what_was_there_stays_where_writing_fails(tmp_path, before):
    path = tmp_path / "file.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(OSError, match="disk full"):
        with open_atomically(path, "w") as file:
            file.write("half")
            raise OSError("disk full")
    assert [x.read_text() for x in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        with open_atomically(tmp_path / "nowhere" / "file.txt"):
            pass
