"""The conformance kit, and the values of the term."""

from __future__ import annotations

import json

from budwood.testing import StrategyConformance

from budwood_base_kl import BaseKl


class TestBaseKl(StrategyConformance):
    strategy = BaseKl
    options = {"weight": 0.5}

    def test_the_term_is_zero_only_in_the_first_step(self) -> None:
        run = self.bench().run("the term is logged").run
        log = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        terms = [line[self.bench().name] for line in log if line["kind"] == "step"]
        assert abs(terms[0]) < 1e-5  # the adapter starts as the base
        assert all(term > 1e-3 for term in terms[1:])
