"""OpenAI's chat completions, and every endpoint that is compatible with them (`base_url`)."""

from typing import Any

from potstill.teachers.http import usage
from potstill.teachers.line import Failed, Reply
from potstill.teachers.providers.base import Access, Turns, failures

KEYS = ("OPENAI_API_KEY",)
MOST = 16
ENDS = {"stop": "stop", "content_filter": "refusal"}
REFUSABLE = {
    "n": r"\bn\b|number of (choices|completions)",
    "reasoning_effort": r"reasoning",
    "prompt_cache_key": r"prompt_cache_key",
    "chat_template_kwargs": r"chat_template_kwargs",
}
"""Fields that some model or server does not know, and how its error names them. Without them it does as well."""


class OpenAI:
    """A server of one's own may have samplers on by default, so it is told; OpenAI's models take only what they know."""

    def __init__(self, access: Access):
        import openai

        self.sdk, self.access = openai, access
        s = access.settings
        self.client = openai.AsyncOpenAI(
            api_key=access.key.reveal() or "none",
            base_url=s.base_url,
            http_client=access.http,
            max_retries=0,
            timeout=s.timeout,
        )

    async def ask(self, turns: Turns) -> Reply:
        """One completion with n choices. What is refused is left out, and asked again."""
        without = frozenset(self.access.features.refused)
        async with failures(self.sdk.APIError, self._failed):
            try:
                found = await self.client.chat.completions.create(**self.body(turns))
            except (self.sdk.BadRequestError, self.sdk.UnprocessableEntityError) as error:
                if self.access.features.drop(self._failed(error), REFUSABLE, without):
                    return await self.ask(turns)
                raise
            choices = sorted(found.choices, key=lambda c: c.index)
            if not choices:
                raise Failed("an answer without choices")
            return Reply(
                texts=tuple(c.message.content or c.message.refusal or "" for c in choices),
                finishes=tuple(
                    "refusal" if c.message.refusal else ENDS.get(c.finish_reason or "", "length") for c in choices
                ),
                **usage(found.usage.model_dump() if found.usage else {}),
            )

    def body(self, turns: Turns) -> dict[str, Any]:
        """The request, without what was refused before."""
        s, refused = self.access.settings, self.access.features.refused
        messages: list[dict[str, Any]] = [dict(m) for m in turns.messages]
        body: dict[str, Any] = {"model": s.model, "messages": messages}
        extra: dict[str, Any] = {}
        if turns.prefill:
            messages.append({"role": "assistant", "content": turns.prefill, "prefix": True})
            extra |= {"continue_final_message": True, "add_generation_prompt": False}
        sampling = {"temperature": s.temperature, "top_p": s.top_p}
        if s.base_url is None:
            body["max_completion_tokens"] = turns.max_tokens
            body |= {name: value for name, value in sampling.items() if value != 1}
            body["prompt_cache_key"] = turns.shared
            if s.thinking_tokens == 0:
                body["reasoning_effort"] = "none"
        else:
            body |= {"max_tokens": turns.max_tokens, **sampling}
            if s.thinking_tokens == 0:
                extra["chat_template_kwargs"] = {"enable_thinking": False}
        if turns.n > 1:
            body["n"] = turns.n
        for name in refused:
            body.pop(name, None)
            extra.pop(name, None)
        return body | ({"extra_body": extra} if extra else {})

    def _failed(self, error: Any) -> Failed:
        if isinstance(error, self.sdk.APIStatusError):
            told = str(error.message)
            if told == f"Error code: {error.status_code}":  # the SDK looks only for OpenAI's form of an error
                told = error.response.text[:400]
            return Failed(told, error.status_code, error.response.headers)
        return Failed(f"{type(error).__name__}: {error}")
