"""One training step's loss and gradients equal torch's."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from maxtext.objectives.next_token import NextToken
from tests import twins
from tests.test_families import CASES
from tests.twins import LENGTH, torch

# Of the largest gradient of a tensor: float32 sums in another order. Gemma's embedding has 3.0e-4
# as tests are compiled, and 1.2e-4 as XLA compiles by default; all others have less.
NOISE = 5e-4
PLAIN = NextToken()
BALANCE = 0.3  # weight of the balance loss
PADDING = 5  # at the end of the second row


def theirs(model, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
  """The loss of transformers, and the gradient of every tensor of its files."""
  labels = torch.tensor(tokens)
  labels[1, -PADDING:] = -100
  seen = torch.ones_like(labels)
  seen[1, -PADDING:] = 0
  loss = model(torch.tensor(tokens), attention_mask=seen, labels=labels).loss
  loss.backward()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(p.grad)
    for buffer in model.buffers():  # what no gradient moves
      buffer.zero_()
  return loss.item(), twins.tensors_of(model)


def batch_of(tokens: np.ndarray) -> dict[str, np.ndarray]:
  """The same rows, with targets one token ahead; the last token has none."""
  place = np.broadcast_to(np.arange(LENGTH), tokens.shape)
  segments = np.ones_like(tokens)
  segments[1, -PADDING:] = 0
  ahead = lambda x: np.pad(x[:, 1:], ((0, 0), (0, 1)))
  return {
    "inputs": tokens,
    "inputs_position": place,
    "inputs_segmentation": segments,
    "targets": ahead(tokens),
    "targets_segmentation": ahead(segments),
  }


def check(case: str, objective: NextToken = PLAIN, right=theirs) -> None:
  model = twins.twin(*CASES[case])
  mine = twins.ours(twins.plain(model.config), twins.tensors_of(model))
  tokens = twins.random_tokens()
  batch = batch_of(tokens)

  def loss(params):
    return objective(mine.plan.merge(params), batch)["loss"].value

  found, grads = jax.value_and_grad(loss)(mine.params)
  right, expected = right(model, tokens)
  assert found == pytest.approx(right, rel=1e-5)
  mapped = mine.tensors(grads)
  assert mapped.keys() == expected.keys()
  for name, grad in expected.items():
    assert np.abs(mapped[name] - grad).max() <= NOISE * np.abs(grad).max(), name


def with_balance(model, tokens: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
  """As `theirs`, with the balance loss; the last token of a row has no target and goes nowhere."""
  batch = batch_of(tokens)
  labels = torch.tensor(np.where(batch["targets_segmentation"], batch["targets"], -100))
  ids, seen = (torch.tensor(batch[name]) for name in ("inputs", "inputs_segmentation"))
  out = model(ids, attention_mask=seen, output_router_logits=True)
  entropy = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
  loss = entropy + BALANCE * out.aux_loss
  loss.backward()
  with torch.no_grad():
    for p in model.parameters():
      p.copy_(p.grad)
    for buffer in model.buffers():  # what no gradient moves
      buffer.zero_()
  return loss.item(), twins.tensors_of(model)


def test_loss_and_gradients_with_the_balance_loss_equal_those_of_torch():
  check("mixtral, windowed", NextToken(balance=BALANCE), with_balance)


@pytest.mark.parametrize("case", ["gemma2"])
def test_loss_and_gradients_equal_those_of_torch(case):
  check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "gemma2"])
def test_loss_and_gradients_equal_those_of_torch_in_every_family(case):
  check(case)
