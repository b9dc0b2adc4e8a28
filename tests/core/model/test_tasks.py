"""The head is the model's own forward on rows of the decoder's output, even if it reads other outputs."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from budwood.model.heads import own_head


class Model(nn.Module):
    """A head that also reads fields of the decoder's output with the names of another version."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head = nn.Identity(), nn.Linear(4, 7)

    def get_decoder(self) -> nn.Module:
        return self.model

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        outputs = self.model(inputs_embeds)
        assert outputs.a_cache_by_any_name is None
        return SimpleNamespace(logits=self.lm_head(outputs[0]) * 2, cache=outputs.past_key_values)


def test_the_models_own_head_runs_on_the_rows() -> None:
    model, rows = Model(), torch.randn(3, 4)
    torch.testing.assert_close(own_head(model, rows), model.lm_head(rows) * 2)
    assert "forward" not in vars(model.model), "the decoder is restored"
