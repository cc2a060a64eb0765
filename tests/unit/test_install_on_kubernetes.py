from __future__ import annotations

import copy
import doctest
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cryptography.fernet import Fernet

from airflow_mlops import __version__
from airflow_mlops.integrations.kubernetes_manifests import PORT, KubernetesEndpoint, object_name
from airflow_mlops.runners.kubernetes import ResourceSpec
from tests.conftest import REPOSITORY
from tests.fakekube.objects import KINDS, SCHEMAS, Store

Manifest = dict[str, Any]

DEPLOY = REPOSITORY / "deploy"
FOLDER = DEPLOY / "kubernetes"
PAGE = REPOSITORY / "docs" / "how-to" / "install-on-kubernetes.md"
DEPLOYING = REPOSITORY / "docs" / "how-to" / "deploy-elsewhere.md"
NAMESPACE, STEPS, MODELS = "mlops", "mlops-steps", "mlops-models"
NAMESPACES = (NAMESPACE, STEPS, MODELS)
DNS = "kube-system"
IMAGE = "registry.example.com/airflow-mlops"

KUSTOMIZATIONS = {
    folder: yaml.safe_load((folder / "kustomization.yaml").read_text())
    for folder in (FOLDER, DEPLOY / "prometheus", DEPLOY / "grafana")
}
VALUES = yaml.safe_load((FOLDER / "airflow-values.yaml").read_text())
#: Files of the folder that are no objects of the install.
OTHERS = {"kustomization.yaml", "airflow-values.yaml"}


def objects() -> Iterator[Manifest]:
    for file in KUSTOMIZATIONS[FOLDER]["resources"]:
        if not file.startswith("../"):
            yield from yaml.safe_load_all((FOLDER / file).read_text())


def key(one: Manifest) -> str:
    """Kind and name, with the namespace where that is not Airflow's."""
    where = one["metadata"].get("namespace", NAMESPACE)
    return "/".join([*([where] if where != NAMESPACE else []), one["kind"], one["metadata"]["name"]])


OBJECTS = {key(one): one for one in objects()}
WORKLOADS = {name: one for name, one in OBJECTS.items() if one["kind"] in ("Deployment", "StatefulSet")}
POD_SPECS = {name: one["spec"]["template"]["spec"] for name, one in WORKLOADS.items()}


@pytest.fixture(scope="module")
def secrets() -> dict[str, dict[str, str]]:
    """What the script makes, by name."""
    return read_secrets()


def read_secrets(*arguments: str) -> dict[str, dict[str, str]]:
    command = [FOLDER / "secrets.sh", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    made = list(yaml.safe_load_all(done.stdout))
    for secret in made:
        kubernetes_validate.validate(secret, SCHEMAS, strict=True)
        assert secret["metadata"]["namespace"] == NAMESPACE
    return {secret["metadata"]["name"]: secret["stringData"] for secret in made}


def test_there_is_something():
    assert len(OBJECTS) >= 20
    assert set(WORKLOADS) == {"StatefulSet/postgres", "Deployment/mlflow"}


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_fits_its_schema_and_no_field_is_unknown(name):
    kubernetes_validate.validate(copy.deepcopy(OBJECTS[name]), SCHEMAS, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(OBJECTS[name] | {"speck": {}}, SCHEMAS, strict=True)


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_is_in_a_namespace_of_ours(name):
    one = OBJECTS[name]
    expected = {
        "Namespace": {None},
        "Role": {STEPS, MODELS},
        "RoleBinding": {STEPS, MODELS},
        "NetworkPolicy": {*NAMESPACES},
    }
    assert one["metadata"].get("namespace") in expected.get(one["kind"], {NAMESPACE})
    for subject in one.get("subjects", ()):
        assert subject["namespace"] == NAMESPACE


def test_the_namespaces_are_three_and_two_take_restricted_pods_only():
    made = {one["metadata"]["name"]: one for one in OBJECTS.values() if one["kind"] == "Namespace"}
    assert tuple(made) == NAMESPACES
    for name in (STEPS, MODELS):
        assert made[name]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_kustomization_lists_exactly_what_is_there():
    ours = KUSTOMIZATIONS[FOLDER]
    files = {file.name for file in FOLDER.glob("*.yaml")} - OTHERS
    assert {file for file in ours["resources"] if not file.startswith("../")} == files
    bases = {(FOLDER / file).resolve() for file in ours["resources"] if file.startswith("../")}
    assert bases == set(KUSTOMIZATIONS) - {FOLDER}
    generated = [
        folder / file
        for folder, what in KUSTOMIZATIONS.items()
        for one in what["configMapGenerator"]
        for file in one["files"]
    ]
    assert {file.relative_to(DEPLOY).as_posix() for file in generated if file.is_file()} == {
        "kubernetes/postgres-init.sh",
        "prometheus/rules.yaml",
        "grafana/serving.json",
    }
    assert all(
        one["namespace"] == NAMESPACE
        for what in KUSTOMIZATIONS.values()
        for one in what["configMapGenerator"]
    )


def test_kustomize_renders_it():
    """By kubectl's own, which needs no cluster."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed here: kustomize is part of it")
    command = ["kubectl", "kustomize", FOLDER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rendered = {key(one): one for one in yaml.safe_load_all(done.stdout)}
    maps = {name for name in rendered if name.startswith("ConfigMap/")}
    assert {name for name in maps if not name.startswith("ConfigMap/postgres-init-")} == {
        "ConfigMap/airflow-mlops-rules",
        "ConfigMap/airflow-mlops-board",
    }
    assert set(rendered) - maps == set(OBJECTS)
    for manifest in rendered.values():
        kubernetes_validate.validate(manifest, SCHEMAS, strict=True)
    (container,) = rendered["Deployment/mlflow"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"{IMAGE}:{__version__}"
    volumes = rendered["StatefulSet/postgres"]["spec"]["template"]["spec"]["volumes"]
    assert f"ConfigMap/{volumes[0]['configMap']['name']}" in maps, (
        "the generated name is the one that is mounted"
    )


class TestSecrets:
    def test_every_one_that_is_asked_for_is_made(self, secrets):
        asked = {(one["name"], one["key"]) for one in find(POD_SPECS, "secretKeyRef")}
        asked |= {("airflow-keys", f"{key}") for key in ("fernet-key", "api-secret-key", "jwt-secret")}
        asked |= {("airflow-metadata", "connection"), ("airflow-users", "passwords.json")}
        assert {
            VALUES[name] for name in ("fernetKeySecretName", "apiSecretKeySecretName", "jwtSecretName")
        } == {"airflow-keys"}
        assert VALUES["data"]["metadataSecretName"] == "airflow-metadata"
        asked |= {("airflow-connections", key) for key in secrets["airflow-connections"]}
        (source,) = yaml.safe_load(VALUES["extraEnvFrom"])
        assert source["secretRef"]["name"] == "airflow-connections"
        assert {volume["secretName"] for volume in find(VALUES, "secret")} == {"airflow-users"}
        assert asked == {(name, key) for name, keys in secrets.items() for key in keys}

    def test_nobody_has_seen_them(self, secrets):
        again = read_secrets()
        same = {
            (name, key)
            for name, keys in secrets.items()
            for key, value in keys.items()
            if again[name][key] == value
        }
        assert same == {
            ("airflow-connections", "AIRFLOW_CONN_MLFLOW_DEFAULT"),
            ("airflow-connections", "AIRFLOW_CONN_KUBERNETES_DEFAULT"),
        }
        assert not [file for file in DEPLOY.rglob("*.yaml") if "kind: Secret\n" in file.read_text()]

    def test_keys_are_ones(self, secrets):
        Fernet(secrets["airflow-keys"]["fernet-key"])
        assert len(secrets["airflow-keys"]["jwt-secret"]) == 128

    def test_connections_are_what_the_hooks_read(self, secrets, monkeypatch):
        from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook

        from airflow_mlops.hooks.services import services_from_connections

        for name, value in secrets["airflow-connections"].items():
            monkeypatch.setenv(name, value)
        services = services_from_connections(
            mlflow_conn_id="mlflow_default",
            bentoml_conn_id="bentoml_default",
            ledger_conn_id="ledger_default",
        )
        service = OBJECTS["Service/mlflow"]
        (port,) = service["spec"]["ports"]
        assert services.tracking_uri == f"http://{service['metadata']['name']}.{NAMESPACE}.svc:{port['port']}"
        allowed = next(arg for arg in mlflow_arguments() if arg.startswith("--allowed-hosts="))
        assert services.tracking_uri.removeprefix("http://") in allowed.partition("=")[2].split(",")
        password = secrets["postgres"]["ledger-password"]
        assert (
            services.ledger_url == f"postgresql+psycopg2://ledger:{password}@postgres.mlops.svc:5432/ledger"
        )
        assert services.endpoint_url == f"{endpoint_of('trip_fare').url}:80"
        assert services.endpoint_token
        assert KubernetesHook(conn_id="kubernetes_default").get_namespace() == STEPS, (
            "the runner's default; the deploying operator is given the models'"
        )

    @pytest.mark.parametrize(
        "model",
        [
            "trip-fare",
            "trip_fare",
            "TripFare",
            "_fare",
            "a--b",
            "fähre",
            "ä",
            "7",
            "x" * 60,
            "taxi-fare-fe354d",
        ],
    )
    def test_the_endpoint_is_the_service_of_the_model_that_is_named(self, model):
        value = read_secrets(model)["airflow-connections"]["AIRFLOW_CONN_BENTOML_DEFAULT"]
        assert json.loads(value)["host"] == f"{object_name(model)}.{MODELS}.svc"
        assert f"http://{json.loads(value)['host']}" == endpoint_of(model).url

    def test_addresses_hold_in_the_namespace_of_steps_too(self, secrets):
        values = "".join(secrets["airflow-connections"].values())
        services = [one for one in OBJECTS.values() if one["kind"] == "Service"]
        assert len(services) == 2
        for service in services:
            name = service["metadata"]["name"]
            assert re.findall(rf"\b{name}[.:][\w.-]*", values) == [f"{name}.{NAMESPACE}.svc"]

    def test_databases_are_opened_by_the_passwords_they_are_made_with(self, secrets):
        passwords = secrets["postgres"]
        for name, key, url in (
            ("mlflow", "backend-store-uri", "postgresql+psycopg2"),
            ("airflow-metadata", "connection", "postgresql+psycopg2"),
        ):
            owner = name.partition("-")[0]
            expected = f"{url}://{owner}:{passwords[f'{owner}-password']}@postgres.mlops.svc:5432/{owner}"
            assert secrets[name][key] == expected


class TestReferences:
    def test_config_maps_and_claims_exist(self):
        made = {one["name"] for one in KUSTOMIZATIONS[FOLDER]["configMapGenerator"]}
        assert {one["name"] for one in find(POD_SPECS, "configMap")} == made
        claims = {name.partition("/")[2] for name in OBJECTS if name.startswith("PersistentVolumeClaim/")}
        assert {one["claimName"] for one in find([POD_SPECS, VALUES], "persistentVolumeClaim")} == claims

    def test_volumes_that_are_mounted_exist(self):
        for name, spec in POD_SPECS.items():
            volumes = {one["name"] for one in spec["volumes"]}
            claimed = WORKLOADS[name]["spec"].get("volumeClaimTemplates", ())
            volumes |= {one["metadata"]["name"] for one in claimed}
            for container in spec["containers"]:
                assert {one["name"] for one in container["volumeMounts"]} == volumes

    @pytest.mark.parametrize("name", ["postgres", "mlflow"])
    def test_a_service_and_its_pods_find_each_other(self, name):
        service = OBJECTS[f"Service/{name}"]["spec"]
        (workload,) = (one for one in WORKLOADS.values() if one["metadata"]["name"] == name)
        template = workload["spec"]["template"]
        assert (
            service["selector"]
            == template["metadata"]["labels"]
            == workload["spec"]["selector"]["matchLabels"]
        )
        budget = OBJECTS[f"PodDisruptionBudget/{name}"]["spec"]
        assert budget["selector"]["matchLabels"] == service["selector"]
        (container,) = template["spec"]["containers"]
        ports = {one["name"]: one["containerPort"] for one in container["ports"]}
        (port,) = service["ports"]
        assert ports[port["targetPort"]] == port["port"]
        assert workload["spec"].get("serviceName", name) == name
        policy = OBJECTS[f"NetworkPolicy/{name}"]["spec"]
        assert policy["podSelector"]["matchLabels"].items() <= service["selector"].items()
        assert [rule["ports"] for rule in policy["ingress"]] == [[{"protocol": "TCP", "port": port["port"]}]]

    def test_whoever_runs_tasks_has_the_two_roles(self):
        """Airflow asks for these rights as the account that the chart gives its pods."""
        (account,) = (name.partition("/")[2] for name in OBJECTS if name.startswith("ServiceAccount/"))
        for part in ("scheduler", "triggerer", "workers"):
            assert VALUES[part]["serviceAccount"] == {"create": False, "name": account}
        bound = {
            one["roleRef"]["name"]: [(who["kind"], who["name"]) for who in one["subjects"]]
            for one in OBJECTS.values()
            if one["kind"] == "RoleBinding"
        }
        roles = {one["metadata"]["name"] for one in OBJECTS.values() if one["kind"] == "Role"}
        assert bound == {role: [("ServiceAccount", account)] for role in roles}
        assert len(roles) == 2
        assert VALUES["allowPodLaunching"] is False, "the chart would give the account rights of its own"


class TestRights:
    """What the account of Airflow's workers may, by the access rules of the fake API server."""

    @pytest.fixture
    def may(self) -> Callable[..., bool]:
        store = Store(namespaces={*NAMESPACES})
        groups = {kind: (group, resource) for (group, resource), (kind, _) in KINDS.items()}
        for one in OBJECTS.values():
            if one["kind"] in ("Role", "RoleBinding"):
                store.create(*groups[one["kind"]], one["metadata"]["namespace"], one)
        worker = f"system:serviceaccount:{NAMESPACE}:airflow-worker"

        def may(verb: str, resource: str, namespace: str, group: str = "") -> bool:
            return store.allowed(worker, verb, group, resource, namespace)

        return may

    def test_none_where_the_passwords_are(self, may):
        rules = [rule for one in OBJECTS.values() if one["kind"] == "Role" for rule in one["rules"]]
        asked = {
            (verb, resource, group)
            for rule in rules
            for verb in rule["verbs"]
            for resource in rule["resources"]
            for group in rule["apiGroups"]
        }
        assert {
            ("create", "pods", ""),
            ("create", "pods/exec", ""),
            ("create", "deployments", "apps"),
        } <= asked
        for verb, resource, group in asked:
            assert not may(verb, resource, NAMESPACE, group), f"{verb} {resource}"
        assert not [name for name in OBJECTS if "ClusterRole" in name]

    def test_pods_for_steps_and_deployments_for_models(self, may):
        assert may("create", "pods", STEPS)
        assert may("create", "pods/exec", STEPS)
        assert may("create", "deployments", MODELS, "apps")
        assert not may("create", "deployments", STEPS, "apps")
        assert not may("create", "pods", MODELS)
        assert not may("create", "pods/exec", MODELS)

    @pytest.mark.parametrize("file", ["role.yaml", "deploy-role.yaml"])
    def test_the_file_says_what_the_right_to_create_pods_is_worth(self, file):
        header = " ".join((FOLDER / file).read_text().partition("apiVersion")[0].replace("#", " ").split())
        assert "Who may create pods may read every secret of their namespace" in header
        assert "read none" not in header


class TestPods:
    @pytest.mark.parametrize("name", POD_SPECS)
    def test_ours_are_restricted_and_bounded(self, name):
        spec = POD_SPECS[name]
        assert not spec["automountServiceAccountToken"]
        assert not spec["enableServiceLinks"]
        assert restricted(spec["securityContext"])
        for container in spec["containers"]:
            security = container["securityContext"]
            assert unprivileged(security)
            assert security["readOnlyRootFilesystem"]
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert container["resources"]["limits"].keys() == {"memory"}
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()

    def test_airflows_are_restricted_and_bounded_too(self):
        assert restricted(VALUES["securityContexts"]["pod"])
        assert unprivileged(VALUES["securityContexts"]["containers"])
        parts = ["scheduler", "triggerer", "dagProcessor", "apiServer", "migrateDatabaseJob"]
        for part in (VALUES[name] for name in parts):
            assert restricted(part["securityContexts"]["pod"])
            assert unprivileged(part["securityContexts"]["container"])
            assert part["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in part["resources"]["limits"]
            waiting = part.get("waitForMigrations", {"securityContexts": part["securityContexts"]})
            assert unprivileged(waiting["securityContexts"]["container"])
        assert unprivileged(VALUES["dags"]["gitSync"]["securityContexts"]["container"])

    def test_kubernetes_would_take_what_the_chart_passes_on(self):
        """Contexts, resources, volumes and the container of ours, put where the chart puts them."""
        server = VALUES["apiServer"]
        for part in (VALUES[name] for name in ("scheduler", "triggerer", "dagProcessor", "apiServer")):
            container = {
                "name": "base",
                "image": IMAGE,
                "env": VALUES["env"],
                "envFrom": yaml.safe_load(VALUES["extraEnvFrom"]),
                "resources": part["resources"],
                "securityContext": part["securityContexts"]["container"],
                "volumeMounts": part.get("extraVolumeMounts", []),
            }
            spec = {
                "securityContext": part["securityContexts"]["pod"],
                "initContainers": part.get("extraInitContainers", []),
                "containers": [container],
                "volumes": part.get("extraVolumes", []),
            }
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
            kubernetes_validate.validate(pod, SCHEMAS, strict=True)
        (copying,) = server["extraInitContainers"]
        volumes = {volume["name"] for volume in server["extraVolumes"]}
        assert {mount["name"] for mount in copying["volumeMounts"]} == volumes
        file = VALUES["config"]["core"]["simple_auth_manager_passwords_file"]
        assert copying["command"][-1] == file
        (mount,) = server["extraVolumeMounts"]
        assert file == f"{mount['mountPath']}/passwords.json"

    def test_one_user_everywhere(self):
        (made,) = re.findall(r"useradd --uid (\d+)", (DEPLOY / "Dockerfile").read_text())
        users = {VALUES["uid"], VALUES["securityContexts"]["pod"]["runAsUser"]}
        users |= {POD_SPECS["Deployment/mlflow"]["securityContext"]["runAsUser"]}
        users |= {ResourceSpec().pod_security["runAsUser"]}
        assert users == {int(made)}

    def test_images_are_pinned_and_the_same_as_elsewhere(self):
        compose = yaml.safe_load((REPOSITORY / "docker-compose.yaml").read_text())["services"]
        (postgres,) = POD_SPECS["StatefulSet/postgres"]["containers"]
        assert re.fullmatch(re.escape(compose["postgres"]["image"]) + r"\.\d+-\w+", postgres["image"])
        (pinned,) = KUSTOMIZATIONS[FOLDER]["images"]
        assert (pinned["name"], pinned["newTag"]) == (IMAGE, __version__)
        (mlflow,) = POD_SPECS["Deployment/mlflow"]["containers"]
        assert mlflow["image"] == IMAGE
        (copying,) = VALUES["apiServer"]["extraInitContainers"]
        named = f"{VALUES['defaultAirflowRepository']}:{VALUES['defaultAirflowTag']}"
        assert named == copying["image"] == f"{IMAGE}:{__version__}"
        locked = (REPOSITORY / "requirements.lock").read_text()
        assert f"\napache-airflow=={VALUES['airflowVersion']} " in f"\n{locked}"

    def test_mlflow_is_started_as_in_compose(self):
        compose = yaml.safe_load((REPOSITORY / "docker-compose.yaml").read_text())["services"]["mlflow"]
        (container,) = POD_SPECS["Deployment/mlflow"]["containers"]
        theirs = {arg for arg in compose["command"] if arg.startswith("--")} - {"--backend-store-uri"}
        assert container["command"] == compose["command"][:2]
        assert {arg.partition("=")[0] for arg in mlflow_arguments()} == theirs
        env = {one["name"]: one.get("value") for one in container["env"]}
        assert compose["environment"].items() <= env.items()


class TestSettings:
    def test_airflow_has_them(self):
        from airflow.configuration import conf

        known = conf.configuration_description
        for section, options in VALUES["config"].items():
            assert options.keys() <= known[section]["options"].keys(), section
        for name in VALUES["enableBuiltInSecretEnvVars"]:
            assert name.startswith("AIRFLOW_CONN_")

    def test_variables_are_ones_that_somebody_reads(self):
        read = "".join(file.read_text() for file in sorted((REPOSITORY / "dags").glob("*.py")))
        variables = [one["name"] for one in VALUES["env"] if one["name"].startswith("AIRFLOW_VAR_")]
        assert variables
        for name in variables:
            assert f"var.value.{name.removeprefix('AIRFLOW_VAR_').lower()}" in read

    def test_no_telemetry(self):
        compose = yaml.safe_load((REPOSITORY / "docker-compose.yaml").read_text())["services"]
        theirs = compose["airflow-scheduler"]["environment"]
        env = {one["name"]: one["value"] for one in VALUES["env"]}
        for name in ("MLFLOW_DISABLE_TELEMETRY", "BENTOML_DO_NOT_TRACK", "DO_NOT_TRACK"):
            assert env[name] == theirs[name]

    def test_probes_are_commands_of_airflow(self):
        from airflow.cli import cli_parser

        parser = cli_parser.get_parser()
        commands = [
            one["command"] for name, one in walk(VALUES) if name.endswith("Probe") and "command" in one
        ]
        assert len(commands) == 4
        for command in commands:
            assert command[0] == "airflow"
            parsed = parser.parse_args(command[1:])
            assert parsed.local
            assert parsed.job_type in {"SchedulerJob", "TriggererJob", "DagProcessorJob"}

    def test_the_manager_of_users_reads_what_the_secret_holds(self, secrets, tmp_path, monkeypatch):
        from airflow._shared.module_loading import import_string

        core = VALUES["config"]["core"]
        file = tmp_path / "passwords.json"
        file.write_text(secrets["airflow-users"]["passwords.json"])
        monkeypatch.setenv("AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS", core["simple_auth_manager_users"])
        monkeypatch.setenv("AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE", str(file))
        manager = import_string(core["auth_manager"])
        before = file.read_text()
        manager().init()
        assert file.read_text() == before, "no user without a password of the secret"
        assert manager.get_passwords() == json.loads(before)
        assert {user.username for user in manager.get_users()} == set(json.loads(before))

    def test_the_charts_own_schema_takes_them(self):
        """Not part of this repository: ``helm pull apache-airflow/airflow --untar`` has it."""
        file = os.environ.get("AIRFLOW_CHART_SCHEMA")
        if not file:
            pytest.skip("set AIRFLOW_CHART_SCHEMA to the chart's values.schema.json")
        import jsonschema

        jsonschema.validate(VALUES, json.loads(Path(file).read_text()))


AIRFLOW = (NAMESPACE, {"tier": "airflow", "component": "scheduler"})
STEP = (STEPS, {"kubernetes_pod_operator": "True"})
POSTGRES, MLFLOW = (
    (NAMESPACE, WORKLOADS[name]["spec"]["template"]["metadata"]["labels"])
    for name in ("StatefulSet/postgres", "Deployment/mlflow")
)
OUTSIDE = None  # no pod of the cluster

Peer = tuple[str, dict[str, str]] | None


class TestNetwork:
    @pytest.mark.parametrize("namespace", NAMESPACES)
    def test_nothing_is_open_that_is_not_said(self, namespace):
        stranger = (namespace, {"run": "stranger"})
        dns = (DNS, {"k8s-app": "kube-dns"})
        assert allowed(stranger, dns, 53, "UDP")
        for other in (AIRFLOW, POSTGRES, MLFLOW, STEP, stranger, OUTSIDE):
            for port in (53, 443, 5000, 5432, 8080):
                assert not allowed(stranger, other, port)

    def test_every_pod_may_do_its_work(self):
        model = (MODELS, endpoint_of("m").selector)
        for source, target, port in (
            (AIRFLOW, POSTGRES, 5432),
            (AIRFLOW, MLFLOW, 5000),
            (AIRFLOW, AIRFLOW, 8080),
            (AIRFLOW, model, PORT),
            (AIRFLOW, OUTSIDE, 6443),
            (MLFLOW, POSTGRES, 5432),
            (STEP, MLFLOW, 5000),
            (STEP, POSTGRES, 5432),
            (STEP, model, PORT),
            (STEP, OUTSIDE, 443),
            (model, OUTSIDE, 443),
            (("ingress-nginx", {}), AIRFLOW, 8080),
            (("monitoring", {}), model, PORT),
        ):
            assert allowed(source, target, port), f"{source} to {target} at {port}"

    def test_and_nothing_else(self):
        model = (MODELS, endpoint_of("m").selector)
        for source, target, port in (
            (model, POSTGRES, 5432),
            (model, MLFLOW, 5000),
            (model, AIRFLOW, 8080),
            (model, OUTSIDE, 9000),
            (STEP, AIRFLOW, 8080),
            (STEP, STEP, 443),
            (STEP, OUTSIDE, 9000),
            (MLFLOW, OUTSIDE, 443),
            (POSTGRES, OUTSIDE, 443),
            # Labels are anybody's to give: they count in the namespace they are meant for.
            ((MODELS, STEP[1]), MLFLOW, 5000),
            ((NAMESPACE, STEP[1]), POSTGRES, 5432),
            ((STEPS, AIRFLOW[1]), POSTGRES, 5432),
            (("default", AIRFLOW[1]), MLFLOW, 5000),
        ):
            assert not allowed(source, target, port), f"{source} to {target} at {port}"

    def test_what_is_in_comments_opens_what_it_is_for(self):
        policies = open_policies()
        assert len(policies) == len(POLICIES)
        for policy in policies:
            kubernetes_validate.validate(copy.deepcopy(policy), SCHEMAS, strict=True)
        model = (MODELS, endpoint_of("m").selector)
        arguments = (FOLDER / "mlflow.yaml").read_text()
        assert "s3://" in arguments, "what MLflow's rule is for"
        assert allowed(MLFLOW, OUTSIDE, 443, policies=policies)
        assert allowed(MLFLOW, OUTSIDE, 5432, policies=policies)
        assert allowed(model, OUTSIDE, 9000, policies=policies)
        assert allowed(STEP, OUTSIDE, 9000, policies=policies)
        assert allowed(STEP, OUTSIDE, 5432, policies=policies)
        assert not allowed(model, POSTGRES, 5432, policies=policies)
        assert "network-policies.yaml" in PAGE.read_text().partition("**2.")[2].partition("**3.")[0]

    def test_steps_in_pods_carry_the_label(self):
        from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator

        instance = SimpleNamespace(dag_id="d", task_id="t", map_index=-1, try_number=1)
        context = {"ti": instance, "run_id": "r", "dag": None}
        labels = KubernetesPodOperator._get_ti_pod_labels(context)
        selector = OBJECTS[f"{STEPS}/NetworkPolicy/steps"]["spec"]["podSelector"]["matchLabels"]
        assert selector.items() <= labels.items()

    def test_monitoring_finds_models(self):
        monitor = yaml.safe_load((DEPLOY / "prometheus" / "pod-monitor.yaml").read_text())
        endpoint = endpoint_of("m")
        assert monitor["spec"]["selector"]["matchLabels"].items() <= endpoint.selector.items()
        assert monitor["spec"]["jobLabel"] in endpoint.selector
        assert monitor["spec"]["namespaceSelector"] == {"matchNames": [endpoint.namespace]}
        (asked,) = monitor["spec"]["podMetricsEndpoints"]
        (container,) = endpoint.template()["spec"]["containers"]
        assert asked["port"] in {port["name"] for port in container["ports"]}


def test_the_page_on_deploying_has_the_rule_of_names():
    page = DEPLOYING.read_text()
    assert f"`taxi-fare` is `{object_name('taxi-fare')}`" in page
    assert f"`trip_fare` is `{object_name('trip_fare')}`" in page
    examples = doctest.DocTestParser().get_doctest(
        page.replace("```", ""), {}, DEPLOYING.name, str(DEPLOYING), 0
    )
    assert len(examples.examples) == 2
    assert doctest.DocTestRunner().run(examples).failed == 0
    assert "model-NAME." not in page
    assert f'namespace="{MODELS}"' in page
    assert "openssl rand" in page


def test_the_page_names_every_file_that_somebody_runs():
    page = PAGE.read_text()
    for named in (
        "secrets.sh",
        "airflow-values.yaml",
        "kubectl apply -k deploy/kubernetes",
        "pod-monitor.yaml",
    ):
        assert named in page
    (version,) = set(re.findall(r"--version ([\d.]+)", page + (FOLDER / "airflow-values.yaml").read_text()))
    assert version


POLICIES = [one for one in OBJECTS.values() if one["kind"] == "NetworkPolicy"]


def open_policies() -> list[Manifest]:
    """The network policies with their rules in comments, which have no space before the dash."""
    text = (FOLDER / "network-policies.yaml").read_text()
    opened, count = re.subn(r"^( +)#(- |  )", r"\1\2", text, flags=re.MULTILINE)
    assert count
    return list(yaml.safe_load_all(opened))


def allowed(
    source: Peer, target: Peer, port: int, protocol: str = "TCP", *, policies: list[Manifest] = POLICIES
) -> bool:
    """Tell whether network policies let a pod reach another: both ends have to be let.

    :param source: namespace and labels of a pod, or nothing: an address outside.
    :param policies: of all namespaces.
    """

    def let(end: Peer, other: Peer, kind: str, peers: str) -> bool:
        if end is None:
            return True
        found = [
            one["spec"]
            for one in policies
            if one["metadata"]["namespace"] == end[0]
            and kind in one["spec"]["policyTypes"]
            and selects(one["spec"]["podSelector"], end[1])
        ]
        rules = [rule for spec in found for rule in spec.get(kind.lower(), ())]
        wanted = {"protocol": protocol, "port": port}
        return not found or any(
            ("ports" not in rule or wanted in rule["ports"])
            and (peers not in rule or any(fits(peer, end, other) for peer in rule[peers]))
            for rule in rules
        )

    def fits(peer: Manifest, end: tuple[str, dict[str, str]], other: Peer) -> bool:
        if other is None or "ipBlock" in peer:
            return other is None and "ipBlock" in peer
        where = peer.get("namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": end[0]}})
        name = {"kubernetes.io/metadata.name": other[0]}
        return selects(where, name) and selects(peer.get("podSelector", {}), other[1])

    return let(source, target, "Egress", "to") and let(target, source, "Ingress", "from")


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def endpoint_of(model: str) -> KubernetesEndpoint:
    """What deploying a model makes, in the namespace of models."""
    return KubernetesEndpoint(
        model_name=model, model_version="1", package_digest="d", image="i", namespace=MODELS
    )


def mlflow_arguments() -> list[str]:
    (container,) = POD_SPECS["Deployment/mlflow"]["containers"]
    arguments: list[str] = container["args"]
    return arguments


def restricted(pod: Manifest) -> bool:
    """What the Pod Security Standard *restricted* asks of a pod."""
    return (
        pod["runAsNonRoot"] and pod["runAsUser"] > 0 and pod["seccompProfile"] == {"type": "RuntimeDefault"}
    )


def unprivileged(container: Manifest) -> bool:
    return container["allowPrivilegeEscalation"] is False and container["capabilities"] == {"drop": ["ALL"]}


def walk(node: Any) -> Iterator[tuple[str, Any]]:
    """Every mapping below a node, with the name it has."""
    for key, value in (
        node.items() if isinstance(node, dict) else enumerate(node if isinstance(node, list) else ())
    ):
        if isinstance(value, dict | list):
            if isinstance(value, dict):
                yield str(key), value
            yield from walk(value)


def find(node: Any, wanted: str) -> list[Any]:
    return [value for name, value in walk(node) if name == wanted]
