"""One step for every objective: (State, batch) -> (State, metrics)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxtext import sharding
from maxtext.training.guardian import Guard, passed
from maxtext.training.state import Params, State

Batch = dict[str, jax.Array]
Sums = dict[str, Any]  # Mean by name, and 'loads' of experts [l e] by the path of their block
Loss = Callable[[Params, Batch, jax.Array | None], Sums]


def _as_it_is(opt_state: Any) -> Any:
  return opt_state


@dataclasses.dataclass(frozen=True)
class Rules:
  """What a step does besides descending.

  `accumulate` micro-batches make one batch; gradients are summed in `grad_dtype`, and shortened to
  `clip` where their norm is larger (0: never); a loss or gradient that is NaN or infinite leaves
  the state untouched where the flag of its kind is set, and so does what a `guard` does not let
  pass, if there is one; dropout is drawn from `seed` and the step.
  `mixtures` are the numbers of the layers that have experts, by the path of their block; of those
  that have a choice bias it goes by `bias_rate` towards equal loads, and never by a gradient. The
  optimizer works on every parameter in its one of the `places`, if it has any; `near` brings its
  state to where it is computed with, `far` back to where it is kept.
  """

  accumulate: int = 1
  grad_dtype: str = "float32"
  clip: float = 0.0
  abort_on_nan: bool = True
  abort_on_inf: bool = True
  guard: Guard | None = None
  dropout: bool = False
  seed: int = 0
  mixtures: Mapping[str, range] = dataclasses.field(default_factory=dict)
  bias_rate: float = 0.0
  places: Mapping[str, jax.sharding.NamedSharding] = dataclasses.field(default_factory=dict)
  near: Callable[[Any], Any] = _as_it_is
  far: Callable[[Any], Any] = _as_it_is


def make_step(
  loss: Loss, optimizer: optax.GradientTransformation, schedule: optax.Schedule, rules: Rules
):
  """The train step; `batch` columns are [accumulate * b, t].

  Metrics: each mean of the objective by name, 'total_weights', 'raw_grad_norm' and 'grad_norm'
  (before and after clipping), 'param_norm', 'learning_rate', 'ok', false where the step was not
  applied, and for each layer with experts 'expert_load/NUMBER', the highest load over the mean;
  with a guard also what it has 'judged' and the 'norms' of gradients that are not applied.
  """
  guard = rules.guard

  def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
    key = jax.random.fold_in(jax.random.key(rules.seed), state.step) if rules.dropout else None
    grads, sums = _gradients(loss, rules, state.params, batch, key)
    loads = sums.pop("loads", {})
    weight = jnp.maximum(sums["loss"].weight, 1)
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads)) / weight
    scale = 1 / weight
    if rules.clip:
      scale *= jnp.where(norm > rules.clip, rules.clip / norm, 1.0)
    ok = _acceptable(rules, sums["loss"].value, norm)
    if guard is not None and guard.factor:
      judged, state = guard.judge(state, sums["loss"].value, norm)
      ok &= (judged[:2] <= guard.factor).all()

    # a choice for every array instead would keep old and new ones of all of them
    def descend(state: State, grads: Params) -> State:
      state = dataclasses.replace(state, opt_state=rules.near(state.opt_state))
      new = _descend(optimizer, scale, rules.places, state, grads)
      params = new.params | _biases(rules, state.params, loads)
      return dataclasses.replace(new, params=params, opt_state=rules.far(new.opt_state))

    def refuse(state: State, grads: Params) -> tuple[State, jax.Array | None]:
      return (state, None) if guard is None else (passed(state), guard.norms(grads) / weight)

    unneeded = jax.eval_shape(refuse, state, grads)[1]
    accept = lambda state, grads: (descend(state, grads), optax.tree.zeros_like(unneeded))
    new, norms = jax.lax.cond(ok, accept, refuse, state, grads)
    metrics = {name: mean.value for name, mean in sums.items()}
    metrics |= {
      "total_weights": sums["loss"].weight,
      "raw_grad_norm": norm,
      "grad_norm": jnp.minimum(norm, rules.clip) if rules.clip else norm,
      "param_norm": optax.tree.norm(new.params),
      "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
      "ok": ok,
    }
    if guard is not None:
      metrics |= {"norms": norms} | ({"judged": judged} if guard.factor else {})
    return new, metrics | _unevenness(rules, loads)

  return step


def _descend(
  optimizer: optax.GradientTransformation,
  scale: jax.Array,
  places: Mapping[str, jax.sharding.NamedSharding],
  state: State,
  grads: Params,
) -> State:
  """The next state, from gradients that are still to be multiplied by `scale`."""
  params = state.params
  if places:
    placed = lambda tree: {name: sharding.place(x, places[name].spec) for name, x in tree.items()}
    grads, params = placed(grads), placed(params)
  grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
  updates, opt_state = optimizer.update(grads, state.opt_state, params)
  params = optax.apply_updates(params, updates)
  new = State(state.step + 1, params, opt_state, state.history)
  # in the dtype that the state has: optimizers compute in that of the gradients
  return jax.tree.map(sharding.alike, new, state)


def _biases(rules: Rules, params: Params, loads: dict[str, jax.Array]) -> Params:
  """The choice biases [l e] after a step: those of experts with less than the mean load go up, the
  others down (Wang et al. 2024, algorithm 1). Whatever the optimizer made of them is not used.
  """
  new = {}
  for path in rules.mixtures:
    if (old := params.get(name := f"{path}.moe.choice_bias")) is not None:
      new[name] = old
      if rules.bias_rate and path in loads:
        load = loads[path].reshape(old.shape)
        missing = load.mean(-1, keepdims=True) - load
        new[name] = old + rules.bias_rate * jnp.sign(missing)
  return new


def _unevenness(rules: Rules, loads: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """The highest load of an expert over the mean of all, layer by layer."""
  return {
    f"expert_load/{number}": load.max() / jnp.maximum(load.mean(), 1e-9)
    for path, layers in loads.items()
    for number, load in zip(rules.mixtures.get(path, ()), layers)
  }


def _gradients(
  loss: Loss, rules: Rules, params: Params, batch: Batch, key: jax.Array | None
) -> tuple[Params, Sums]:
  """Gradients of the summed loss over all micro-batches, and the sums."""

  def one(part: Batch, index: jax.Array | int) -> tuple[Params, Sums]:
    def total(params: Params) -> tuple[jax.Array, Sums]:
      sums = loss(params, part, None if key is None else jax.random.fold_in(key, index))
      return sums["loss"].total, sums

    grads, sums = jax.grad(total, has_aux=True)(params)
    return jax.tree.map(lambda g: g.astype(rules.grad_dtype), grads), sums

  if rules.accumulate == 1:
    return one(batch, 0)
  parts = {name: _split(x, rules.accumulate) for name, x in batch.items()}
  shapes = jax.eval_shape(one, {name: x[0] for name, x in parts.items()}, 0)
  zeros = jax.tree.map(jnp.zeros_like, shapes)

  def more(carry: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, carry, one(*part)), None

  return jax.lax.scan(more, zeros, (parts, jnp.arange(rules.accumulate)))[0]


def _split(x: jax.Array, parts: int) -> jax.Array:
  """[parts * b, t] -> [parts, b, t]; every part takes rows from every shard, so nothing moves."""
  return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _acceptable(rules: Rules, *numbers: jax.Array) -> jax.Array:
  ok = jnp.ones((), bool)
  for x in numbers:
    ok &= ~jnp.isnan(x) if rules.abort_on_nan else True
    ok &= ~jnp.isinf(x) if rules.abort_on_inf else True
  return ok
