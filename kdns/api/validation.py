"""What the objects of each kind may hold, and what their makers are warned of.

Says what is wrong with an object, or with its change, in upstream's words; the object has its
defaults by then (defaults.py). Decides here what all kinds have in common (metadata) and the
small kinds; Services and endpoints are validation_service.py's, Pods and workloads
validation_pods.py's, single fields validation_fields.py's. Which addresses and ports are free is
allocate.py's. Reference: upstream's pkg/apis/core/validation, apimachinery's pkg/api/validation.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from kdns.api import validation_fields as f
from kdns.api import validation_pods as pods
from kdns.api import validation_service as services
from kdns.api.kinds import Resource
from kdns.api.status import Cause

Obj: TypeAlias = dict[str, Any]
Causes: TypeAlias = list[Cause]

# Finalizers that need no domain before them.
STANDARD_FINALIZERS: Final = frozenset({"kubernetes", "orphan", "foregroundDeletion"})
MAX_DATA = 1024 * 1024
FROZEN = "field is immutable when `immutable` is set"
TAINT_EFFECTS: Final = ("NoSchedule", "PreferNoSchedule", "NoExecute")


def validate(resource: Resource, new: Obj, old: Obj | None) -> list[Cause]:
    """Return what is wrong with an object, or with its change; `old` None: it is new."""
    first = _FIRST.get(resource.kind)
    if first is not None:
        problems = first(new)
        if problems:
            return problems
    out = _metadata(resource, new, old)
    check = _KINDS.get(resource.kind)
    if check is not None:
        out += check(new, old)
    return out


def warnings_about(resource: Resource, new: Obj, old: Obj | None) -> list[str]:
    """Return what the maker of an object, or of its change, is to be told."""
    warn = _WARNINGS.get(resource.kind)
    return list(warn(new, old)) if warn is not None else []


# --- metadata -----------------------------------------------------------------------------------


def _metadata(resource: Resource, new: Obj, old: Obj | None) -> Causes:
    meta: Mapping[str, Any] = new["metadata"]
    before: Mapping[str, Any] = old["metadata"] if old is not None else {}
    out = _name(resource, meta) if old is None else []
    if old is not None and before.get("deletionTimestamp"):
        out += _late_finalizers(meta, before)
    # What is as it was has been looked at.
    for key, check in _META.items():
        value = meta.get(key)
        if value and value != before.get(key):
            out += check(f"metadata.{key}", value)
    return out


def _name(resource: Resource, meta: Mapping[str, Any]) -> Causes:
    check = _NAMES.get(resource.kind, f.subdomain)
    out: Causes = []
    base, name = meta.get("generateName"), meta.get("name") or ""
    if base:
        out += f.each("metadata.generateName", base, check(f.masked(base)))
    if not name:
        out.append(f.required("metadata.name", "name or generateName is required"))
    else:
        out += f.each("metadata.name", name, check(name))
    if resource.namespaced:
        namespace = meta.get("namespace") or ""
        out += (
            f.each("metadata.namespace", namespace, f.dns_label(namespace))
            if namespace
            else [f.required("metadata.namespace")]
        )
    elif meta.get("namespace"):
        out.append(f.forbidden("metadata.namespace", "not allowed on this type"))
    return out


# KEP-5311: on by default since 1.36, Services are named as everything else is.
_NAMES: Final[Mapping[str, Callable[[str], Sequence[str]]]] = {
    "Service": f.dns_label,
    "Namespace": f.dns_label,
    "StatefulSet": f.dns_label,
}


def _finalizers(at: str, value: Sequence[str]) -> Causes:
    out: Causes = []
    for text in value:
        out += f.each(at, text, f.qualified_name(text))
    if {"orphan", "foregroundDeletion"} <= set(value):
        why = "finalizer orphan and foregroundDeletion cannot be both set"
        out.append(f.invalid(at, list(value), why))
    for i, text in enumerate(value):
        out += _standard(f"{at}[{i}]", text)
    return out


def _standard(at: str, text: str) -> Causes:
    if "/" in text or text in STANDARD_FINALIZERS:
        return []
    return [
        f.invalid(at, text, "name is neither a standard finalizer name nor is it fully qualified")
    ]


def _late_finalizers(meta: Mapping[str, Any], before: Mapping[str, Any]) -> Causes:
    late = sorted(set(meta.get("finalizers") or ()).difference(before.get("finalizers") or ()))
    if not late:
        return []
    listed = ", ".join(f.quoted(text) for text in late)
    text = (
        "no new finalizers can be added if the object is being deleted, found new finalizers"
        f" []string{{{listed}}}"
    )
    return [f.forbidden("metadata.finalizers", text)]


def _owners(at: str, value: Sequence[Mapping[str, Any]]) -> Causes:
    out: Causes = []
    controller = ""
    for i, one in enumerate(value):
        version, kind = one.get("apiVersion") or "", one.get("kind") or ""
        if not version:
            out.append(f.required(f"{at}[{i}].apiVersion", "must not be empty"))
        elif version.count("/") > 1 or version.endswith("/"):
            text = "must be <group>/<version> or <version>"
            out.append(f.invalid(f"{at}[{i}].apiVersion", version, text))
        out += [
            f.required(f"{at}[{i}].{key}", "must not be empty")
            for key in ("kind", "name", "uid")
            if not one.get(key)
        ]
        if (version, kind) == ("v1", "Event"):
            text = "/v1, Kind=Event is disallowed from being an owner"
            out.append(f.invalid(f"{at}[{i}]", one, text))
        if one.get("controller"):
            name = f"{kind}/{one.get('name') or ''}"
            if controller:
                text = (
                    'Only one reference can have Controller set to true. Found "true" in'
                    f" references for {controller} and {name}"
                )
                out.append(f.invalid(at, list(value), text))
            controller = controller or name
    return out


_META: Final[Mapping[str, Callable[[str, Any], Causes]]] = {
    "labels": f.label_map,
    "annotations": f.annotation_map,
    "ownerReferences": _owners,
    "finalizers": _finalizers,
}


# --- small kinds --------------------------------------------------------------------------------


def _namespace(new: Obj, old: Obj | None) -> Causes:
    out: Causes = []
    for text in (new.get("spec") or {}).get("finalizers") or () if old is None else ():
        out += f.each("spec.finalizers", text, f.qualified_name(text))
        out += _standard("spec.finalizers", text)
    return out


def _config_map(new: Obj, old: Obj | None) -> Causes:
    out = _frozen(new, old, ("data", "binaryData"))
    data, binary = new.get("data") or {}, new.get("binaryData") or {}
    total = 0
    for key, text in data.items():
        out += f.each(f"data[{key}]", key, f.config_key(key))
        if key in binary:
            out.append(f.invalid(f"data[{key}]", key, "duplicate of key present in binaryData"))
        total += len(text or "") if (text or "").isascii() else len(text.encode())
    for key, text in binary.items():
        out += f.each(f"binaryData[{key}]", key, f.config_key(key))
        total += _decoded_size(text)
    if total > MAX_DATA:
        out.append(f.too_long("[]", MAX_DATA))  # so upstream names the whole
    return out


def _frozen(new: Obj, old: Obj | None, keys: Sequence[str]) -> Causes:
    if old is None or not old.get("immutable"):
        return []
    out = [] if new.get("immutable") else [f.forbidden("immutable", FROZEN)]
    out += [
        f.forbidden(key, FROZEN) for key in keys if (new.get(key) or {}) != (old.get(key) or {})
    ]
    return out


def _decoded_size(text: str | None) -> int:
    text = text or ""
    return len(text) * 3 // 4 - text[-2:].count("=")


def _secret(new: Obj, old: Obj | None) -> Causes:
    out: Causes = []
    if old is not None:
        out += f.immutable("type", new.get("type"), old.get("type"))
        out += _frozen(new, old, ("data",))
    data: Mapping[str, str] = new.get("data") or {}
    for key in data:
        out += f.each(f"data[{key}]", key, f.config_key(key))
    if sum(map(_decoded_size, data.values())) > MAX_DATA:
        out.append(f.too_long("data", MAX_DATA))
    return out + _secret_type(new, data)


# Which keys a Secret of a type must have.
_SECRET_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
}
_ACCOUNT = "kubernetes.io/service-account.name"


def _secret_type(new: Obj, data: Mapping[str, str]) -> Causes:
    kind = new.get("type") or ""
    missing = [key for key in _SECRET_KEYS.get(kind, ()) if key not in data]
    if kind == "kubernetes.io/ssh-auth" and not data.get("ssh-privatekey"):
        missing = ["ssh-privatekey"]
    if kind == "kubernetes.io/basic-auth" and not {"username", "password"} & set(data):
        missing = ["username", "password"]
    out = [f.required(f"data[{key}]") for key in missing]
    if kind == "kubernetes.io/service-account-token":
        if not (new["metadata"].get("annotations") or {}).get(_ACCOUNT):
            out.append(f.required(f"metadata.annotations[{_ACCOUNT}]"))
    elif kind.startswith("kubernetes.io/dockerc") and not missing:
        key = _SECRET_KEYS[kind][0]
        why = _why_not_json(data[key])
        if why:
            out.append(f.invalid(f"data[{key}]", "<secret contents redacted>", why))
    return out


def _why_not_json(text: str) -> str:
    try:
        found = json.loads(base64.b64decode(text))
    except (ValueError, binascii.Error) as e:
        return str(e)
    except RecursionError:
        return "exceeded max depth"
    return "" if isinstance(found, dict) or found is None else "cannot unmarshal into an object"


def _node(new: Obj, old: Obj | None) -> Causes:
    spec: Mapping[str, Any] = new.get("spec") or {}
    out: Causes = []
    addresses: list[tuple[object, object]] = []
    for i, one in enumerate((new.get("status") or {}).get("addresses") or ()):
        pair = one.get("type"), one.get("address")
        if pair in addresses:
            shown = {"Type": pair[0], "Address": pair[1]}
            out.append(f.duplicate(f"status.addresses[{i}]", shown))
        addresses.append(pair)
    if old is not None and spec == (old.get("spec") or {}):
        return out
    out += _taints(spec.get("taints") or ())
    out += _pod_ranges(spec)
    if old is not None:
        before: Mapping[str, Any] = old.get("spec") or {}
        for key, what in (("podCIDRs", "podCIDR"), ("providerID", "providerID")):
            if before.get(key) and spec.get(key) != before[key]:
                text = f'node updates may not change {what} except from "" to valid'
                out.append(f.forbidden(f"spec.{key}", text))
    return out


def _taints(taints: Iterable[Mapping[str, Any]]) -> Causes:
    out: Causes = []
    seen: set[tuple[str, str]] = set()
    for i, one in enumerate(taints):
        at = f"spec.taints[{i}]"
        key, value, effect = one.get("key") or "", one.get("value") or "", one.get("effect") or ""
        out += f.each(f"{at}.key", key, f.qualified_name(key))
        out += f.each(f"{at}.value", value, f.label_value(value))
        out += f.one_of(f"{at}.effect", effect, TAINT_EFFECTS)
        if (key, effect) in seen:
            shown = {"Key": key, "Value": value, "Effect": effect, "TimeAdded": None}
            out.append(f.duplicate(at, shown))
        seen.add((key, effect))
    return out


def _pod_ranges(spec: Mapping[str, Any]) -> Causes:
    ranges = spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else [])
    out: Causes = []
    for i, text in enumerate(ranges):
        out += f.each(f"spec.podCIDRs[{i}]", text, f.cidr(text))
    if spec.get("podCIDR") and ranges[0] != spec["podCIDR"]:
        text = "first value must match `podCIDR`"
        out.append(f.invalid("spec.podCIDRs[0]", ranges[0], text))
    if len(ranges) > 2 or (len(ranges) == 2 and (":" in ranges[0]) == (":" in ranges[1])):
        text = "may specify no more than one CIDR for each IP family"
        out.append(f.invalid("spec.podCIDRs", ranges, text))
    return out


def _event(new: Obj, old: Obj | None) -> Causes:
    namespace = new["metadata"].get("namespace") or ""
    about = (new.get("involvedObject") or {}).get("namespace") or ""
    if namespace == about or (not about and namespace == "default"):
        return []
    return [f.invalid("involvedObject.namespace", about, "does not match event.namespace")]


def _lease(new: Obj, old: Obj | None) -> Causes:
    spec: Mapping[str, Any] = new.get("spec") or {}
    out: Causes = []
    seconds = spec.get("leaseDurationSeconds")
    if seconds is not None and seconds <= 0:
        out.append(f.invalid("spec.leaseDurationSeconds", seconds, "must be greater than 0"))
    turns = spec.get("leaseTransitions")
    if turns is not None and turns < 0:
        text = "must be greater than or equal to 0"
        out.append(f.invalid("spec.leaseTransitions", turns, text))
    if spec.get("preferredHolder") and not spec.get("strategy"):
        text = "may only be specified when `strategy` is defined"
        out.append(f.forbidden("spec.preferredHolder", text))
    return out


def _service_cidr(new: Obj, old: Obj | None) -> Causes:
    cidrs = (new.get("spec") or {}).get("cidrs") or []
    if old is not None:
        return _kept_cidrs(cidrs, (old.get("spec") or {}).get("cidrs") or [])
    if not cidrs:
        return [f.required("spec.cidrs", "at least one CIDR required")]
    if len(cidrs) > 2:
        return [f.invalid("spec.cidrs", cidrs, "may only hold up to 2 values")]
    out: Causes = []
    for i, text in enumerate(cidrs):
        out += f.each(f"spec.cidrs[{i}]", text, f.cidr(text))
    if not out and len(cidrs) == 2 and (":" in cidrs[0]) == (":" in cidrs[1]):
        text = "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and"
        out.append(f.invalid("spec.cidrs", cidrs, f"{text} 2001:db8::/64"))
    return out


def _kept_cidrs(new: list[str], old: list[str]) -> Causes:
    """Allow no change but a second range, of the other family."""
    out: Causes = []
    for i, text in enumerate(old):
        now = new[i] if i < len(new) else ""
        if now != text:
            out.append(f.invalid(f"spec.cidrs[{i}]", now, f.IMMUTABLE))
    if out or len(new) == len(old):
        return out
    return _service_cidr({"spec": {"cidrs": new}}, None)


# --- warnings that belong to names --------------------------------------------------------------


def _name_warning(what: str) -> Callable[[Obj, Obj | None], Iterable[str]]:
    def warn(new: Obj, old: Obj | None) -> Iterable[str]:
        problems = f.dns_label(new["metadata"].get("name") or "") if old is None else ()
        if problems:
            yield (
                f"metadata.name: this is used in {what}, which can result in surprising behavior;"
                f" a DNS label is recommended: [{' '.join(problems)}]"
            )

    return warn


_FIRST: Final[Mapping[str, Callable[[Obj], Causes]]] = {"Service": services.service_addresses}

_KINDS: Final[Mapping[str, Callable[[Obj, Obj | None], Causes]]] = {
    "Namespace": _namespace,
    "Service": services.service,
    "Endpoints": services.endpoints,
    "EndpointSlice": services.endpoint_slice,
    "Pod": pods.pod,
    "Node": _node,
    "Event": _event,
    "ConfigMap": _config_map,
    "Secret": _secret,
    "Lease": _lease,
    "ServiceCIDR": _service_cidr,
    "Deployment": pods.deployment,
    "ReplicaSet": pods.replica_set,
    "StatefulSet": pods.stateful_set,
}

_WARNINGS: Final[Mapping[str, Callable[[Obj, Obj | None], Iterable[str]]]] = {
    "Service": services.service_warnings,
    "Endpoints": services.endpoints_warnings,
    "EndpointSlice": services.slice_warnings,
    "Pod": _name_warning("the Pod's hostname"),
    "Deployment": _name_warning("Pod names and hostnames"),
    "ReplicaSet": _name_warning("Pod names and hostnames"),
}
