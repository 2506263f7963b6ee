"""What all methods of an open model share: its facts, requests to its engine, and media made to fit its projector.

Not how it is opened and closed: that is `llama.py`, whose constructor sets the attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllamaernie import _core
from pyllamaernie.errors import ClosedError, InputError, UnsupportedInputError
from pyllamaernie.gguf.header import Header
from pyllamaernie.llama import engine
from pyllamaernie.llama.context import ContextOptions
from pyllamaernie.llama.limits import fitted, image_limits, video_limits
from pyllamaernie.media.image import Image, check_sides
from pyllamaernie.media.video import Video


class Loaded:
    """An open model."""

    model_path: str
    mmproj_path: str | None
    metadata: dict[str, Any]
    verbose: bool
    allow_remote: bool
    header: Header  # of the model's file
    projector: Header | None  # of the projector's
    engine: _core.Engine
    context_options: ContextOptions  # for another context on the same weights
    _info: Mapping[str, Any]  # of the vocabulary and the weights
    _props: Mapping[str, Any]  # of the engine
    _image_tokens: tuple[int | None, int | None]
    _closed: bool

    def n_ctx(self) -> int:
        """Tokens that one conversation can hold."""
        return int(self._props["default_generation_settings"]["n_ctx"])

    def n_ctx_train(self) -> int:
        """Tokens that the model was trained for."""
        return int(self._info["n_ctx_train"])

    def n_vocab(self) -> int:
        return int(self._info["n_vocab"])

    def n_embd(self) -> int:
        return int(self._info["n_embd"])

    def token_bos(self) -> int:
        return int(self._info["token_bos"])

    def token_eos(self) -> int:
        return int(self._info["token_eos"])

    def token_eot(self) -> int:
        """The end of a turn; -1 where the vocabulary has none."""
        return int(self._info["token_eot"])

    def token_nl(self) -> int:
        return int(self._info["token_nl"])

    def adds_bos(self) -> bool:
        """Whether a text of this model begins with `token_bos`."""
        return bool(self._info["add_bos"])

    def media_marker(self) -> str:
        """What stands for a picture in the prompts of `apply_template`."""
        return str(self._props["media_marker"])

    def request(self, route: str, body: Mapping[str, Any]) -> Any:
        """The engine's answer to one JSON request; with `stream` in it an iterator of chunks. Closing that cancels.

        Raises: ClosedError, InputError and its kind, ContextOverflowError, InferenceError.
        """
        self._require_open()
        return engine.request(self.engine, route, body, lambda: self._closed)

    def load_image(self, source: Any) -> Image:
        """A picture in any form that `Image.of` takes, at the size that the projector wants.

        Raises: MediaError, UnsupportedInputError, InputError for one that the reference refuses.
        """
        projector = self._require_projector()
        image = Image.of(source, allow_remote=self.allow_remote)
        check_sides(image.width, image.height, "a picture of {} is", InputError)
        limits = image_limits(projector, *self._image_tokens)
        return image if limits is None else fitted(image, limits)

    def load_video(self, source: Any, *, keep_size: bool = False, **options: Any) -> Video:
        """A video in any form that `Video.of` takes, with its options; its frames at the projector's size by default.

        Raises: MediaError, UnsupportedInputError.
        """
        limits = video_limits(self._require_projector())
        if limits is None:
            raise UnsupportedInputError(f"{self.mmproj_path} takes no videos; its model takes pictures only")
        if not keep_size:
            options = {"min_pixels": limits[0], "max_pixels": limits[1], **options}
        return Video.of(source, allow_remote=self.allow_remote, **options)

    def _require_projector(self) -> Header:
        if self.projector is None:
            raise UnsupportedInputError(
                f"{self.header.path.name} was loaded without a projector, so it takes no pictures and no videos; "
                "give its mmproj file"
            )
        return self.projector

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError("this Llama is closed; load the model again")
