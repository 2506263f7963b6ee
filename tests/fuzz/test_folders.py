"""A slice of the odd folders of `folders.py`, in this process: each is converted, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import folders
import odd_folders
import pytest

from pyllamaernie.convert import convert


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("bases")
    odd_folders.write_bases(home)
    return home


def test_odd_folders_are_converted_or_refused_in_one_line(bases: Path, tmp_path: Path) -> None:
    results = []
    for number in range(60):
        home = tmp_path / str(number)
        home.mkdir()
        results.append(folders.convert(7, number, bases, home))
    assert {result.kind for result in results} == {folders.CONVERTED, folders.REFUSED}, folders.report(results, 7)


@pytest.mark.parametrize("name", odd_folders.NAMES)
def test_the_sound_folders_convert(name: str, bases: Path, tmp_path: Path) -> None:
    original = bases / "original" if name == odd_folders.TWO_BIT else None
    assert convert(bases / name, tmp_path / "x.gguf", original=original).model.is_file()


def test_the_same_number_of_a_seed_is_the_same_folder(bases: Path, tmp_path: Path) -> None:
    seen = []
    for home in (tmp_path / "a", tmp_path / "b"):
        home.mkdir()
        result = folders.convert(7, 3, bases, home)
        seen.append((result.kind, result.done[:-1], result.text.replace(str(home), "")))
    assert seen[0] == seen[1]
