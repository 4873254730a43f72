"""Claude, through Anthropic's Messages API."""

from collections.abc import Mapping
from typing import Any

from potstill.teachers.line import Failed, Reply
from potstill.teachers.providers.base import NEEDS_THINKING, Access, Turns, failures

KEYS = ("ANTHROPIC_API_KEY",)
MOST = 1
"""Answers to one request."""
CACHED = {"cache_control": {"type": "ephemeral"}}
ENDS = {"end_turn": "stop", "stop_sequence": "stop", "refusal": "refusal"}
THINKS = r"thinking"


class Anthropic:
    """Prompt and prefix end in cache points of their own, so that later anchors find the one and other draws the other."""

    def __init__(self, access: Access):
        import anthropic

        self.sdk, self.access = anthropic, access
        s = access.settings
        self.client = anthropic.AsyncAnthropic(
            api_key=access.key.reveal(),
            base_url=s.base_url,
            http_client=access.http,
            max_retries=0,
            timeout=s.timeout,
        )

    async def ask(self, turns: Turns) -> Reply:
        """One message."""
        body = self.body(turns)
        async with failures(self.sdk.APIError, self._failed):
            try:
                found = await self.client.messages.create(**body)
            except self.sdk.BadRequestError as error:
                if "thinking" in body and "thinking" in error.message:
                    said = NEEDS_THINKING.format(model=self.access.settings.model, said=error.message)
                    raise Failed(said, 400) from None
                raise
            return Reply(
                texts=("".join(block.text for block in found.content if block.type == "text"),),
                finishes=(ENDS.get(found.stop_reason or "", "length"),),
                **self._usage(found.usage),
            )

    def body(self, turns: Turns) -> dict[str, Any]:
        """The request: temperature and top_p are left out at 1, which is the default and, for some models, the law."""
        s = self.access.settings
        system = [m["content"] for m in turns.messages if m["role"] == "system"]
        messages = [self._message(m) for m in turns.messages if m["role"] != "system"]
        messages[-1]["content"][-1] |= CACHED
        if turns.prefill:
            messages.append(self._message({"role": "assistant", "content": turns.prefill}))
            if turns.reused:
                messages[-1]["content"][-1] |= CACHED
        body: dict[str, Any] = {"model": s.model, "max_tokens": turns.max_tokens, "messages": messages}
        if system:
            body["system"] = "\n\n".join(system)
        if s.thinking_tokens == 0:
            body["thinking"] = {"type": "disabled"}
        sampling = {"temperature": s.temperature, "top_p": s.top_p}
        return body | {name: value for name, value in sampling.items() if value != 1}

    @staticmethod
    def _message(m: Mapping[str, str]) -> dict[str, Any]:
        return {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]}

    @staticmethod
    def _usage(u: Any) -> dict[str, Any]:
        cached, stored = u.cache_read_input_tokens or 0, u.cache_creation_input_tokens or 0
        read = u.input_tokens + cached + stored
        return {"read": read, "cached": cached, "stored": stored, "written": u.output_tokens}

    def _failed(self, error: Any) -> Failed:
        response = getattr(error, "response", None)
        if isinstance(error, self.sdk.APIStatusError):
            return Failed(str(error.message), error.status_code, response.headers if response is not None else None)
        return Failed(f"{type(error).__name__}: {error}")
