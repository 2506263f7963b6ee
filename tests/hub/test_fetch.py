"""Fetching from a small hub on loopback: broken connections, wrong content, full disks, no network."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from small_hub import Run, SmallHub

N_BYTES = 3_000_000


@pytest.fixture
def content(hub: SmallHub) -> bytes:
    """Of the model that the hub has: its name is all that these tests look at."""
    data = np.random.default_rng(3).bytes(N_BYTES)
    hub.add("org/tiny", {"tiny-Q8_0.gguf": data, "README.md": b"# tiny\n"})
    return data


def blobs(cache: Path) -> list[Path]:
    return sorted((cache / "models--org--tiny" / "blobs").glob("*"))


def test_pull_says_what_it_fetches_and_asks_for_nothing_twice(
    hub: SmallHub, run: Run, content: bytes, cache: Path
) -> None:
    done = run("pull", "org/tiny")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert "org/tiny is not on this disk: fetching 1 file, 2.86 MiB" in done.stderr and hub.endpoint in done.stderr
    path = Path(done.stdout.strip())
    assert path.name == "tiny-Q8_0.gguf" and path.read_bytes() == content and cache in path.parents
    assert (cache / "models--org--tiny" / "refs" / "main").read_text() == hub.commit("org/tiny")
    again = run("pull", "org/tiny:q8_0")
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")
    assert hub.n_bytes_sent == N_BYTES
    hub.is_down = True
    offline = run("convert", "org/tiny", "-o", "x.gguf", HF_HUB_OFFLINE="1")  # found without a question, but no folder
    assert offline.returncode == 4 and "tiny-Q8_0.gguf" in offline.stderr, offline.stderr


def test_a_broken_connection_goes_on_where_it_was(hub: SmallHub, run: Run, cache: Path) -> None:
    n_bytes, name = 40 << 20, "tiny-Q8_0.gguf"  # huggingface_hub writes pieces of 10 MiB
    content = np.random.default_rng(4).bytes(n_bytes)
    hub.add("org/tiny", {name: content})
    hub.break_at[name] = n_bytes * 3 // 10
    done = run("pull", "org/tiny")
    assert done.returncode == 6 and "Traceback" not in done.stderr, done.stderr
    assert "`pyllamaernie pull org/tiny`" in done.stderr.splitlines()[-1]
    assert not list(cache.rglob(name))
    listed = run("list")
    assert "org/tiny" in listed.stdout and "unfinished" in listed.stdout
    part = next(path for path in blobs(cache) if path.suffix == ".incomplete")
    n_here = part.stat().st_size
    assert n_here == 10 << 20
    hub.repair()
    hub.asked.clear()
    done = run("pull", "org/tiny")
    assert done.returncode == 0, done.stderr
    assert "fetching 1 file, 30.00 MiB" in done.stderr and "10.00 MiB of 40.00 MiB are here from before" in done.stderr
    assert ("GET", name, f"bytes={n_here}-") in hub.asked
    assert Path(done.stdout.strip()).read_bytes() == content
    assert hub.n_bytes_sent == n_bytes + n_bytes * 3 // 10 - n_here
    assert [path.name for path in blobs(cache)] == [hashlib.sha256(content).hexdigest()]


def test_content_of_another_hash_is_removed(hub: SmallHub, run: Run, content: bytes, cache: Path) -> None:
    hub.damaged.add("tiny-Q8_0.gguf")
    done = run("pull", "org/tiny")
    assert done.returncode == 4 and "is not what the hub holds" in done.stderr, done.stderr
    assert not blobs(cache) and not list(cache.rglob("tiny-Q8_0.gguf"))
    hub.repair()
    done = run("pull", "org/tiny")
    assert done.returncode == 0 and Path(done.stdout.strip()).read_bytes() == content


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_is_exit_code_5(hub: SmallHub, python: Run, content: bytes, cache: Path, when: str) -> None:
    full = {
        "before": "import shutil; shutil.disk_usage = lambda path: shutil._ntuple_diskusage(9, 8, 1000)",
        "while": "import errno, huggingface_hub.file_download as d\n"
        "def full(url, file, **_): file.write(b'some'); raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "d.http_get = full",
    }[when]
    done = python(f"{full}\nimport sys; from pyllamaernie.cli import main; sys.exit(main(['pull', 'org/tiny']))")
    assert done.returncode == 5 and "Traceback" not in done.stderr, done.stderr
    assert "org/tiny" in done.stderr and not list(cache.rglob("tiny-Q8_0.gguf"))


def test_without_a_network_it_says_what_to_type(hub: SmallHub, run: Run, content: bytes) -> None:
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = run("run", "-m", "org/tiny:Q8_0", "Hi", **more)
        assert (done.returncode, done.stdout) == (6, ""), done.stderr
        assert "`pyllamaernie pull org/tiny:Q8_0`" in done.stderr.splitlines()[-1]
    assert hub.n_bytes_sent == 0


def test_repositories_and_types_that_are_not_there(hub: SmallHub, run: Run, content: bytes) -> None:
    hub.add("org/closed", {"a-Q8_0.gguf": b"x"})
    hub.gated.add("org/closed")
    for name, match in [
        ("org/nothing", "no such repository"),
        ("org/closed", "accept its terms"),
        ("org/tiny:Q4_K_M", "has no Q4_K_M; there is Q8_0"),
    ]:
        done = run("run", "-m", name, "Hi")
        assert done.returncode == 4 and match in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = run("pull", "nonsense")
    assert done.returncode == 1 and "org/name" in done.stderr
    done = run("run", "-m", "nowhere/x.gguf", "Hi")
    assert done.returncode == 4 and "no model file at nowhere/x.gguf" in done.stderr


def test_without_huggingface_hub_the_error_says_what_to_install(python: Run) -> None:
    code = "import sys, importlib.util as u; find = u.find_spec\n"
    code += "u.find_spec = lambda name, *p: None if name == 'huggingface_hub' else find(name, *p)\n"
    done = python(code + "from pyllamaernie.cli import main; sys.exit(main(['run', '-m', 'org/tiny', 'Hi']))")
    assert done.returncode == 4 and "pip install 'pyllamaernie[hub]'" in done.stderr, done.stderr
