"""Chat: messages through the model's template into an answer, with thoughts, tools and schemas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from pyllamaernie.errors import ChatTemplateError, InputError
from pyllamaernie.llama.answers import Tidy
from pyllamaernie.llama.keywords import ChatOptions, filled, sampling, shows
from pyllamaernie.llama.messages import normalize
from pyllamaernie.llama.reasoning import Thinking
from pyllamaernie.llama.schema import response_format
from pyllamaernie.llama.tokens import Tokens
from pyllamaernie.llama.tools import check_template, tidy_messages, tool_fields

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Chat(Tokens):
    """The methods that take messages."""

    _has_template: bool
    _thinking: Thinking  # how the template handles thoughts
    _chat_template_kwargs: dict[str, Any]  # the constructor's

    @overload
    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Unpack[ChatOptions]
    ) -> dict[str, Any]: ...
    @overload
    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Unpack[ChatOptions]
    ) -> Iterator[dict[str, Any]]: ...
    @overload
    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: bool, **options: Unpack[ChatOptions]
    ) -> dict[str, Any] | Iterator[dict[str, Any]]: ...
    @shows(ChatOptions)
    def create_chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Unpack[ChatOptions]
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """The assistant's answer as an OpenAI-shaped dict, or with `stream` an iterator of chunks; closing it cancels.

        Content is a string or a list of parts; a picture part holds a path, bytes, data: URL, PIL image or array.
        `temperature` 0 is greedy. `max_tokens` None runs to the end of the answer or of the context; thoughts count.
        `enable_thinking`: None is the model's default, which for ERNIE means no thinking; thoughts are kept apart
        in `reasoning_content`. `reasoning_max_tokens` closes a thought after that many tokens, then the answer follows.
        `chat_template_kwargs` are variables of the template, over those given to the constructor.
        `tools`, `tool_choice` ("auto", "none", "required" or one function): calls are in `tool_calls`.
        `response_format` holds the answer to a JSON schema. `stream_options={"include_usage": True}` adds a last chunk
        without choices. `reasoning_format`: "auto", "deepseek" or "none", which leaves thoughts in the content.
        Raises: InputError and its kind, ContextOverflowError, ClosedError, InferenceError.
        """
        given = filled(Chat.create_chat_completion, options)
        self._require_open()
        tools = given["tools"]
        fields = _optional_fields(given)
        body = sampling(given, stream=stream)
        body.update(self._chat_body(messages, given["enable_thinking"], given["chat_template_kwargs"], tools))
        if not self._thinking.is_on(body["chat_template_kwargs"]):
            fields["reasoning_format"] = None  # "none" would put the empty thought of the prompt into the answer
        body.update(self._thinking.budget(given["reasoning_max_tokens"], self._short_prompt, self._n_tokens))
        body.update(tool_fields(tools, given["tool_choice"], given["parallel_tool_calls"]))
        body.update({key: value for key, value in fields.items() if value is not None})
        result = self.request("chat/completions", body)
        # the template sets thoughts, answer and calls off by newlines, some of which the engine counts to the text
        keeps_all = fields["reasoning_format"] == "none"
        tidy = Tidy(
            thoughts=self._thinking.has_thoughts and not keeps_all,
            calls=bool(tools),
            marks=self._thinking.wraps_answer and not keeps_all,
        )
        return tidy.chunks(result) if stream else tidy.answer(result)

    def apply_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        enable_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt that `create_chat_completion` would tokenize; each picture appears as the engine's own marker."""
        body = self._chat_body(messages, enable_thinking, chat_template_kwargs, tools)
        body.update(tool_fields(tools, None, None))
        body["add_generation_prompt"] = add_generation_prompt
        return str(self.request("apply-template", body)["prompt"])

    def _chat_body(
        self,
        messages: Sequence[Mapping[str, Any]],
        enable_thinking: bool | None,
        chat_template_kwargs: Mapping[str, Any] | None,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> dict[str, Any]:
        self._require_open()
        if not self._has_template:
            raise ChatTemplateError(f"{self.model_path} has no chat template; give one as chat_template")
        if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
            raise InputError(f"chat_template_kwargs maps names to values, got {chat_template_kwargs!r}")
        kwargs = {**self._chat_template_kwargs, **(chat_template_kwargs or {})}
        kwargs = self._thinking.template_kwargs(kwargs, enable_thinking, self._short_prompt)
        normalized = tidy_messages(normalize(messages, self.load_image, load_video=self.load_video))
        check_template(tools, normalized, self._props["chat_template_caps"], self.header.path.name)
        return {"messages": normalized, "chat_template_kwargs": kwargs}

    def _short_prompt(self, variables: dict[str, Any]) -> str:
        body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": variables}
        return str(self.request("apply-template", body)["prompt"])

    def _n_tokens(self, text: str) -> int:
        return len(self.tokenize(text, add_bos=False, special=True))


def _optional_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's fields that a call may leave open, as None. Raises: InputError, SchemaError."""
    format_ = response_format(given["response_format"])
    if given["tools"] and format_:
        raise InputError("tools and response_format exclude each other: an answer in a schema cannot be a call")
    if given["tools"] and given["grammar"]:
        raise InputError("tools and grammar exclude each other: the grammar of the calls comes from the template")
    if given["reasoning_format"] not in (None, "auto", "deepseek", "none"):
        raise InputError(f"reasoning_format is one of auto, deepseek, none, got {given['reasoning_format']!r}")
    names = ("logprobs", "top_logprobs", "reasoning_format", "stream_options", "model")
    return {**{name: given[name] for name in names}, "response_format": format_}
