"""What the fake API server keeps: objects under optimistic rules, who may do what, and what was asked."""

from __future__ import annotations

import base64
import copy
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import kubernetes_validate

Object = dict[str, Any]
Key = tuple[str, str, str]  # resource, namespace, name

#: Release of Kubernetes whose schemas every object has to fit, unknown fields refused.
SCHEMAS = "1.34"

RBAC = "rbac.authorization.k8s.io"

#: API group and resource to the kind and version of its objects.
KINDS = {
    ("", "pods"): ("Pod", "v1"),
    ("", "secrets"): ("Secret", "v1"),
    ("", "events"): ("Event", "v1"),
    ("", "services"): ("Service", "v1"),
    ("apps", "deployments"): ("Deployment", "apps/v1"),
    ("apps", "replicasets"): ("ReplicaSet", "apps/v1"),
    ("autoscaling", "horizontalpodautoscalers"): ("HorizontalPodAutoscaler", "autoscaling/v2"),
    ("policy", "poddisruptionbudgets"): ("PodDisruptionBudget", "policy/v1"),
    (RBAC, "roles"): ("Role", f"{RBAC}/v1"),
    (RBAC, "rolebindings"): ("RoleBinding", f"{RBAC}/v1"),
}


class ApiError(Exception):
    """A refusal in the API server's own words."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message

    def body(self) -> Object:
        kind = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        return kind | {"message": self.message, "reason": self.reason, "code": self.status}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class Store:
    """Every object, every change of one, and every request that was allowed or refused."""

    namespaces: set[str]
    objects: dict[Key, Object] = field(default_factory=dict)
    changes: list[tuple[int, str, str, Object]] = field(default_factory=list)
    #: What admission says to a pod, instead of letting it in: a quota, a policy.
    refusal: str | None = None
    #: Everything that was ever created, as it was sent.
    sent: list[Object] = field(default_factory=list)
    #: What every manager applied last, by which its next apply knows what it leaves out.
    applied: dict[Key, dict[str, Object]] = field(default_factory=dict)
    #: (user, verb, resource) of all requests.
    audit: set[tuple[str, str, str]] = field(default_factory=set)

    def get(self, resource: str, namespace: str, name: str) -> Object:
        try:
            return self.objects[resource, namespace, name]
        except KeyError:
            raise ApiError(404, "NotFound", f'{resource} "{name}" not found') from None

    def create(self, group: str, resource: str, namespace: str, sent: Object) -> Object:
        if namespace not in self.namespaces:
            raise ApiError(404, "NotFound", f'namespaces "{namespace}" not found')
        kind, version = KINDS[group, resource]
        made = copy.deepcopy(sent) | {"kind": kind, "apiVersion": version}
        check(made)
        meta = made["metadata"]
        name = meta.setdefault("name", meta.get("generateName", "") + uuid.uuid4().hex[:5])
        if (resource, namespace, name) in self.objects:
            raise ApiError(409, "AlreadyExists", f'{resource} "{name}" already exists')
        if kind == "Pod" and self.refusal:
            raise ApiError(403, "Forbidden", f'pods "{name}" is forbidden: {self.refusal}')
        self.sent.append(copy.deepcopy(made))
        for key, text in made.pop("stringData", {}).items():
            made.setdefault("data", {})[key] = base64.b64encode(text.encode()).decode()
        meta.update(namespace=namespace, uid=str(uuid.uuid4()), creationTimestamp=now(), generation=1)
        self.objects[resource, namespace, name] = made
        self.changed("ADDED", resource, made)
        return made

    def patch(self, resource: str, namespace: str, name: str, patch: Object) -> Object:
        found = self.get(resource, namespace, name)
        check(merged(found, patch))
        found.update(merged(found, patch))
        self.changed("MODIFIED", resource, found)
        return found

    def apply(
        self, group: str, resource: str, namespace: str, name: str, wanted: Object, manager: str
    ) -> Object:
        """Server-side apply: what a manager no longer asks for goes, unless another one does; what others wrote stays."""
        key, found = (resource, namespace, name), self.objects.get((resource, namespace, name))
        version = wanted["metadata"].pop("resourceVersion", None)
        if version is not None and (found is None or found["metadata"]["resourceVersion"] != version):
            raise ApiError(409, "Conflict", f'{resource} "{name}": the object has been modified')
        managers = self.applied.setdefault(key, {})
        if found is None:
            managers.clear()
            found = self.create(group, resource, namespace, wanted)
        else:
            others = [one for name, one in managers.items() if name != manager]
            made = applied(found, managers.get(manager, {}), wanted, others)
            check(made)
            if made["spec"] != found["spec"]:
                made["metadata"]["generation"] += 1
            if made != found:
                found.update(made)
                self.changed("MODIFIED", resource, found)
        managers[manager] = copy.deepcopy(wanted)
        found["metadata"]["managedFields"] = [
            {"manager": name, "operation": "Apply", "fieldsType": "FieldsV1", "fieldsV1": fields_of(one)}
            for name, one in managers.items()
        ]
        return found

    def scale(self, resource: str, found: Object, replicas: int) -> None:
        """Change a number of replicas as an autoscaler does: whoever applied it has no say in it any more."""
        found["spec"]["replicas"] = replicas
        found["metadata"]["generation"] += 1
        key = resource, found["metadata"]["namespace"], found["metadata"]["name"]
        for one in self.applied.get(key, {}).values():
            one["spec"].pop("replicas", None)
        self.changed("MODIFIED", resource, found)

    def remove(self, resource: str, namespace: str, name: str) -> None:
        """Take an object away, and with it what it owns, as the garbage collector does."""
        gone = self.objects.pop((resource, namespace, name))
        self.changed("DELETED", resource, gone)
        for key, other in list(self.objects.items()):
            owners = {owner["uid"] for owner in other["metadata"].get("ownerReferences", [])}
            if owners and owners <= {gone["metadata"]["uid"]}:
                self.remove(*key)

    def changed(self, how: str, resource: str, what: Object) -> None:
        version = len(self.changes) + 1
        what["metadata"]["resourceVersion"] = str(version)
        self.changes.append((version, how, resource, copy.deepcopy(what)))

    def matching(self, resource: str, namespace: str, labels: str, fields: str) -> Iterator[Object]:
        for (kind, where, _), found in self.objects.items():
            if (kind, where) == (resource, namespace) and fits(found, labels, fields):
                yield found

    def authorize(self, user: str, verb: str, group: str, resource: str, namespace: str) -> None:
        self.audit.add((user, verb, resource))
        if not self.allowed(user, verb, group, resource, namespace):
            raise ApiError(
                403,
                "Forbidden",
                f'{resource} is forbidden: User "{user}" cannot {verb} resource "{resource}" in API group '
                f'"{group}" in the namespace "{namespace}"',
            )

    def allowed(self, user: str, verb: str, group: str, resource: str, namespace: str) -> bool:
        if user == "admin":
            return True
        for binding in self.matching("rolebindings", namespace, "", ""):
            subjects = {
                f"system:serviceaccount:{item.get('namespace', namespace)}:{item['name']}"
                for item in binding["subjects"]
            }
            role = self.objects.get(("roles", namespace, binding["roleRef"]["name"]), {})
            for rule in role.get("rules", []) if user in subjects else []:
                if group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]:
                    return True
        return False


def check(made: Object) -> None:
    """Refuse what a real API server would: unknown fields, wrong types, impossible names and labels."""
    meta = made.get("metadata", {})
    try:
        kubernetes_validate.validate(made, SCHEMAS, strict=True)
    except kubernetes_validate.ValidationError as err:
        raise ApiError(422, "Invalid", f"{made['kind']} is invalid: {err.message[:300]}") from err
    name = meta.get("name", meta.get("generateName", "") + "x")
    if len(name) > 253 or not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", name):
        raise ApiError(
            422, "Invalid", f'metadata.name: Invalid value: "{name}": a lowercase RFC 1123 subdomain'
        )
    for label, value in (meta.get("labels") or {}).items():
        if len(value) > 63 or not re.fullmatch(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?", value):
            raise ApiError(422, "Invalid", f'metadata.labels: Invalid value: "{value}" of {label}')
    for container in made["spec"]["containers"] if made["kind"] == "Pod" else []:
        for sizes in container.get("resources", {}).values():
            for what, size in sizes.items():
                if not re.fullmatch(r"[0-9.]+(m|[kKMGTPE]i?)?", size):
                    raise ApiError(422, "Invalid", f'resources[{what}]: Invalid value: "{size}": no quantity')


def merged(old: Any, patch: Any) -> Any:
    """A JSON merge patch (RFC 7386); the labels that are patched here need no more."""
    if not isinstance(patch, dict):
        return patch
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def fields_of(wanted: Any) -> Object:
    """The names of all fields, as ``managedFields`` has them; lists are taken whole."""
    return {f"f:{key}": fields_of(value) for key, value in wanted.items()} if isinstance(wanted, dict) else {}


def applied(live: Any, last: Any, wanted: Any, others: list[Any]) -> Any:
    """What is live, without what was applied last and nobody wants any more, and with what is wanted; lists are taken whole."""
    if not isinstance(wanted, dict):
        return copy.deepcopy(wanted)
    live, last = (one if isinstance(one, dict) else {} for one in (live, last))
    others = [one for one in others if isinstance(one, dict)]
    result = {
        key: value
        for key, value in live.items()
        if key in wanted or key not in last or any(key in one for one in others)
    }
    for key, value in wanted.items():
        theirs = [one.get(key) for one in others]
        result[key] = applied(live.get(key), last.get(key), value, theirs)
    return result


def fits(found: Object, labels: str, fields: str) -> bool:
    """Whether an object is chosen by a label selector and a field selector."""
    has = found["metadata"].get("labels") or {}
    for part in filter(None, labels.split(",")):
        if part.startswith("!"):
            fitting = part[1:] not in has
        elif "!=" in part:
            key, value = part.split("!=")
            fitting = has.get(key) != value
        else:
            key, value = re.split("==?", part)
            fitting = has.get(key) == value
        if not fitting:
            return False
    for part in filter(None, fields.split(",")):
        path, wanted = re.split("==?", part)
        value: Any = found
        for step in path.split("."):
            value = (value or {}).get(step)
        if value != wanted:
            return False
    return True
