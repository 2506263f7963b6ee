"""What is removed from the cache, and what a folder of it can become."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyllamaernie.convert import TYPES
from pyllamaernie.hub import cache, converted
from pyllamaernie.hub.names import Name


def test_a_folder_becomes_the_types_that_convert_makes() -> None:
    assert set(converted.TYPES) == {name.upper() for name in TYPES}


@pytest.mark.parametrize("asked", ["F32", "f32"])
def test_removing_a_type_leaves_what_was_converted_to_others(asked: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    ours = cache.Repo("org/m", tmp_path).ours
    for name in ("F32", "F16"):
        (ours / "0123456789ab" / name).mkdir(parents=True)
    (ours / "0123456789ab" / "F16" / "m.gguf").write_bytes(b"GGUF")
    (ours / "listing.json").write_text("{}")
    cache.remove(Name("org/m", asked), tmp_path)  # its folder is empty: an older run was cut off
    assert not (ours / "0123456789ab" / "F32").exists()
    assert (ours / "0123456789ab" / "F16" / "m.gguf").is_file() and (ours / "listing.json").is_file()
