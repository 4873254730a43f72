"""Gemini, through Google's Gen AI SDK."""

from typing import Any

from potstill.teachers.line import Failed, Reply
from potstill.teachers.providers.base import NEEDS_THINKING, Access, Turns, failures

KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
MOST = 8
REFUSABLE = {"n": r"[cC]andidate"}
ROLES = {"user": "user", "assistant": "model"}
ENDS = {"STOP": "stop", "MAX_TOKENS": "length"}
"""Of the other reasons, all that begin with neither is a refusal of some sort: SAFETY, RECITATION, BLOCKLIST, ..."""


class Google:
    """Repeated beginnings are cached by Google itself."""

    def __init__(self, access: Access):
        from google import genai
        from google.genai import errors, types

        self.types, self.errors, self.access = types, errors, access
        s = access.settings
        options = types.HttpOptions(
            base_url=s.base_url,
            timeout=round(1000 * s.timeout),
            httpx_async_client=access.http,
            retry_options=types.HttpRetryOptions(attempts=1),
        )
        self.client = genai.Client(api_key=access.key.reveal(), vertexai=False, http_options=options)

    async def ask(self, turns: Turns) -> Reply:
        """One request with n candidates."""
        s, without = self.access.settings, frozenset(self.access.features.refused)
        async with failures(self.errors.APIError, self._failed):
            try:
                found = await self.client.aio.models.generate_content(
                    model=s.model, contents=self.contents(turns), config=self.config(turns)
                )
            except self.errors.ClientError as error:
                failed = self._failed(error)
                if self.access.features.drop(failed, REFUSABLE, without):
                    return await self.ask(turns)
                if failed.status == 400 and "hinking" in failed.message and s.thinking_tokens == 0:
                    raise Failed(NEEDS_THINKING.format(model=s.model, said=failed.message), 400) from None
                raise
            candidates = found.candidates or []
            if not candidates and found.prompt_feedback is None:
                raise Failed("an answer without candidates")
            u = found.usage_metadata
            return Reply(
                texts=tuple(self._text(c) for c in candidates) or ("",),
                finishes=tuple(self._finish(c) for c in candidates) or ("refusal",),
                read=(u and u.prompt_token_count) or 0,
                cached=(u and u.cached_content_token_count) or 0,
                written=((u and u.candidates_token_count) or 0) + ((u and u.thoughts_token_count) or 0),
            )

    def contents(self, turns: Turns) -> list[Any]:
        """The conversation without its system message."""
        said = [m for m in turns.messages if m["role"] != "system"]
        if turns.prefill:
            said = [*said, {"role": "assistant", "content": turns.prefill}]
        part = self.types.Part
        return [self.types.Content(role=ROLES[m["role"]], parts=[part(text=m["content"])]) for m in said]

    def config(self, turns: Turns) -> Any:
        """Sampling, and as little thinking as the model allows: none in Gemini 2, `minimal` later."""
        s = self.access.settings
        system = [m["content"] for m in turns.messages if m["role"] == "system"]
        old = s.model.startswith("gemini-2")
        level = self.types.ThinkingLevel.LOW if s.thinking_tokens else self.types.ThinkingLevel.MINIMAL
        thinking = {"thinking_budget": s.thinking_tokens} if old else {"thinking_level": level}
        return self.types.GenerateContentConfig(
            system_instruction="\n\n".join(system) or None,
            temperature=s.temperature,
            top_p=s.top_p,
            max_output_tokens=turns.max_tokens,
            candidate_count=turns.n if turns.n > 1 else None,
            thinking_config=self.types.ThinkingConfig(**thinking),
        )

    @staticmethod
    def _text(candidate: Any) -> str:
        parts = (candidate.content and candidate.content.parts) or []
        return "".join(p.text for p in parts if p.text and not p.thought)

    @staticmethod
    def _finish(candidate: Any) -> str:
        reason = candidate.finish_reason
        return ENDS.get(getattr(reason, "value", reason) or "STOP", "refusal")

    def _failed(self, error: Any) -> Failed:
        headers = getattr(error.response, "headers", None)
        return Failed(str(error.message or error), error.code, headers)
