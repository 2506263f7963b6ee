"""The generator of the shapes world: its answers must be true of the pixels that it draws."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "shapes_world.py"
sys.path.insert(0, str(SCRIPT.parent))

import shapes_world as world  # noqa: E402

N_SCENES = 60


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    rng = random.Random(20)
    return [world.random_scene(rng) for _ in range(N_SCENES)]


def blobs(image: Image.Image, background: tuple[int, int, int]) -> list[np.ndarray]:
    """Return the pixels (row, column) of each connected region that is not background."""
    left = {tuple(p) for p in np.argwhere((np.asarray(image) != background).any(-1)).tolist()}
    found = []
    while left:
        edge, blob = [left.pop()], []
        while edge:
            y, x = edge.pop()
            blob.append((y, x))
            for near in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
        found.append(np.array(blob))
    return found


def test_canvas_is_within_the_stated_sizes(scenes: list[world.Scene]) -> None:
    for scene in scenes:
        sides = sorted((scene.width, scene.height))
        assert 140 <= sides[0] and sides[1] <= 336 and sides[1] <= 2 * sides[0]
        assert min(scene.background) >= 200


def test_every_number_kind_colour_and_size_occurs(scenes: list[world.Scene]) -> None:
    shapes = [shape for scene in scenes for shape in scene.shapes]
    assert {len(scene.shapes) for scene in scenes} == {1, 2, 3, 4}
    assert {shape.kind for shape in shapes} == set(world.KINDS)
    assert {shape.colour for shape in shapes} == set(world.COLOURS)
    assert {shape.size for shape in shapes} == {"small", "large"}


def test_recounted_blobs_agree_with_the_answers(scenes: list[world.Scene]) -> None:
    for scene in scenes:
        plain = dataclasses.replace(scene, scale=1)
        found = blobs(world.draw_scene(plain), scene.background)
        assert len(found) == len(scene.shapes)
        answers = dict(world.all_answers(scene))
        assert answers[world.QUESTION_MANY] == ("zero", "one", "two", "three", "four")[len(found)]
        places = []
        for blob in found:
            y, x = (blob.min(0) + blob.max(0)) / 2
            places.append(world.PLACES[int(y * 3 // scene.height)][int(x * 3 // scene.width)])
        assert sorted(places) == sorted(shape.place for shape in scene.shapes)


def test_no_shape_touches_the_edge_of_the_canvas(scenes: list[world.Scene]) -> None:
    for scene in scenes:
        pixels = np.asarray(world.draw_scene(scene)) != scene.background
        assert not (pixels[0].any() or pixels[-1].any() or pixels[:, 0].any() or pixels[:, -1].any())


def test_large_is_larger_than_small_by_far(scenes: list[world.Scene]) -> None:
    for scene in scenes:
        for shape in scene.shapes:
            share = 2 * shape.radius / min(scene.width, scene.height)
            assert share == pytest.approx(0.28 if shape.size == "large" else 0.16, rel=0.08)


def test_the_colour_is_at_the_centre_antialiased_or_not(scenes: list[world.Scene]) -> None:
    for scene in scenes:
        for scale in (1, 4):
            pixels = np.asarray(world.draw_scene(dataclasses.replace(scene, scale=scale))).astype(int)
            for shape in scene.shapes:
                assert np.abs(pixels[int(shape.y), int(shape.x)] - shape.rgb).max() <= 1


def test_antialiasing_alone_makes_mixed_colours(scenes: list[world.Scene]) -> None:
    def n_colours(scene: world.Scene, scale: int) -> int:
        pixels = np.asarray(world.draw_scene(dataclasses.replace(scene, scale=scale)))
        return len(np.unique(pixels.reshape(-1, 3), axis=0))

    stars = [scene for scene in scenes if any(shape.kind == "star" for shape in scene.shapes)]
    assert stars
    for scene in stars:
        assert n_colours(scene, 1) <= 1 + len(scene.shapes) < n_colours(scene, 4)


def test_description_is_in_reading_order(scenes: list[world.Scene]) -> None:
    order = [place for row in world.PLACES for place in row]
    for scene in scenes:
        parts = world.describe(scene).split(" and ")
        places = [order.index(part.split(" at the ")[1]) for part in parts]
        assert places == sorted(set(places)) and len(places) == len(scene.shapes)


def test_the_issues_sentences_are_spelled_exactly() -> None:
    def shape(size: str, colour: str, kind: str, row: int, column: int) -> world.Shape:
        return world.Shape(kind, colour, size, row, column, 10.0, 10.0, 5.0, (0, 0, 0), ())

    scene = world.Scene(
        200, 200, (255, 255, 255), 1, (shape("large", "red", "circle", 0, 0), shape("small", "blue", "square", 1, 1))
    )
    answers = dict(world.all_answers(scene))
    assert (
        answers["What is in the picture?"] == "a large red circle at the top left and a small blue square at the centre"
    )
    assert answers["How many shapes are there?"] == "two"
    assert answers["What colour is the circle?"] == "red"
    assert answers["Where is the square?"] == "centre"
    assert answers["Is there a green triangle?"] == "no"
    assert answers["Is there a red circle?"] == "yes"
    assert answers["Is there an orange star?"] == "no"


def test_only_the_one_of_its_kind_is_asked_for(scenes: list[world.Scene]) -> None:
    for scene in scenes:
        asked = {
            q.removeprefix("Where is the ").rstrip("?") for q, _ in world.all_answers(scene) if q.startswith("Where")
        }
        kinds = [shape.kind for shape in scene.shapes]
        assert asked == {kind for kind in kinds if kinds.count(kind) == 1}


def test_yes_and_no_are_about_equally_frequent(scenes: list[world.Scene]) -> None:
    rng = random.Random(3)
    answers = [world.ask(scene, "there", rng)[1] for scene in scenes for _ in range(10)]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def test_unknown_sort_of_question_is_refused(scenes: list[world.Scene]) -> None:
    with pytest.raises(ValueError, match="'how'"):
        world.ask(scenes[0], "how", random.Random(0))


def test_pairs_never_tie_and_the_answer_counts() -> None:
    rng = random.Random(4)
    seen = set()
    for _ in range(40):
        pair = world.random_pair(rng)
        question, answer = world.ask_pair(pair)
        counts = [len(blobs(world.draw_scene(dataclasses.replace(scene, scale=1)), scene.background)) for scene in pair]
        assert question == "Which picture has more shapes?"
        assert answer == ("first" if counts[0] > counts[1] else "second")
        seen.add(answer)
    assert seen == {"first", "second"}
    with pytest.raises(ValueError, match="different numbers"):
        world.ask_pair((pair[0], pair[0]))


def test_clips_move_the_way_they_say_and_stay_on_the_canvas() -> None:
    rng = random.Random(5)
    seen = set()
    for _ in range(30):
        clip = world.random_clip(rng, 6)
        question, answer = world.ask_clip(clip)
        assert question == f"Which way does the {clip.scene.shapes[0].kind} move?"
        frames = world.draw_clip(clip)
        boxes = []
        for frame in frames:
            pixels = np.argwhere((np.asarray(frame) != clip.scene.background).any(-1))
            assert pixels.min() > 0 and pixels[:, 0].max() < frame.height - 1 and pixels[:, 1].max() < frame.width - 1
            boxes.append((pixels.min(0) + pixels.max(0)) / 2)
        dy, dx = boxes[-1] - boxes[0]
        way = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        assert answer == way
        seen.add(way)
    assert seen == {"left", "right", "up", "down"}


def test_same_seed_same_picture_other_seed_another() -> None:
    def pixels(seed: int) -> bytes:
        return world.draw_scene(world.random_scene(random.Random(seed))).tobytes()

    assert pixels(1) == pixels(1)
    assert pixels(1) != pixels(2)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, timeout=60)


def test_command_line_writes_a_picture_and_its_answers(tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    done = run(str(out), "--seed", "7", "--shapes", "3")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    scene = world.random_scene(random.Random(7), 3)
    assert result["files"] == [str(out)]
    with Image.open(out) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(world.draw_scene(scene)))
    assert {"question": "How many shapes are there?", "answer": "three"} in result["answers"]
    assert [shape["place"] for shape in result["shapes"][0]] == [shape.place for shape in scene.shapes]


def test_command_line_writes_pairs_and_clips(tmp_path: Path) -> None:
    pair = json.loads(run(str(tmp_path / "pair.png"), "--what", "pair", "--seed", "3").stdout)
    assert [Path(file).name for file in pair["files"]] == ["pair-1.png", "pair-2.png"]
    assert all(Path(file).is_file() for file in pair["files"])
    assert pair["answers"][0]["answer"] == ("first" if len(pair["shapes"][0]) > len(pair["shapes"][1]) else "second")
    clip = json.loads(run(str(tmp_path / "clip.gif"), "--what", "clip", "--seed", "3", "--frames", "5").stdout)
    with Image.open(clip["files"][0]) as film:
        assert film.n_frames == 5
    assert clip["answers"][0]["answer"] in ("left", "right", "up", "down")


def test_command_line_refuses_a_clip_of_one_frame(tmp_path: Path) -> None:
    done = run(str(tmp_path / "clip.gif"), "--what", "clip", "--frames", "1")
    assert done.returncode == 2 and "--frames" in done.stderr
