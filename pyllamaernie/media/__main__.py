"""`python -m pyllamaernie.media FILE`: the frames that ERNIE 4.5 sees of a video, for the bundled programs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pyllamaernie.errors import PyllamaernieError
from pyllamaernie.media import frames as rules
from pyllamaernie.media.video import Video


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pyllamaernie.media",
        description="Write the frames that ERNIE 4.5 sees of a video to stdout, in the native programs' container.",
    )
    parser.add_argument("file", metavar="FILE", help="the video; - reads it from stdin")
    for name, kind, what in (
        ("--min-pixels", int, "smallest area of a frame"),
        ("--max-pixels", int, "largest area of a frame"),
        ("--fps", float, "frames taken per second (2)"),
        ("--min-frames", int, "frames taken of a short video (16)"),
        ("--max-frames", int, "frames taken of a long video (180)"),
        ("--start", float, "begin there, in seconds"),
        ("--end", float, "end before, in seconds"),
    ):
        parser.add_argument(name, type=kind, help=what)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program described by `--help`; the exit code is 0, or that of the error it printed."""
    options = {name: value for name, value in vars(_arguments().parse_args(arguments)).items() if value is not None}
    file = options.pop("file")
    options.setdefault("max_pixels", rules.MAX_PIXELS)
    try:
        video = Video.of(sys.stdin.buffer.read() if file == "-" else file, **options)
        sys.stdout.buffer.write(video.to_frames_bytes())
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # keeps the exit from failing a second time
        return 1
    except PyllamaernieError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
