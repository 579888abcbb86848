"""One training run, from its configuration to its last checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from maxtext import estimate, hardware, hlo, hosts, placement, program, resume, topology
from maxtext import log as logs
from maxtext.checkpoints import hub
from maxtext.checkpoints.bucketed import opened
from maxtext.checkpoints.folder import FACTS, LOSS
from maxtext.checkpoints.hub.loading import load
from maxtext.checkpoints.hub.model import open_model
from maxtext.checkpoints.local import Local
from maxtext.checkpoints.manager import Checkpoints, preload, restore_parameters, restore_state
from maxtext.compiled import executable, keep, report, reported
from maxtext.config import Config, check_devices
from maxtext.config.tokenizer import check_vocabulary, placed
from maxtext.data.pipeline import (
  Batches,
  Corpus,
  eval_batches,
  open_corpus,
  train_batches,
  vocabulary,
)
from maxtext.data.place import host_rows, place
from maxtext.errors import CheckpointError, ConfigError, DataError
from maxtext.log import log
from maxtext.program import Program
from maxtext.resume import CONFIG, DATA
from maxtext.serve.writer import Writer
from maxtext.signals import Stop
from maxtext.training.hooks import Evaluate, Histograms, Save
from maxtext.training.incidents import Incidents, Rollback
from maxtext.training.loop import Done, End, Hook, Step, loop
from maxtext.training.metrics import Metrics, Pace, due, step_scalars
from maxtext.training.phases import Phase, Phases
from maxtext.training.progress import Progress
from maxtext.training.state import Params, State, from_tree, tree
from maxtext.training.step import Batch
from maxtext.training.stragglers import Stragglers
from maxtext.training.twice import Twice
from maxtext.training.watchdog import Watchdog


def train(config: Config, place: hosts.Place | None = None) -> int:
  """Train the run to its end, or until it is asked to stop, in this process alone or at its place
  among several; returns the exit code. Raises UserError.
  """
  started = time.monotonic()
  if place is not None:
    logs.keep_native_off()
    logs.start(place.id, config.run.debug)
  with hosts.joined(place, config.hosts):
    return _train(resume.agreed(config), started)


def _train(config: Config, started: float) -> int:
  tokens = _vocabulary(config)
  devices = program.find_devices(config.run)
  logs.start(jax.process_index(), config.run.debug)
  check_devices(config, len(devices))
  topology.demand(config.compile, devices, config.mesh.num_slices)
  for line in config.report():
    log.info(line)
  with hosts.at_home(config.run.place, config.run.run_cache_dir) as home:
    built = program.build(config, devices, tokens)
    if config.mesh.debug_sharding:
      log.info(placement.table(built.plan.declared, built.layout))
    tolerance = config.mesh.sharding_tolerance
    for line in placement.warnings(built.plan.declared, built.layout, tolerance):
      log.warning(line)
    _check_memory(built)
    run = Run(config, home, built, started)
    # a save under way is finished, come what may
    with reported(built, lambda: run.step), run.nearest or contextlib.nullcontext():
      return run.train()


def _vocabulary(config: Config) -> int:
  """The tokenizer's size, which the model has rows for: known before any device is asked for.

  Raises ConfigErrors or DataError.
  """
  try:
    size = vocabulary(config.data)
  except (ConfigError, DataError) as error:
    raise placed(config, error) from None
  check_vocabulary(config, size)
  return size


def _check_memory(built: Program) -> None:
  """Refuse a state that no device can hold, which a CPU would learn only as the system ends the
  process. Raises ConfigError.
  """
  devices = built.layout.mesh.local_devices
  needed, there = estimate.bytes_per_device(built.state), hardware.memory(devices[0], len(devices))
  if there is not None and needed > there:
    vocabulary = built.spec.vocab * built.spec.width
    parameters = sum(leaf.size for leaf in built.state.params.values())
    raise ConfigError(
      "vocab_size" if 3 * vocabulary > parameters else "base_emb_dim",
      f"parameters and optimizer take {needed / 2**30:.1f} GiB on each of {len(devices)} devices, "
      f"which have {there / 2**30:.1f}; make the model smaller, or split it over more devices",
    )


class Run:
  """What a training run holds open: its program, its data, its files."""

  corpus: Corpus
  batches: Batches
  metrics: Metrics
  progress: Progress
  evaluate: Evaluate | None
  step: Any = None  # once it is compiled
  drawn: Future[State] | None = None  # the state to begin with, unless it is from elsewhere

  def __init__(self, config: Config, home: hosts.Home, built: Program, started: float):
    self.config, self.program, self.started = config, built, started
    self.folder, self.place = home.folder, home.place
    self.devices = built.layout.mesh.size
    self.rows = config.training.global_batch(self.devices)
    self.length = config.training.max_target_length
    self.checkpoints: Checkpoints | None = None
    self.nearest: Checkpoints | None = None  # those, and copies that are closer
    self.save: Save | None = None
    self.saves: list[Save] = []
    checkpoint = config.checkpoint
    if checkpoint.enable_checkpointing:
      self.checkpoints = self.nearest = opened(home, checkpoint)
      self.save = Save(self.checkpoints, checkpoint.period, self._beside)
      if checkpoint.enable_emergency_checkpoint:
        self.nearest = Local(home.folder, self.checkpoints, tree(built.state))
        self.saves = [Save(self.nearest, checkpoint.local_checkpoint_period, self._beside)]
      self.saves.append(self.save)
    seeds = {key: config.values[key] for key in ("init_weights_seed", "data_shuffle_seed")}
    params, training = built.state.params, config.training
    self.phases, self.first = Phases(started), -1
    self.incidents = Incidents(
      home.folder, training, built.guard, params, seeds, self.nearest, FACTS
    )

  def train(self) -> int:
    """Compile, begin or go on, train, save, and say how it ended."""
    newest, ended = self._newest()
    if ended:
      log.info(f"{self.place} {ended}")
      return 0
    with ThreadPoolExecutor(2) as background:
      if newest is None and not self._loads:  # drawn while the step is traced
        drawing = self.program.init.lower()
        self.drawn = background.submit(lambda: drawing.compile()())
      traced = self.program.traced
      compiling = background.submit(lambda: self._compiled(traced.lower()))
      preload()
      self.corpus = open_corpus(self.config.data)
      hosts.agree({"dataset_path": f"documents and tokens of sha256 {self.corpus.fingerprint}"})
      self.batches = self.open_batches(train_batches, self.corpus, self.rows)

      @functools.cache
      def compiled() -> Any:
        self.step = step = compiling.result()
        self._announce(step)
        return step

      while (code := self._attempt(newest, compiled)) is None:
        newest = self._newest()[0]
    return code

  def _attempt(self, newest: int | None, compiled: Callable[[], Any]) -> int | None:
    """Begin or go on, to the end; None where the run is to go on from an earlier checkpoint."""
    state = self.begin(newest)
    first = int(state.step)
    self.first = first if self.first < 0 else self.first
    self.pace.keep(first - self.first)
    for save in self.saves:
      save.saved = -1
    self._write_config()
    with self._open_metrics(first) as self.metrics, hosts.before_end(self.metrics.flush):
      step = compiled()
      progress = self._open_progress(first)
      with progress as self.progress, hosts.before_end(progress.close), Stop() as stop:
        watchdog = Watchdog(self.config.observe, self.folder, self.phases, self._saving)
        stragglers = Stragglers(self.phases, self.config.observe.enable_goodput_recording)
        try:
          with watchdog, stragglers, self.phases.during("idle"):
            return self._loop(step, state, range(first, self.config.training.steps), stop)
        except Rollback:
          return None

  def _compiled(self, lowered: Any) -> Step:
    """The step, from the file that has it if there is one."""
    path = self.config.compile.compiled_trainstep_file
    if path:
      return executable.load(path, self.program, lowered)
    return executable.compile_step(self.program, lowered)

  def _saving(self) -> Phase | None:
    """The save under way, if there is one."""
    at = self.checkpoints.under_way if self.checkpoints is not None else None
    return None if at is None else Phase("save", *at)

  def _loop(self, step: Step, state: State, span: range, stop: Stop) -> int:
    """Run the steps, save the last state and wait until it is on disk."""
    evaluate = self.evaluate = self._evaluate() if self.config.eval.eval_interval > 0 else None
    hooks: list[Hook] = [hook for hook in (self._histograms(), evaluate, *self.saves) if hook]
    checkpoint = self.config.checkpoint
    if self.save and checkpoint.save_checkpoint_on_start and not self.save.checkpoints.steps():
      self.save(span.start, state)
    if stop(span.start):
      span = range(span.start, span.start)
    if (period := self.config.training.determinism_check_period) > 0:
      step = Twice(step, period, span.start, self.program.shardings)
    columns = self.placed(self.incidents.seeing(self.batches, span.start), self.rows)
    end = loop(step, state, columns, span, self._reporter(), hooks, stop, self.phases)
    stopped = stop(end.finished)
    if self.save and self.nearest:
      with self.phases.during("checkpoint", end.finished):
        if end.finished and (stopped or checkpoint.save_checkpoint_on_completion):
          self.save(end.finished, end.state)
        self.nearest.close()
    self._farewell(end, None if evaluate is None else evaluate.last, stop)
    done = end.finished == self.config.training.steps or end.why in ("data", "hook")
    return self.config.hosts.exit_code_when_stopped if stop.by and not done else 0

  def _newest(self) -> tuple[int | None, str]:
    """The newest whole checkpoint of this run, if the run it belongs to is this one, and why it has
    ended, if it has; refuses to start over damage.
    """
    if self.checkpoints is None or self.nearest is None:
      return None, ""
    newest = self.incidents.newest()
    if newest is not None:
      extra = self.nearest.extra(newest)
      if FACTS not in extra:
        problem = "was converted, and no run has saved it; name it by load_parameters_path instead"
        raise CheckpointError(f"{self.checkpoints.place}/{newest} {problem}")
      hosts.first(lambda: resume.check(self.config, extra, self.devices))
      return newest, resume.ended(self.config, extra, newest)
    if damaged := self.checkpoints.damaged():
      raise CheckpointError(
        f"{self.checkpoints.place} holds steps {', '.join(map(str, damaged))} and none of "
        "them is whole; move them away to begin the run anew"
      )
    return None, ""

  def begin(self, newest: int | None, resumed: bool = True) -> State:
    """The newest checkpoint of this run, else what the configuration loads, else drawn anew."""
    section, like = self.config.checkpoint, self.program.state
    if self.nearest is not None and newest is not None:
      extra = self.nearest.extra(newest)
      self.batches.restore(extra[DATA], self.config.run.resume_changes)
      if resumed:
        self.incidents.resume(newest, extra, self.batches)
        log.info(f"resuming {self.place} after {newest} steps")
      return from_tree(like, self.nearest.restore(newest, tree(like)))
    once = section.enable_single_replica_ckpt_restoring
    if path := section.load_full_state_path:
      state = from_tree(like, restore_state(path, tree(like), once)[0])
      log.info(f"starting from {path}, after step {int(state.step) - 1}")
      return state
    if section.load_parameters_path:
      params = self._parameters(section.load_parameters_path)
      log.info(f"starting with the parameters of {section.load_parameters_path}")
      return self.program.begin(params)
    drawn, self.drawn = self.drawn, None
    return drawn.result() if drawn else self.program.init()

  @property
  def _loads(self) -> bool:
    """Whether the configuration names what to begin with."""
    section = self.config.checkpoint
    return bool(section.load_full_state_path or section.load_parameters_path)

  def _parameters(self, path: str) -> Params:
    """Those of a checkpoint, or of a model of the Hugging Face hub."""
    like = self.program.state.params
    if hub.is_model(path):
      return load(open_model(path), like, self.program.stages)
    once = self.config.checkpoint.enable_single_replica_ckpt_restoring
    return restore_parameters(path, like, once)

  def _histograms(self) -> Histograms | None:
    section = self.config.observe
    if not section.record_internal_nn_metrics:
      return None
    return Histograms(self.metrics, section, self.config.training.steps)

  def _evaluate(self) -> Evaluate:
    return Evaluate(
      section=self.config.eval,
      steps=self.config.training.steps,
      evaluate=self.program.evaluate,
      batches=self.held_out,
      write=self._sample(),
      metrics=self.metrics,
      progress=self.progress,
    )

  def held_out(self) -> Iterator[Batch]:
    """The batches of one evaluation."""
    section = self.config.eval
    rows = section.batch(self.config.training, self.devices)
    limit = None if section.eval_steps == -1 else section.eval_steps
    batches = self.open_batches(eval_batches, self.corpus, rows)
    return itertools.islice(self.placed(batches, rows), limit)

  def _sample(self) -> Callable[[Params], str] | None:
    """params -> the text that an evaluation writes."""
    config, eval = self.config, self.config.eval
    if not eval.eval_sample_length:
      return None
    write = Writer(self.program, self.corpus.tokenizer, config.decode, config.data.add_bos)
    return write.again(eval.eval_sample_prompt, eval.eval_sample_length, "eval_sample_length")

  def _beside(self, finished: int) -> dict[str, Any]:
    """What stands in a checkpoint beside the state."""
    self.metrics.flush()  # a checkpoint must not know of steps that the metrics have lost
    facts = resume.facts(self.config, self.devices) | self.incidents.facts()
    if self.evaluate is not None and self.evaluate.at == finished:
      facts[LOSS] = self.evaluate.last
    state = self.batches.state()
    hosts.agree(
      {"data": f"the place in it {state}"}
    )  # a host that could not read what others could
    return {CONFIG: self.config.resolved(), FACTS: facts, DATA: state}

  def open_batches(self, source: Callable[..., Batches], corpus: Corpus, rows: int) -> Batches:
    """This host's part of batches of `rows` rows in all."""
    mine = host_rows(self._where(rows), rows, self.length)
    return source(corpus, self.config.data, rows, self.length, rows=mine)

  def placed(self, batches: Iterator[Any], rows: int) -> Iterator[Batch]:
    where = self._where(rows)
    first = host_rows(where, rows, self.length).start
    return (place(batch, where, rows, first) for batch in batches)

  def _where(self, rows: int) -> jax.sharding.Sharding:
    return self.program.batch(rows)["inputs"].sharding

  @functools.cached_property
  def pace(self) -> Pace:
    tokens = self.rows * self.length
    flops = estimate.step_flops(self.program.spec, tokens, self.length).total
    kind = self.program.layout.mesh.devices.flat[0].device_kind
    return Pace(tokens, flops, self.devices, estimate.peak_flops(kind), self.started)

  def _reporter(self) -> Callable[[Done], None]:
    """What hears of every finished step: the guard against divergence, the log, the curves."""
    config, pace = self.config, self.pace

    def report(done: Done) -> None:
      saving = sum(save.wait() for save in self.saves)
      scalars = step_scalars(done.metrics) | pace.after(done.seconds, done.data_wait, saving)
      self.progress.step(done.step, scalars)
      if due(done.step, config.observe, config.training.steps):
        if config.observe.enable_goodput_recording:
          scalars |= {f"time/{name}": spent for name, spent in self.phases.seconds().items()}
        self.metrics.scalars(done.step, scalars)
      self.incidents.heard(done)

    return report

  def _farewell(self, end: End, loss: float | None, stop: Stop) -> None:
    """How the run ended, and what to do with it now; `loss` is that of the last evaluation."""
    steps, done = (
      self.config.training.steps,
      f"{end.finished} of {self.config.training.steps} steps",
    )
    if end.why == "data" and end.finished < steps:
      log.info(f"the data ended after {done} (num_epoch={self.config.data.num_epoch})")
    if end.finished:
      log.info(str(self.batches))
    if loss is not None:
      entropy = self.corpus.unigram_entropy()
      beside = "" if entropy is None else f"; unigram entropy of the corpus {entropy:.3f}"
      log.info(f"eval loss {loss:.3f} nats/token{beside}")
    if self.config.observe.enable_goodput_recording:
      log.info(self.phases.line(self.pace.goodput, self.pace.lost))
    if stop.by:
      saved = f", saved in {self.save.checkpoints.place}" if self.save else ", not saved"
      log.info(f"stopped by {stop.by} after {done}{saved}; the same command resumes it")
    else:
      log.info(f"finished {end.finished} steps of {self.place}")

  def _write_config(self) -> None:
    """config.yml and what the tokenizer consists of, each file whole or not at all."""
    if jax.process_index():
      return
    path = self.folder / "config.yml"
    try:
      path.with_suffix(".writing").write_text(self.config.resolved())
      path.with_suffix(".writing").replace(path)
      self.corpus.tokenizer.save(self.folder)
    except OSError as error:
      raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None

  def _open_metrics(self, first: int) -> Metrics:
    return Metrics(
      self.folder,
      self.config.observe,
      self.config.run.run_name,
      self.config.resolved(),
      self.config.hparams(),
      first,
      jax.process_index(),
    )

  def _open_progress(self, first: int) -> Progress:
    steps = self.config.training.steps
    return Progress(self.config.observe, steps, first, self.devices, jax.process_index())

  def _announce(self, step: Any) -> None:
    """Once, before the first step: what is trained, on what, at what cost."""
    state, tokens = self.program.state, self.rows * self.length
    costs = estimate.Estimate.of(
      self.program.spec, tokens, self.length, state.params, state.opt_state
    )
    mesh = self.program.layout.mesh
    costs = dataclasses.replace(costs, step=estimate.of_step(self.program))
    log.info(str(self.corpus))
    if self.config.mesh.debug_sharding:
      slices = self.config.mesh.dcn()
      log.info(hlo.table(hlo.collectives(step.as_text(), mesh.shape, slices)))
    if (path := self.config.compile.report_file) and not jax.process_index():
      keep(report.of(self.program, step, 0.0), path)
    if (tiles := self.program.objective.tiles) > 1:
      log.info(f"loss: the logits of {self.length} tokens in {tiles} parts, one after the other")
    if (pipeline := self.program.pipeline) is not None:
      log.info(str(pipeline))
    for line in costs.lines(
      mesh.devices.flat[0].device_kind, mesh.shape, estimate.compiled_bytes(step)
    ):
      log.info(line)
