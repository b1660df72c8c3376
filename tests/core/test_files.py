"""What is written aside: whole under its name, or not there."""

import os
import threading

import pytest

from memtrain.core.files import written_aside


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_appears_when_it_is_whole_and_half_a_one_never(tmp_path, shared):
    path = tmp_path / "a.txt"
    with written_aside(path, shared) as aside:
        aside.write_text("first")
        assert aside.parent == tmp_path and aside.suffix == ".txt" and not path.exists()
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(KeyboardInterrupt), written_aside(path, shared) as aside, aside.open("w") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(FileNotFoundError), written_aside(path, shared):
        pass  # nothing was written
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_takes_the_place_of_an_empty_one_alone(tmp_path):
    for name in ("there", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "mine").touch()
    for name in ("new", "empty"):
        with written_aside(tmp_path / name, shared=True) as aside:
            aside.mkdir()
            (aside / "part").touch()
        assert os.listdir(tmp_path / name) == ["part"]
    with pytest.raises(OSError, match="not empty"), written_aside(tmp_path / "there", shared=True) as aside:
        aside.mkdir()
        (aside / "part").touch()
    assert os.listdir(tmp_path / "there") == ["mine"] and sorted(os.listdir(tmp_path)) == ["empty", "new", "there"]


def test_what_a_killed_writer_left_is_replaced_and_never_written_through(tmp_path):
    (tmp_path / "kept").write_text("kept")
    with written_aside(tmp_path / "link") as aside:
        left = aside
        aside.symlink_to("kept")
    left.symlink_to("kept")  # as one that was killed
    with written_aside(tmp_path / "link") as aside:
        assert aside == left
        aside.write_text("new")
    assert (tmp_path / "link").read_text() == "new" and (tmp_path / "kept").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["kept", "link"]


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Each of them writes half, waits for the others, and writes the rest."""
    path, barrier = tmp_path / "a", threading.Barrier(4)

    def write(letter: str) -> None:
        with written_aside(path, shared=True) as aside, aside.open("w") as file:
            file.write(letter * 10_000)
            file.flush()
            barrier.wait()
            file.write(letter * 10_000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in [letter * 20_000 for letter in "abcd"] and os.listdir(tmp_path) == ["a"]
