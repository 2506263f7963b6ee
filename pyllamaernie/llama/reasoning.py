"""What a chat template says about thoughts, and one call's wishes put into the engine's words.

ERNIE 4.5 was released with three kinds of template: a switch `enable_thinking` that is off unless set (VL), a switch
`options.thinking_mode` that is open unless set (VL Thinking), and none, always thinking, with the answer between
<response> marks (21B Thinking). Thoughts and answer are told apart by the engine, from the template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyllamaernie.errors import InputError

START, END = "<think>", "</think>"
ANSWER_START, ANSWER_END = "<response>", "</response>"
KEEP_MARKS = "pyllamaernie_keep_answer_marks"  # a template variable, see options.engine_template

Render = Callable[[dict[str, Any]], str]


class Thinking:
    """How one template handles thoughts. `switch` is enable_thinking, thinking_mode, or empty.

    A `render` makes the prompt of a short question, given the template's variables; it is called when first needed.
    """

    def __init__(self, template: str, arch: str) -> None:
        self.has_thoughts = END in template
        self.wraps_answer = ANSWER_START in template
        self.switch = next((word for word in ("enable_thinking", "thinking_mode") if word in template), "")
        # ERNIE's switch is off unless set, though the engine would set it
        self.off_by_default = self.switch == "enable_thinking" and arch.startswith("ernie4_5")
        self._openings: dict[bool, str | None] = {}

    def defaults(self) -> dict[str, Any]:
        """The variables that every prompt needs unless a call sets them."""
        variables: dict[str, Any] = {"enable_thinking": False} if self.off_by_default else {}
        return {**variables, KEEP_MARKS: True} if self.wraps_answer else variables

    def template_kwargs(self, given: Mapping[str, Any], enable: bool | None, render: Render) -> dict[str, Any]:
        """The template's variables for one call. Raises: InputError when it cannot do what `enable` asks for."""
        kwargs = {**self.defaults(), **given}
        if enable is None:
            return kwargs
        if not isinstance(enable, bool):
            raise InputError(f"enable_thinking is True, False or None, got {enable!r}")
        kwargs["enable_thinking"] = enable
        if self.switch == "thinking_mode":
            options = kwargs.get("options")
            kwargs["options"] = {**(options if isinstance(options, Mapping) else {}), **_mode(enable)}
        elif not self.switch:
            if enable and not self.has_thoughts:
                raise InputError("enable_thinking=True: the chat template of this model knows no thoughts")
            if not enable and self.opening(False, render) is not None:
                raise InputError(
                    "enable_thinking=False: the chat template of this model always thinks and has no switch; "
                    "reasoning_max_tokens limits its thoughts"
                )
        return kwargs

    def is_on(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether an answer may begin with a thought, given the template's variables."""
        options = kwargs.get("options")
        if self.switch == "thinking_mode":
            return not isinstance(options, Mapping) or options.get("thinking_mode") != "close"
        return self.switch != "enable_thinking" or bool(kwargs.get("enable_thinking", True))

    def opening(self, enable: bool, render: Render) -> str | None:
        """What the template puts behind <think> at the opening of an answer, None where it opens no thought."""
        if enable not in self._openings:
            prompt = render({**self.defaults(), "enable_thinking": enable, "options": _mode(enable)})
            _, mark, rest = prompt.rpartition(START)
            self._openings[enable] = rest if mark and END not in rest else None
        return self._openings[enable]

    def budget(self, n_tokens: int | None, render: Render, count: Callable[[str], int]) -> dict[str, Any]:
        """The engine's fields for at most `n_tokens` tokens of thought, after which the thought is closed.

        `count` counts the tokens of a text.
        """
        if n_tokens is None:
            return {}
        if isinstance(n_tokens, bool) or not isinstance(n_tokens, int) or n_tokens < 0:
            raise InputError(f"reasoning_max_tokens is a whole number from 0 up, or None, got {n_tokens!r}")
        if not self.has_thoughts:
            return {}
        # the engine counts what the template has put behind <think>, and takes it for forced where the budget is 0
        fields: dict[str, Any] = {"thinking_budget_tokens": n_tokens + count(self.opening(True, render) or "")}
        if self.wraps_answer:
            fields["reasoning_budget_message"] = "\n"  # these models close a thought on a line of its own
        return fields


def _mode(enable: bool) -> dict[str, str]:
    return {"thinking_mode": "open" if enable else "close"}
