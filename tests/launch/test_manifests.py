"""The Kubernetes manifests of `launch/`, held against JobSet's own models and against what their comments promise.

The models are made from the API's OpenAPI description, pod and volume and all. They drop a key that they do not know
without a word, where the API server refuses it, so what goes in must come out again.
"""

import re
import shlex
import socket
import sys

import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet
from pydantic import ValidationError
from system import RECIPE, ROOT, rows, started

MANIFESTS = ("k8s_gpu.yaml", "gke_tpu.yaml")
PLACEHOLDER = r"\$\{(\w+)\}"


def _text(name):
    return (ROOT / "launch" / name).read_text()


def _head(name):
    """The comment at its head, where the commands are."""
    return _text(name).split("\napiVersion:")[0]


def _exported(name):
    """The variables that the commands at its head set."""
    lines = re.findall(r"^#   export (.*)$", _head(name), re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


def _filled(text, values):
    return re.sub(PLACEHOLDER, lambda found: values[found[1]], text)


def _manifest(name, **values):
    return yaml.safe_load(_filled(_text(name), _exported(name) | values))


def _validate(manifest):
    """Raises `ValidationError` for a value of the wrong type, `KeyError` for keys that JobSet does not have."""
    kept = JobsetV1alpha2JobSet.from_dict(manifest).to_dict()
    if lost := list(_lost(manifest, kept, "")):
        raise KeyError(", ".join(lost))


def _lost(given, kept, where):
    if isinstance(given, dict):
        for key, value in given.items():
            if key in kept:
                yield from _lost(value, kept[key], f"{where}.{key}")
            else:
                yield f"{where}.{key}"
    elif isinstance(given, list):
        for place, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _lost(one, other, f"{where}[{place}]")
    elif given != kept:
        yield f"{where}={given!r}"


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_filled_as_its_head_says_is_a_job_set(name):
    placeholders = set(re.findall(PLACEHOLDER, _text(name)))
    listed = re.search(r"^#   envsubst '(.*)' < launch/(\S+) \|", _head(name), re.MULTILINE)
    assert listed[2] == name
    assert set(_exported(name)) == {word.removeprefix("$") for word in listed[1].split()} == placeholders
    _validate(_manifest(name))


@pytest.mark.parametrize(
    ("right", "wrong", "error", "said"),
    [
        ("backoffLimit: 0", "backofLimit: 0", KeyError, "spec.backofLimit"),
        ("restartPolicy: Never", "restartpolicy: Never", KeyError, "spec.restartpolicy"),
        ("mountPath: /dev/shm", "mountpath: /dev/shm", KeyError, "volumeMounts[2].mountpath"),
        ("maxRestarts: 20", "maxRestarts: many", ValidationError, "maxRestarts"),
        ("parallelism: ${", "parallelism: x${", ValidationError, "parallelism"),
        ("values: [2, 75]", "values: 2", ValidationError, "values"),
    ],
)
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_slip_in_a_manifest_is_found(name, right, wrong, error, said):
    text = _filled(_text(name).replace(right, wrong), _exported(name))
    assert right in _text(name)
    with pytest.raises(error, match=re.escape(said)):
        _validate(yaml.safe_load(text))


def _parts(manifest):
    """The replicated job, its Job's spec, its pod's spec, its one container."""
    [replicated] = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    return replicated, job, pod, container


def _matches(rule, message):
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    return any(re.fullmatch(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [".*"]))


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_restart_compiles_nothing_again_and_reads_the_data_of_a_volume_of_its_own(name):
    _, _, pod, container = _parts(_manifest(name))
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert environment["JAX_COMPILATION_CACHE_DIR"].startswith("/runs/")
    [data] = [one for one in container["volumeMounts"] if one["mountPath"] == "/data"]
    assert data["readOnly"]
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
    assert set(container["resources"]["requests"]) == {"cpu", "memory"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_all_pods_start_and_fail_together_and_a_mistake_is_not_tried_again(name):
    manifest = _manifest(name)
    _, job, pod, container = _parts(manifest)
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] > 1
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # which podFailurePolicy asks for, too
    by_code, by_condition = job["podFailurePolicy"]["rules"]
    assert by_code["action"] == by_condition["action"] == "FailJob"
    assert by_code["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 75]}
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    # Reason and messages are what Kubernetes writes for a Job that `FailJob` has failed (pkg/controller/job).
    for message, action in (
        (
            "Container vit-dist for pod default/b16-node-0-1 failed with exit code 2 matching FailJob rule",
            "FailJobSet",
        ),
        (
            "Container vit-dist for pod default/b16-node-0-1 failed with exit code 75 matching FailJob rule at index 0",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
        (
            "Pod default/b16-node-0-1 has condition DisruptionTarget matching FailJob rule at index 1",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
    ):
        matching = [rule for rule in policy["rules"] if _matches(rule, message)]
        assert matching[0]["action"] == action


@pytest.mark.parametrize("name", MANIFESTS)
def test_signals_reach_the_command_and_it_has_time_to_save_where_it_can_be_read_again(name):
    values = _exported(name)
    _, _, pod, container = _parts(_manifest(name))
    assert container["command"][0] == "vit-dist"  # no shell, which would keep the signal to itself
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert f"--config={values['CONFIG']}" in container["command"]
    assert f"--workdir={values['WORKDIR']}" in container["command"]
    mounted = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    volumes = {one["name"]: one for one in pod["volumes"]}
    assert set(mounted.values()) == set(volumes)
    assert "persistentVolumeClaim" in volumes[mounted["/runs"]] and values["WORKDIR"].startswith("/runs/")
    assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_the_gpu_pods_launch_a_process_a_gpu_and_meet_at_pod_0():
    manifest = _manifest("k8s_gpu.yaml", NAME="b16", NODES="4")
    replicated, job, _, container = _parts(manifest)
    options = dict(word[2:].split("=", 1) for word in container["command"] if "=" in word)
    assert int(options["processes"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(options["nodes"]) == job["completions"] == 4
    secret, rank = [one for one in container["env"] if "valueFrom" in one]
    assert secret["valueFrom"] == {"secretKeyRef": {"name": "b16-job", "key": "secret"}}
    assert options["node-rank"] == f"$({rank['name']})"
    annotation = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert rank["valueFrom"]["fieldRef"]["fieldPath"] == annotation
    # JobSet names a pod <job set>-<replicated job>-<job>-<pod>, and its service like the job set.
    assert manifest["spec"]["network"]["enableDNSHostnames"]
    host, port = options["coordinator"].split(":")
    assert host == f"b16-{replicated['name']}-0-0.b16"
    assert int(port) in [one["containerPort"] for one in container["ports"]]


def test_the_tpu_pods_take_whole_slices_each_on_a_node_pool_of_its_own():
    manifest = _manifest("gke_tpu.yaml", SLICES="2", TOPOLOGY="4x8", HOSTS="8", CHIPS="4", ACCELERATOR="tpu-v6e-slice")
    replicated, job, pod, container = _parts(manifest)
    assert replicated["replicas"] == 2 and "--config.mesh.dcn_data=2" in container["command"]
    assert container["resources"]["limits"]["google.com/tpu"] * job["completions"] == 4 * 8
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    exclusive = manifest["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"


@pytest.mark.slow
def test_the_commands_of_two_gpu_pods_train_together(tmp_path):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    manifest = _manifest("k8s_gpu.yaml", NODES="2", CONFIG=str(RECIPE), WORKDIR=str(tmp_path / "run"))
    command = _parts(manifest)[3]["command"]
    # What differs here: this machine's address for pod 0's, and one process of fake devices for eight GPUs.
    changed = {
        "vit-dist": f"{sys.executable} -m vit_dist",
        "--processes=8": "--processes=1 --devices-per-process=4",
        "--coordinator=b16-node-0-0.b16:29500": f"--coordinator=127.0.0.1:{port}",
    }
    words = [part for word in command for part in changed.get(word, word).split(" ")]
    assert not set(changed) & set(words)
    first_pod, second_pod = ([word.replace("$(NODE_RANK)", rank) for word in words] for rank in "01")
    with (
        started(first_pod, tmp_path / "0") as first,
        started(second_pod, tmp_path / "1") as second,
    ):
        assert (first.wait(), second.wait()) == (0, 0), first.said()[-3000:] + second.said()[-3000:]
    assert first.result()["step"] == 20 and "{" not in second.stdout.read_text()
    assert [row["step"] for row in rows(tmp_path / "run") if row["split"] == "train"] == list(range(1, 21))
