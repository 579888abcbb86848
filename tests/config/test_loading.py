"""What counts of all that sets a key, and what is known of it afterwards."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from maxtext.config import check_devices, documents, load
from maxtext.config.sections import SECTION_OF
from maxtext.config.values import render
from maxtext.errors import ConfigErrors


def test_without_a_word_the_defaults_are_a_run_for_one_cpu(loaded):
  config = loaded("hardware=cpu")
  assert config.data.dataset_type == "text" and config.run.base_output_directory == "runs"
  check_devices(config, 1)


def test_each_place_overrides_the_ones_below_it(loaded):
  """base.yml < preset < base_config chain < file < environment < command line."""
  key, files = "base_num_decoder_layers", {"run.yml": "base_config: mid.yml\n"}
  files |= {"mid.yml": "base_config: low.yml\n", "low.yml": "prompt: x\n"}
  assert loaded("run.yml", files=files).architecture.base_num_decoder_layers == 4
  files["low.yml"] = "model_name: tiny\n"  # a preset is below all files, wherever it is named
  assert loaded("run.yml", files=files).architecture.base_num_decoder_layers == 2
  for layers, name in ((5, "low.yml"), (6, "mid.yml"), (7, "run.yml")):
    files[name] += f"{key}: {layers}\n"
    assert loaded("run.yml", files=files).architecture.base_num_decoder_layers == layers
  environ = {f"M_{key.upper()}": "8"}
  assert loaded("run.yml", files=files, environ=environ).architecture.base_num_decoder_layers == 8
  assert loaded("run.yml", f"{key}=9", files=files).architecture.base_num_decoder_layers == 9


def test_the_model_named_last_is_the_one_that_counts(loaded):
  files = {"run.yml": "model_name: gpt3-52k\n"}
  config = loaded("run.yml", "model_name=tiny", files=files)
  assert config.architecture.decoder_block == "llama2" and config.architecture.base_emb_dim == 64


def test_every_value_knows_its_place(loaded):
  config = loaded(
    "sub/run.yml",
    "dtype=float32",
    files={"sub/run.yml": "\n# words\ntraining:\n  steps: 3\nmodel_name: tiny\n"},
    environ={"M_PACKING": "no"},
  )
  where = {key: source.where for key, source in config.sources.items()}
  assert where["steps"] == "sub/run.yml:4"
  assert where["dtype"] == "command line" and where["packing"] == "environment"
  assert where["base_emb_dim"] == "configs/models/tiny.yml:2"
  assert where["learning_rate"].startswith("configs/base.yml:")
  assert set(where) == set(SECTION_OF)


def test_the_start_reports_what_was_set_and_what_of_the_preset_was_replaced(loaded):
  config = loaded("model_name=tiny", "base_emb_dim=32", "log_config=false")
  (line,) = config.report()
  assert line == "config: base_emb_dim=32 (command line) instead of 64 (configs/models/tiny.yml:2)"
  assert "config: steps=3 (command line)" in list(loaded("steps=3").report())


def test_a_packaged_file_is_found_from_anywhere(loaded, folder: Path):
  expected = loaded("configs/base.yml", "run_name=a")
  for name in ("configs/base", "base.yml", "base", str(documents.PACKAGED / "base.yml")):
    assert loaded(name, "run_name=a") == expected
  (folder / "configs").mkdir()
  (folder / "configs" / "base.yml").write_text("steps: 3\n")
  assert loaded("configs/base.yml").training.steps == 3  # as typed comes first


def test_a_base_config_is_found_beside_the_file_that_names_it(loaded):
  files = {"a/run.yml": "base_config: ../b/low.yml\n", "b/low.yml": "steps: 3\n"}
  assert loaded("a/run.yml", files=files).training.steps == 3


def test_text_is_kept_as_typed(loaded):
  for text in ("007", "1e5", "12e4567", "0x10", "1_000", "1.0", "true", "on"):
    assert loaded(f"run_name={text}").run.run_name == text
    assert loaded("run.yml", files={"run.yml": f"run_name: {text}\n"}).run.run_name == text
    assert loaded(environ={"M_RUN_NAME": text}).run.run_name == text
  for text in (
    "[a, {b",
    "{a: b}",
    "a=b",
    "'quoted'",
    "x: y # z",
    " lead",
    "two\nlines",
    "ünï",
    "-",
  ):
    assert loaded(f"prompt={text}", purpose="decode").decode.prompt == text


@pytest.mark.parametrize(
  "text, value", [("1e-4", 1e-4), ("3", 3.0), (".5", 0.5), ("5.", 5.0), ("+1E-3", 1e-3), ("0", 0.0)]
)
def test_numbers_may_be_written_in_every_usual_way(loaded, text, value):
  assert loaded(f"learning_rate={text}").optimizer.learning_rate == value
  files = {"run.yml": f"learning_rate: {text}\n"}
  assert loaded("run.yml", files=files).optimizer.learning_rate == value


def test_booleans_may_be_written_in_every_usual_way(loaded):
  for text in ("true", "True", "yes", "on", "TRUE"):
    assert loaded(f"debug={text}").run.debug is True
  for text in ("false", "False", "no", "off"):
    assert loaded(f"scan_layers={text}").memory.scan_layers is False


def test_lists_may_be_written_with_or_without_quotes(loaded):
  for text in ("[gelu]", "['gelu']", '["gelu"]', "gelu", "[ gelu ]"):
    assert loaded(f"mlp_activations={text}").architecture.mlp_activations == ("gelu",)
  assert loaded("resume_changes=[steps, seed]".replace("seed", "packing")).run.resume_changes == (
    "steps",
    "packing",
  )


def test_rules_are_merged_by_name_and_replaced_on_request(loaded):
  pairs = "logical_axis_rules=[[embed, [tensor]], [mlp, fsdp]]"
  merged = loaded(pairs).mesh.logical_axis_rules
  assert merged["embed"] == ("tensor",) and merged["mlp"] == ("fsdp",)
  assert merged["heads"] == loaded().mesh.logical_axis_rules["heads"]
  alone = loaded(pairs, "override_logical_axis_rules=true").mesh.logical_axis_rules
  assert {name for name, axes in alone.items() if axes} == {"embed", "mlp"}
  assert set(alone) == set(merged)  # what was not named is not split, rather than unknown


def test_the_same_value_may_stand_on_the_command_line_and_in_the_environment(loaded):
  config = loaded("learning_rate=1e-4", environ={"M_LEARNING_RATE": "0.0001"})
  assert config.optimizer.learning_rate == 1e-4


def test_a_run_without_a_name_is_named_by_its_file_and_the_time(loaded):
  assert loaded("my run.yml", files={"my run.yml": ""}).run.run_name.startswith("my-run-20")
  assert loaded().run.run_name.startswith("run-20")


def test_a_resolved_configuration_loads_as_itself(loaded):
  config = loaded(
    "run.yml",
    "model_name=tiny",
    "base_num_decoder_layers=3",
    "adam_eps=1e-9",
    "learning_rate=3e-05",
    "run_name=007",
    "prompt=a 'b' \"c\" #d\n\x7f\u2028 é",
    "adamw_mask=['a, b', 'c: d', null]".replace(", null", ""),
    "logical_axis_rules={embed: [tensor]}",
    "base_output_directory=on",
    files={"run.yml": "eval_interval: 5\ntarget_eval_loss: 1e-2\n"},
  )
  again = loaded("again.yml", files={"again.yml": config.resolved()})
  assert again == config and config.changes(again.resolved()) == []


def test_a_decoder_block_of_ones_own_is_found_again_from_elsewhere(loaded, folder, monkeypatch):
  block = (documents.PACKAGED / "decoder_blocks" / "llama2.yml").read_text()
  files = {"a/run.yml": "decoder_block: ./own.yml\n", "a/own.yml": block}
  config = loaded("a/run.yml", files=files)
  assert config.architecture.decoder_block == str(folder / "a" / "own.yml")
  (folder / "b").mkdir()
  monkeypatch.chdir(folder / "b")
  (folder / "b" / "again.yml").write_text(config.resolved())
  assert load(["again.yml"], {}).decoder(300) == config.decoder(300)


def test_changes_are_named_with_both_values(loaded):
  old = loaded("steps=3", "run_name=a").resolved()
  new = loaded("steps=4", "run_name=a", "logical_axis_rules={embed: [tensor]}")
  changes = {key: (before, after) for key, before, after in new.changes(old)}
  assert changes["steps"] == (3, 4) and set(changes) == {"steps", "logical_axis_rules"}
  assert changes["logical_axis_rules"][1] == {"embed": ("tensor",)}
  outdated = old.replace("packing: true", "gone: 3").replace("attention: auto", "attention: no-")
  changes = {key: (before, after) for key, before, after in new.changes(outdated)}
  assert "gone" not in changes and "packing" not in changes  # a key that is missing had its default
  assert changes["attention"] == ("no-selected", "autoselected")


def test_decoding_does_not_ask_for_what_only_training_reads(loaded, refused):
  assert "dataset_path" in refused("dataset_path=gone")[0]
  assert loaded("dataset_path=gone", purpose="decode").data.dataset_path == "gone"
  (line,) = refused("prompts_file=gone", purpose="decode")
  assert "prompts_file: 'gone': no such file" in line


def test_devices_that_are_found_late_are_checked_as_well(loaded):
  config = loaded("ici_tensor_parallelism=2")
  check_devices(config, 8)
  with pytest.raises(ConfigErrors, match=r"command line  ici_tensor_parallelism: 3 devices cannot"):
    check_devices(config, 3)


def test_batches_follow_from_devices_and_accumulation(loaded):
  config = loaded(
    "per_device_batch_size=0.5", "gradient_accumulation_steps=3", "ici_tensor_parallelism=2"
  )
  check_devices(config, 8)
  assert config.training.micro_batch(8) == 4 and config.training.global_batch(8) == 12
  assert config.eval.batch(config.training, 8) == 4


def test_what_is_switched_off_may_leave_its_keys_behind(loaded, refused):
  files = {"run.yml": "eval_interval: 5\neval_steps: 4\n"}
  resting = loaded("run.yml", "eval_interval=-1", files=files)
  assert loaded("again.yml", files={"again.yml": resting.resolved()}) == resting
  for argv in (["eval_steps=4"], ["eval_interval=-1", "eval_steps=4"]):
    assert "eval_steps: has an effect only with an eval_interval" in refused(*argv)[0]


def test_hparams_are_single_values(loaded):
  values = loaded().hparams()
  assert values["learning_rate"] == 1e-3 and values["mlp_activations"] == "[silu, linear]"
  assert all(isinstance(v, (bool, int, float, str)) for v in values.values())


def test_no_argument_causes_anything_but_complaints(loaded):
  """Random key=value words: each is loaded or refused, with nothing else."""
  draw = random.Random(0)
  pieces = [
    "",
    "0",
    "-1",
    "1e999",
    "nan",
    "null",
    "[",
    "]",
    "{",
    "}",
    ":",
    ",",
    "'",
    '"',
    "&a",
    "*a",
  ]
  pieces += [
    "!",
    "%",
    "@",
    "`",
    "|",
    ">",
    "#",
    " ",
    "\t",
    "\n",
    "\\",
    "\x7f",
    "é",
    "true",
    "silu",
    "${steps}",
  ]
  for _ in range(150):
    key = draw.choice([*SECTION_OF, "decoder_block", "logical_axis_rules", "mlp_activations", "x"])
    word = f"{key}={''.join(draw.choices(pieces, k=draw.randint(1, 4)))}"
    try:
      config = loaded(word)
    except ConfigErrors as e:
      assert all(len(line) <= 300 and line.isprintable() for line in e.lines), word
    else:
      assert config.values.keys() == SECTION_OF.keys() and render(config.values[key])


def test_any_bytes_in_a_file_cause_nothing_but_complaints(loaded):
  draw = random.Random(1)
  for _ in range(100):
    junk = bytes(
      draw.choices(b"steps: [{}]&*!|>%@`'\"#-?\n\t \x00\xff\xc3\xa9<", k=draw.randint(1, 30))
    )
    try:
      loaded("run.yml", files={"run.yml": junk})
    except ConfigErrors as e:
      assert all(len(line) <= 300 and line.isprintable() for line in e.lines), junk
