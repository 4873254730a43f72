"""Teaches from a ledger, with no network: the same answers as before, to whoever asks the same questions."""

from potstill.errors import ConfigError
from potstill.ledger import Ledger, Question, connect, ledger_path
from potstill.models import Tokens
from potstill.teachers.asking import Asking, Prepared, address
from potstill.teachers.settings import Replay
from potstill.types import Ask, Wants


class ReplayTeacher(Asking):
    """Answers from a file. Whatever was not asked then cannot be answered now, and goes unanswered."""

    asks = False
    advice = (
        "A replay knows only the questions of the run that made the ledger: same student, recipe and seed, on the same kind "
        "of machine. Ask the teacher itself with `ledger` set to this file, and only the missing questions are paid for"
    )

    def __init__(self, settings: Replay, student: Tokens):
        path = ledger_path(settings.ledger)
        connect(path, new=False).close()
        ledger = Ledger(path, "")
        models = ledger.models()
        model = settings.model or (models[0] if len(models) == 1 else None)
        if model is None or model not in models:
            raise ConfigError(
                f"{path} holds answers of {len(models)} models ({', '.join(models) or 'none'}), but teacher.model = "
                f"{settings.model!r}. Set it to one that is there"
            )
        super().__init__(model, student, ledger, redraws=settings.redraws, max_unanswered=settings.max_unanswered)
        shown = ledger.alternatives(model)
        self._offers = Wants.TOPK if shown else Wants.TEXT if shown is None else Wants.SAMPLED

    @property
    def offers(self) -> Wants:
        """The most that it was asked for then."""
        return self._offers

    def prepare(self, ask: Ask) -> Prepared:
        """The question as it was put then; one that was not has no answers."""
        where = address(ask)
        keys = self.ledger.keys_at(where, self.name)
        if keys:
            question = self.ledger.question(keys[0])
            self.temperature = question.parameters.get("temperature", 1.0)
        else:
            unasked = {"key": "", "provider": "", "model": self.name, "prefix": ""}
            question = Question(**unasked, address=where, parameters={}, messages=())
        return Prepared(ask=ask, question=question, body=None, limit=0, read=0)
