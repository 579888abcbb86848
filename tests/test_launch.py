"""What `maxtext.launch` writes, starts and refuses; tests/jobs holds what it writes to the APIs."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from end_to_end import launch as local_runs
from maxtext import config, launch
from maxtext.config.documents import PACKAGED
from maxtext.errors import ConfigError

TINY = "tiny.yml"
GKE = (
  "launch_target=gke",
  "launch_machine=v5p-8",
  "launch_image=img:1",
  "launch_volume=gs://my-runs",
  "base_output_directory=/data/runs",
)
XPK = (
  "launch_target=xpk",
  "launch_machine=v5e-16",
  "launch_image=img:1",
  "launch_volume=store",
  "launch_cluster=c",
  "launch_project=p",
  "launch_zone=z",
  "base_output_directory=/data/runs",
)
DOCKER = ("launch_target=docker", "launch_image=img:1", "launch_volume=/srv", *GKE[4:])
# A token's form; put together here so that no scanner of sources takes it for one.
TOKEN = "hf" + "_" + "abcdefgh" * 3


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
  """A folder of its own, without the hardware that other tests have."""
  monkeypatch.chdir(tmp_path)
  for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
    monkeypatch.delenv(name, raising=False)
  Path(TINY).write_text("run_name: tiny\nsteps: 60\neval_interval: 5\n")
  return tmp_path


def program(folder: Path, name: str, code: int = 0) -> None:
  """A program on the PATH that notes its arguments."""
  path = folder / "bin" / name
  path.parent.mkdir(exist_ok=True)
  path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{folder}/asked\nexit {code}\n')
  path.chmod(0o755)


def written(place: Path, target: str = "gke.yml") -> str:
  (path,) = place.glob(f"launches/*/{target}")
  return path.read_text()


def words_of(manifest: str) -> list[str]:
  """What follows `python -m train` in a manifest."""
  jobs = next(yaml.safe_load_all(manifest))["spec"]["replicatedJobs"]
  command = jobs[0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
  assert command[:3] == ["python", "-m", "train"]
  return [word.replace("$$", "$") for word in command[3:]]  # as Kubernetes does


def words_of_script(place: Path, target: str) -> list[str]:
  """What a shell makes of a script's one command."""
  return shlex.split(written(place, target).replace("\\\n", ""))


def in_a_shell(command: str) -> list[str]:
  """The words that bash makes of a command of one line, which Kubernetes hands on."""
  assert "\n" not in command
  show = f"printf '%s\\0' {command.replace('$$', '$')}"
  done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True)
  return done.stdout.split("\0")[:-1]


def refused(*words: str) -> str:
  """What is said of words that are refused; nothing is written then."""
  with pytest.raises(ConfigError) as error:
    launch.main([TINY, *words])
  assert not list(Path("launches").rglob("*"))
  return str(error.value)


KEYS = (
  "model_name=tiny",
  "custom_mesh_and_rule=pure_fsdp",
  "prompt=line\nand 'quotes' \"here\" = $x $(HOME) $$ \\n [a, b]",
  "eval_sample_prompt=[x",
  "load_parameters_path=",
  "resume_changes=[steps, learning_rate]",
  "logical_axis_rules={norm: [fsdp], kv: []}",
  "learning_rate=1e-5",
  "head_dim=null",
  "log_config=no",
  "run_name=007",
)


@pytest.mark.parametrize("target", [GKE, XPK, DOCKER], ids=["gke", "xpk", "docker"])
def test_the_run_there_has_the_configuration_that_was_checked_here(place, target):
  own = [TINY, *target, *KEYS]
  assert launch.main(own) == 0
  here = config.load(own, {}, purpose="launch").values
  if target is GKE:
    words = words_of(written(place))
  else:
    words = words_of_script(place, "*.sh")
    if target is XPK:
      words = in_a_shell(next(w for w in words if w.startswith("--command=")).split("=", 1)[1])
    words = words[words.index("train") + 1 :]
  there = config.load(words, {}, purpose="launch").values
  hardware = {GKE: "tpu", XPK: "tpu", DOCKER: "cpu"}[target]
  expected = here | {"hardware": hardware}
  if target is not DOCKER:
    expected["exit_code_when_stopped"] = 75
  for key, value in expected.items():
    assert there[key] == value or key.startswith("launch_"), key
  assert there["learning_rate"] == 1e-5 and there["prompt"].startswith("line\nand")


@pytest.mark.parametrize("name", ["quickstart.yml", "recipe.yml"])
def test_what_waits_in_a_file_for_another_key_is_left_out(place, name):
  """Such keys are refused on a command line, which a run there has instead of the file."""
  Path("recipe.yml").write_text("decoder_block: mixtral\nload_balance_loss_weight: 0.01\n")
  file = name if name == "recipe.yml" else str(PACKAGED / name)
  off = ("eval_interval=-1", "opt_type=sgd", "decoder_block=llama2", "lr_schedule_type=constant")
  assert launch.main([file, *GKE, *off, "per_device_batch_size=1"]) == 0
  words = words_of(written(place))
  assert "eval_interval=-1" in words and not any("load_balance" in word for word in words)
  config.load(words, {}, purpose="launch")


@pytest.mark.parametrize(
  "word, complaint",
  [
    ("ici_tensor_parallelism=3", "4 devices cannot be arranged as tensor 3"),
    ("ici_fsdp_parallelism=8", "4 devices"),
    ("per_device_batch_size=0.1", "rows on 4 devices"),
    ("hardware=cpu", "cpu is not what v5p-8 has"),
    ("hardware=gpu", "gpu is not what v5p-8 has"),
    ("launch_machine=v5p-7", "there is no slice 'v5p-7'"),
    ("launch_image=", "launch_target=gke needs it"),
    ("base_output_directory=runs", "is lost with the container"),
    ("launch_volume=gs://a/b", "not of the form gs://BUCKET"),
    ("launch_volume=My_Claim", "is no PersistentVolumeClaim"),
    ("dataset_path=corpus/*.txt", "is of this machine; put it on launch_volume"),
    ("load_parameters_path=/tmp", "is of this machine; put it on launch_volume"),
    ("launch_machine=v5p128", "did you mean 'v5p-128'?"),
    ("launch_machine=v5p_128", "did you mean 'v5p-128'?"),
    ("launch_machine=h100mega16", "did you mean 'h100-mega-8'?"),
    ("launch_overlay=/nowhere.yml", "No such file or directory; name a YAML file"),
    ("processes=2", "has no effect with launch_target=gke"),
    ("launch_environment=[HF_TOKEN=x]", "looks like a secret"),
    ("launch_machine=h100-12", "nodes of 8"),
    ("lauch_machine=v5p-8", "did you mean 'launch_machine'"),
    ("base_output_directory=/data/../runs", "'/data/../runs' is lost with the container"),
    ("load_parameters_path=/data/../tmp", "'/data/../tmp' is of this machine"),
    ("launch_image=bad image", "'bad image' is no container image"),
    ("launch_image=UPPER/x:v1", "'UPPER/x:v1' is no container image; write HOST/NAME:TAG"),
    ("launch_image=x:v1:v2", "'x:v1:v2' is no container image"),
    ("launch_image=r.io/x@sha256:12", "is no container image"),
    ("launch_image=https://r.io/x", "is no container image"),
    ("launch_environment=[URL=https://me:hunter2@host/x]", "URL looks like a secret"),
    ("prompt=see amqp://:hunter2@host", "prompt: amqp... looks like a secret"),
    ("launch_mount=/", "'/' is no path in a container"),
    ("launch_mount=/data/../mnt", "'/data/../mnt' is no path in a container"),
    ("launch_mount=/dev/shm", "'/dev/shm' collides with /dev of the container"),
    ("launch_mount=/opt", "'/opt' collides with /opt/maxtext of the container"),
    ("compile_topology=v5e-16", "v5e-16, but the run is to be on v5p-8, 2x2x1"),
    ("compile_topology=v5p-16", "v5p-16, but the run is to be on v5p-8, 2x2x1"),
    ("compile_topology=cpu-4", "cpu-4, but the run is to be on v5p-8, 2x2x1"),
  ],
)
def test_what_cannot_run_there_is_refused_before_anything_is_written(word, complaint):
  key = word.partition("=")[0]
  words = [other for other in GKE if not other.startswith(f"{key}=")]
  assert complaint in refused(*words, word)


def test_gpus_have_no_slices():
  words = (GKE[0], *GKE[2:], "launch_machine=h100-8", "num_slices=2")
  assert "num_slices: 2, but GPUs have no slices; use num_slices=1" in refused(*words)


@pytest.mark.parametrize(
  "machine, compiled, slices",
  [
    ("v5litepod-16", "v5e-16", 1),
    ("v5p-4x4x4", "v5p-128", 2),
    ("h100-mega-16", "h100-16", 1),
    ("v5p-8", "v5p-8", 2),
  ],
)
def test_a_topology_that_is_the_machine_by_another_name_is_taken(place, machine, compiled, slices):
  own = (f"launch_machine={machine}", f"compile_topology={compiled}", f"num_slices={slices}")
  assert launch.main([TINY, GKE[0], *GKE[2:], *own]) == 0


def test_as_many_slices_are_compiled_for_as_there_will_be():
  named = ("compile_topology=v5p-8", "compile_topology_num_slices=2")
  assert "2, but num_slices=1; use null" in refused(*GKE, *named)


@pytest.mark.parametrize("virtual", [8, 4])
def test_docker_without_a_machine_has_the_devices_that_it_compiles_for(virtual):
  words = (*DOCKER, "hardware=cpu", "compile_topology=cpu-8", f"devices={virtual}")
  if virtual == 8:
    assert launch.main([TINY, *words]) == 0
  else:
    assert "cpu-8, but the run is to be on this machine" in refused(*words)


@pytest.mark.parametrize(
  "image",
  [
    "img",
    "user/img:V1.2_x",
    "europe-west4-docker.pkg.dev/my-project/repo/max__text:v1",
    "localhost:5000/img@sha256:" + "0a" * 32,
    "Registry.example:5000/a/b:v1@sha256:" + "0a" * 32,
  ],
)
def test_an_image_of_any_registry_is_taken_and_no_url_without_a_password_is_a_secret(place, image):
  urls = "launch_environment=[A=http://host:80/x@y, B=https://me@host/x]"
  assert launch.main([TINY, *GKE[:2], *GKE[3:], f"launch_image={image}", urls]) == 0


@pytest.mark.parametrize(
  "where", ["prompt={}", "launch_environment=[A={}]", "run_name={}", "launch_secrets=[{}]"]
)
def test_what_looks_like_a_token_is_refused_and_not_repeated(where):
  said = refused(*GKE, where.format(TOKEN))
  assert where.partition("=")[0] in said and TOKEN not in said


def test_the_second_launch_shows_what_the_first_had_otherwise(place, monkeypatch, capsys):
  program(place, "kubectl")
  monkeypatch.setenv("PATH", f"{place}/bin")
  assert launch.main([TINY, *GKE, "--submit"]) == 0
  assert (place / "asked").read_text() == "apply\n--filename=launches/tiny/gke.yml\n"
  assert "not launched before" in capsys.readouterr().out
  assert launch.main([TINY, *GKE, "steps=61"]) == 0
  assert launch.main([TINY, *GKE, "steps=62"]) == 0
  said = capsys.readouterr().out
  assert "-              - steps=60\n+              - steps=62\n" in said
  assert "kubectl logs" in said and "service/tiny-tensorboard 6006" in said
  assert launch.main([TINY, *GKE]) == 0
  assert "as last time" in capsys.readouterr().out


def test_a_launch_that_fails_is_none(place, monkeypatch, capsys):
  program(place, "kubectl", code=3)
  monkeypatch.setenv("PATH", f"{place}/bin")
  assert launch.main([TINY, *GKE, "--submit"]) == 3
  launch.main([TINY, *GKE])
  said = capsys.readouterr().out
  assert said.count("not launched before") == 2 and "not started: kubectl ended with 3" in said
  assert said.count("kubectl logs") == 1  # of the one that was not tried


@pytest.mark.parametrize("target, name", [(GKE, "kubectl"), (XPK, "xpk"), (DOCKER, "docker")])
def test_a_program_that_is_not_there_is_said_in_a_line(place, monkeypatch, target, name):
  monkeypatch.setenv("PATH", str(place))
  with pytest.raises(ConfigError, match=f"{name} is not there; install it") as error:
    launch.main([TINY, *target, "--submit"])
  assert error.value.exit_code == 2


def test_an_overlay_is_laid_over_the_manifest(place):
  Path("mine.yml").write_text("""
kind: JobSet
metadata: {labels: {kueue.x-k8s.io/queue-name: queue}}
spec:
  replicatedJobs:
  - name: slice
    template:
      spec:
        template:
          spec:
            hostNetwork: null
            serviceAccountName: trainer
            containers: [{name: train, imagePullPolicy: Always}, {name: sidecar, image: s:1}]
""")
  assert launch.main([TINY, *GKE, "launch_overlay=mine.yml"]) == 0
  run, *_ = yaml.safe_load_all(written(place))
  assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "queue"
  pod = run["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["serviceAccountName"] == "trainer" and "hostNetwork" not in pod
  train, sidecar = pod["containers"]
  assert (train["image"], train["imagePullPolicy"]) == ("img:1", "Always")
  assert sidecar == {"name": "sidecar", "image": "s:1"}


def test_the_documented_overlay_is_one_and_gives_what_it_says(place):
  page = (PACKAGED.parent / "docs" / "launch.md").read_text()
  Path("mine.yml").write_text(page.split("```yaml\n")[1].split("```")[0])
  assert launch.main([TINY, *GKE, "launch_overlay=mine.yml"]) == 0
  run, deployment, _ = yaml.safe_load_all(written(place))
  pod = run["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  accounts = {pod["serviceAccountName"]}
  accounts.add(deployment["spec"]["template"]["spec"]["serviceAccountName"])
  assert accounts == {"trainer"} and pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"


# Overlays of the job of a slice, and of its pod
WORK = "kind: JobSet\nspec: {{replicatedJobs: [{{name: slice, template: {{spec: {{{}}}}}}}]}}"
POD = WORK.replace("{}", "template: {{spec: {{{}}}}}")


@pytest.mark.parametrize(
  "overlay, complaint",
  [
    ("kind: JobSet\nspec: {replicas: 2}", "JobSet spec.replicas: there is no such field"),
    ("kind: JobSet\nspec: {suspend: 'yes'}", "JobSet spec.suspend: 'yes' is neither true nor"),
    ("kind: JobSet\nmetadata: {labels: {a: 1}}", "JobSet metadata.labels.a: '1' is not a label"),
    ("kind: Service\nspec: {ports: [{port: 0}]}", "Service spec.ports[0].port: '0' is not the"),
    ("kind: Deployment\nspec: {template: {spec: null}}", "Deployment spec.template: has no spec"),
    ("kind: JobSet\nmetadata: {labels: {a: true}}", 'at most 63; quote it, as "true"'),
    ("kind: JobSet\nmetadata: {name: mine}", "'mine' is not 'tiny', by which others find it"),
    ("kind: Service\nmetadata: {namespace: x}", "leave it away, and set launch_namespace"),
    (WORK.format("completions: 2"), "template.spec.completions: 2 is not 1, the hosts of"),
    (WORK.format("parallelism: 2, completions: 2"), "template.spec.parallelism: 2 is not 1"),
    (POD.format("nodeSelector: {spot: true}"), "spec.nodeSelector.spot: 'true' is not a label"),
    (POD.format("restartPolicy: Always"), "restartPolicy: 'Always' cannot be here; use Never"),
    (POD.format("restartPolicy: OnFailure"), "'OnFailure' cannot be here; use Never"),
    (POD.format("restartPolicy: null"), "restartPolicy: 'Always' cannot be here; use Never"),
    (POD.format("containers: [{name: 7}]"), "containers[0].name: '7' is not a name of"),
    (
      POD.format("containers: [{name: trian, env: []}]"),
      "containers[1]: has no image; 'trian' is new there, did you mean 'train'?",
    ),
    (
      POD.format("containers: [{name: train, volumeMounts: [{name: rnus, mountPath: /x}]}]"),
      "containers[0].volumeMounts[2].name: 'rnus' is no volume of the pod, did you mean 'runs'?",
    ),
    (
      POD.format("initContainers: [{name: a, image: b, volumeMounts: [{name: c, mountPath: /}]}]"),
      "initContainers[0].volumeMounts[0].name: 'c' is no volume of the pod; there are runs, shm",
    ),
    (
      POD.format("containers: [{name: train, volumeMounts: [{name: shm, mountPath: /data}]}]"),
      "containers[0].volumeMounts[1].mountPath: '/data' is mounted twice",
    ),
    (
      POD.replace("slice", "workers").format("hostNetwork: true"),
      "template.spec.template.spec: has no containers; 'workers' is new there; there are slice",
    ),
    (
      "kind: Deployment\nspec: {template: {spec: {restartPolicy: Never}}}",
      "Deployment spec.template.spec.restartPolicy: 'Never' cannot be here; use Always",
    ),
    ("kind: Pod", "says no kind: of JobSet, Deployment, Service"),
    ("{", "cannot be read"),
    (f"kind: JobSet\nspec: {{managedBy: {TOKEN}}}", "launch_overlay: hf_a... looks like a secret"),
  ],
)
def test_what_kubernetes_would_not_take_is_refused(overlay, complaint):
  Path("mine.yml").write_text(overlay)
  assert complaint in refused(*GKE, "launch_overlay=mine.yml")


def test_xpk_is_told_to_start_again_what_ends_with_75(place):
  launch.main([TINY, *XPK, "launch_grace_seconds=900"])
  words = words_of_script(place, "xpk.sh")
  assert words[:3] == ["xpk", "workload", "create"]
  told = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
  assert told["tpu-type"] == "v5litepod-16" and told["num-slices"] == "1"
  assert told["restart-on-exit-codes"] == "1,75" and told["max-restarts"] == "10"
  assert told["termination-grace-period-seconds"] == "900" and told["storage"] == "store"


def test_tensorboard_reads_the_storage_of_a_run_by_xpk(place, capsys):
  launch.main([TINY, *XPK])
  said = capsys.readouterr().out
  assert "kubectl apply --filename=launches/tiny/tensorboard.yml && kubectl rollout" in said
  deployment, service = yaml.safe_load_all(written(place, "tensorboard.yml"))
  pod = deployment["spec"]["template"]["spec"]
  assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "store-pvc"}
  assert pod["containers"][0]["volumeMounts"][0]["readOnly"]
  assert "--logdir=/data/runs/tiny" in pod["containers"][0]["command"]
  assert service["metadata"]["name"] in said


@pytest.mark.parametrize("machine", ["v5e-8", "v6e-8", "v5p-8", "h100-8"])
def test_docker_is_given_a_machine_that_is_one_host(place, machine):
  assert launch.main([TINY, *DOCKER, f"launch_machine={machine}"]) == 0


@pytest.mark.parametrize("machine", ["v5e-16", "v5p-16", "h100-16"])
def test_docker_is_not_given_more_than_one_host(machine):
  assert "more than this host" in refused(*DOCKER, f"launch_machine={machine}")


@pytest.mark.parametrize(
  "volume, complaint",
  [
    ("runs/mine", "no absolute path, which docker demands; use /"),
    ("/nowhere/at/all", "'/nowhere/at/all' is no folder of this machine; make it"),
    ("gs://bucket", "buckets are mounted on GKE only"),
  ],
)
def test_docker_mounts_a_folder_that_is_there(volume, complaint):
  assert complaint in refused(*DOCKER[:2], GKE[4], f"launch_volume={volume}")


def test_docker_is_not_called_for_a_secret_that_is_not_set(place, monkeypatch):
  program(place, "docker")
  monkeypatch.setenv("PATH", f"{place}/bin")
  monkeypatch.delenv("HF_TOKEN", raising=False)
  words = (*DOCKER, "launch_secrets=[HF_TOKEN]", "--submit")
  assert "launch_secrets: HF_TOKEN is not set here" in refused(*words)
  assert not (place / "asked").exists()
  monkeypatch.setenv("HF_TOKEN", "x")
  assert launch.main([TINY, *words]) == 0


def test_docker_passes_secrets_on_by_name(place):
  launch.main([TINY, *DOCKER, "launch_secrets=[HF_TOKEN]", "launch_machine=h100-8"])
  words = words_of_script(place, "docker.sh")
  assert words[:2] == ["docker", "run"] and words[words.index("img:1") + 1] == "python"
  assert {"--env=HF_TOKEN", "--gpus=all", "--volume=/srv:/data", "--init"} <= set(words)
  assert "hardware=gpu" in words


def test_what_starts_at_once_is_not_submitted():
  assert "starts at once" in refused("launch_target=local", "--submit")


def test_several_local_processes_share_the_cpu_and_nothing_else():
  said = refused("launch_target=local", "processes=2", "hardware=gpu")
  assert "share its CPU" in said


@pytest.mark.slow
def test_a_local_launch_of_two_processes_trains_and_goes_on(tmp_path):
  local_runs.trains_and_goes_on(tmp_path)
