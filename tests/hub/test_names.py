"""What a name means: a path or a repository, and which of its files. Nothing is fetched here."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyllamaernie.errors import HubError, InputError
from pyllamaernie.hub.choice import UNQUANTIZED, Wish, choose, type_of
from pyllamaernie.hub.names import Name, hub_name, parse

GGUFS = [
    "ERNIE-BF16.gguf",
    "ERNIE-Q4_K_M.gguf",
    "ERNIE-UD-Q4_K_XL.gguf",
    "Q8_0/ERNIE-Q8_0-00001-of-00002.gguf",
    "Q8_0/ERNIE-Q8_0-00002-of-00002.gguf",
    "README.md",
    "imatrix.gguf",
    "mmproj-ERNIE-BF16.gguf",
    "mmproj-F16.gguf",
    "mmproj-F32.gguf",
    "mtp-ERNIE-Q4_K_M.gguf",
]
FOLDER = [
    "config.json",
    "consolidated.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "original/model.safetensors",
    "picture.png",
    "pytorch_model.bin",
    "tokenizer.model",
    "training.pt",
]


def test_a_path_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("org/name") == Name("org/name")
    assert parse("org/ERNIE-4.5:q4_k_m") == Name("org/ERNIE-4.5", "q4_k_m")
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse("org/name") is None and hub_name("org/name") == Name("org/name")
    for path in ("model.gguf", "models/x.gguf", "models/x.GGUF", "/org/name", "./org/name", "a/b/c", "..", "name", ""):
        assert parse(path) is None, path
    for wrong in ("name", "a/b/c", "org/name:", "org/name:a:b"):
        with pytest.raises(InputError, match="org/name"):
            hub_name(wrong)


def test_types_in_names() -> None:
    for stem, type in [
        ("ERNIE-4.5-21B-A3B-PT-Q4_K_M", "Q4_K_M"),
        ("ernie.q8_0", "Q8_0"),
        ("x-UD-IQ2_XXS", "UD-IQ2_XXS"),
        ("x-fp16", "F16"),
        ("x-CCQ2_5", "CCQ2_5"),
        ("BF16/ernie", "BF16"),
        ("ERNIE-4.5-0.3B", ""),
    ]:
        assert type_of(stem) == type, stem


def test_the_file_of_a_type_all_parts_and_what_goes_with_it() -> None:
    found = choose(Name("org/e", "q8_0"), GGUFS)
    assert found.parts == ("Q8_0/ERNIE-Q8_0-00001-of-00002.gguf", "Q8_0/ERNIE-Q8_0-00002-of-00002.gguf")
    assert (found.mmproj, found.mtp) == ("mmproj-F16.gguf", "mtp-ERNIE-Q4_K_M.gguf")
    assert choose(Name("org/e", "ud-q4_k_xl"), GGUFS).parts == ("ERNIE-UD-Q4_K_XL.gguf",)
    assert choose(Name("org/e", "bf16"), GGUFS).mmproj == "mmproj-ERNIE-BF16.gguf"  # it says whose it is
    assert choose(Name("org/e"), GGUFS).parts == ("ERNIE-Q4_K_M.gguf",)
    assert choose(Name("org/e"), GGUFS, Wish(prefer=UNQUANTIZED)).parts == ("ERNIE-BF16.gguf",)
    assert choose(Name("org/e"), GGUFS[2:5]).parts[0].startswith("Q8_0/")
    assert choose(Name("org/e"), GGUFS[2:3]).parts == ("ERNIE-UD-Q4_K_XL.gguf",)
    assert choose(Name("org/e"), GGUFS, Wish(filename="*UD*")).parts == ("ERNIE-UD-Q4_K_XL.gguf",)
    assert "README.md" in choose(Name("org/e"), GGUFS, Wish(more=("*.md",))).files


@pytest.mark.parametrize(
    ("name", "files", "wish", "match"),
    [
        ("org/e:Q2_K", GGUFS, Wish(), "has no Q2_K; there is BF16, Q4_K_M, UD-Q4_K_XL, Q8_0"),
        ("org/e", ["a-Q5_K_M.gguf", "a-Q6_K.gguf"], Wish(), "Q5_K_M, Q6_K"),
        ("org/e", ["a-Q8_0.gguf", "b-Q8_0.gguf"], Wish(), "a-Q8_0, b-Q8_0"),
        ("org/e:Q8_0", ["a-Q8_0.gguf", "b-Q8_0.gguf"], Wish(), "a-Q8_0, b-Q8_0"),
        ("org/e", ["a-Q8_0-00002-of-00002.gguf"], Wish(), "part 1 is not there"),
        ("org/e", ["README.md", "model.bin"], Wish(), "neither GGUF"),
        ("org/e", GGUFS, Wish(filename="*Q4*"), "several models fit"),
    ],
)
def test_what_is_ambiguous_or_missing_is_listed(name: str, files: list[str], wish: Wish, match: str) -> None:
    with pytest.raises(HubError, match=match):
        choose(hub_name(name), files, wish)


def test_the_name_of_a_file_tells_equal_types_apart() -> None:
    assert choose(Name("org/e", "b-q8_0"), ["a-Q8_0.gguf", "b-Q8_0.gguf"]).parts == ("b-Q8_0.gguf",)


def test_a_folder_without_doubles_weights_last() -> None:
    files = choose(Name("org/e"), FOLDER).files
    assert files == (
        "config.json",
        "model.safetensors.index.json",
        "tokenizer.model",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    )
    both = [*FOLDER, *GGUFS]
    assert choose(Name("org/e"), both).parts and not choose(Name("org/e"), both).folder
    assert choose(Name("org/e"), both, Wish(folder_first=True)).folder
    assert choose(Name("org/e", "BF16"), both, Wish(folder_first=True)).parts
