"""From a worker's message to a queued sequence: is it valid, is there room, is its grammar compiled."""

from __future__ import annotations

import logging

from nioserve.engine.admission import Admission
from nioserve.engine.grammar.compiler import GrammarCompiler
from nioserve.engine.grammar.matcher import Matcher
from nioserve.engine.grammar.source import GrammarError
from nioserve.engine.grammar.waiting import WaitingRoom
from nioserve.engine.limits import Limits
from nioserve.engine.messages import Rejected, Submit
from nioserve.engine.sampling import SamplerState
from nioserve.engine.scheduler import Scheduler
from nioserve.engine.sequence import Sequence
from nioserve.engine.speculate import Drafter
from nioserve.models.spec import ModelSpec

log = logging.getLogger(__name__)


class Intake:
    """Takes requests in. Those whose grammar is being compiled are `compiling` until it is."""

    def __init__(
        self, spec: ModelSpec, scheduler: Scheduler, admission: Admission, limits: Limits,
        grammars: GrammarCompiler | None,
    ) -> None:  # fmt: skip
        self._scheduler, self._admission, self._limits = scheduler, admission, limits
        self._vocabulary, self._eos = spec.vocab_size, frozenset(spec.eos_token_ids)
        self.compiling = WaitingRoom(grammars)

    def submit(self, worker: bytes, request: Submit) -> Rejected | None:
        """Take a request, or return why not."""
        if not self._valid(request):
            return Rejected(request.request_id, "invalid", 0)
        grammar = request.sampling.grammar
        refused = self._admission.refuse(request, len(self.compiling) if grammar is not None else 0)
        if refused is not None:
            return refused
        if grammar is None:
            self._queue(worker, request, None)
        elif not self.compiling.add(worker, request, grammar):
            return Rejected(request.request_id, "invalid", 0)
        return None

    def queue_compiled(self) -> list[tuple[bytes, str]]:
        """Queue the requests whose grammars are ready; return those whose grammars cannot be used."""
        failed = []
        for worker, request, outcome in self.compiling.take_ready():
            if isinstance(outcome, GrammarError):
                log.error("a grammar failed", extra={"request_id": request.request_id, "problem": str(outcome)})
                failed.append((worker, request.request_id))
            else:
                self._queue(worker, request, outcome)
        return failed

    def _queue(self, worker: bytes, request: Submit, matcher: Matcher | None) -> None:
        state = SamplerState(request.sampling, request.prompt, self._eos, matcher)
        self._scheduler.add(
            Sequence(
                key=(worker, request.request_id),
                tokens=list(request.prompt),
                prompt_length=len(request.prompt),
                max_tokens=request.max_tokens,
                state=state,
                department=request.department,
                long_conversation=request.long_conversation,
                embed=request.embed,
                drafter=self._drafter(request, state),
            )
        )

    def _valid(self, request: Submit) -> bool:
        """Return whether a request makes sense; the API checks the same, so what does not is a fault of ours."""
        answers = request.max_tokens == 0 if request.embed else request.max_tokens > 0
        named = (*request.prompt, *request.sampling.logit_bias)
        return bool(request.prompt) and answers and all(0 <= token < self._vocabulary for token in named)

    def _drafter(self, request: Submit, state: SamplerState) -> Drafter | None:
        """Return a drafter where guesses cannot change the answer: it is greedy, and no token depends on the last."""
        plain = state.greedy and state.counts is None and state.matcher is None and request.sampling.logprobs is None
        return Drafter() if self._limits.speculate_tokens and plain and not request.embed else None
