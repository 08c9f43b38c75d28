"""What Pods, and the workloads that make Pods, may hold, in upstream's words.

No Pod runs here: what only a node would mind (devices, Windows, seccomp) is not looked at.
Reference: upstream's ValidatePodSpec, ValidatePodUpdate, pkg/apis/apps/validation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from kdns.api import validation_fields as f
from kdns.api.quantity import parse_quantity
from kdns.api.status import Cause

Obj: TypeAlias = dict[str, Any]
Part: TypeAlias = Mapping[str, Any]
Causes: TypeAlias = list[Cause]

RESTART: Final = ("Always", "Never", "OnFailure")
DNS: Final = ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None")
PULL: Final = ("Always", "IfNotPresent", "Never")
MESSAGES: Final = ("FallbackToLogsOnError", "File")
EFFECTS: Final = ("NoSchedule", "PreferNoSchedule", "NoExecute")
MOST_SECONDS = 2**31 - 1
MAX_NAMESERVERS, MAX_SEARCHES, MAX_SEARCH_TEXT = 3, 32, 2048
SOURCES: Final = ("configMapKeyRef", "fieldRef", "fileKeyRef", "resourceFieldRef", "secretKeyRef")
UPDATABLE: Final = (
    "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,"
    "`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)
# Of a StatefulSet these may change, as its message says.
STATEFUL_UPDATABLE: Final = (
    "replicas", "ordinals", "template", "updateStrategy", "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy", "minReadySeconds",
)  # fmt: skip
LONGEST_DIFF = 20


# --- Pods -----------------------------------------------------------------------------------------


def pod(new: Obj, old: Obj | None) -> Causes:
    """Check a Pod without its metadata."""
    spec: Part = new.get("spec") or {}
    if old is not None:
        return _pod_change(spec, old.get("spec") or {})
    out = pod_spec("spec", spec)
    if spec.get("ephemeralContainers"):
        out.append(f.forbidden("spec.ephemeralContainers", "cannot be set on create"))
    return out


def pod_spec(at: str, spec: Part, volumes_from_elsewhere: Sequence[str] = ()) -> Causes:
    """Check the spec of a Pod or of a template."""
    names: set[str] = set(volumes_from_elsewhere)
    out = _volumes(f"{at}.volumes", spec.get("volumes") or (), names)
    out += _containers(at, spec, names)
    out += f.one_of(f"{at}.restartPolicy", spec.get("restartPolicy"), RESTART)
    out += f.one_of(f"{at}.dnsPolicy", spec.get("dnsPolicy"), DNS)
    out += f.label_map(f"{at}.nodeSelector", spec.get("nodeSelector"))
    out += _dns_config(f"{at}.dnsConfig", spec)
    for i, gate in enumerate(spec.get("readinessGates") or ()):
        name = gate.get("conditionType") or ""
        out += f.each(f"{at}.readinessGates[{i}].conditionType", name, f.qualified_name(name))
    for key, check in _NAMES.items():
        if spec.get(key):
            out += f.each(f"{at}.{key}", spec[key], check(spec[key]))
    seconds = spec.get("activeDeadlineSeconds")
    if seconds is not None and not 1 <= seconds <= MOST_SECONDS:
        text = f"must be between 1 and {MOST_SECONDS}, inclusive"
        out.append(f.invalid(f"{at}.activeDeadlineSeconds", seconds, text))
    seconds = spec.get("terminationGracePeriodSeconds")
    out += f.not_negative(f"{at}.terminationGracePeriodSeconds", seconds)
    out += _tolerations(f"{at}.tolerations", spec.get("tolerations") or ())
    out += _host_aliases(f"{at}.hostAliases", spec.get("hostAliases") or ())
    return out


_NAMES: Final[Mapping[str, Callable[[str], Sequence[str]]]] = {
    "serviceAccountName": f.subdomain,
    "nodeName": f.subdomain,
    "hostname": f.dns_label,
    "subdomain": f.dns_label,
    "priorityClassName": f.subdomain,
    "runtimeClassName": f.subdomain,
}


def _containers(at: str, spec: Part, volumes: set[str]) -> Causes:
    out: Causes = []
    if not spec.get("containers"):
        out.append(f.required(f"{at}.containers"))
    names: set[str] = set()
    host_ports: set[str] = set()
    for key in ("containers", "initContainers", "ephemeralContainers"):
        for i, one in enumerate(spec.get(key) or ()):
            here = f"{at}.{key}[{i}]"
            out += _container(here, one, volumes)
            name = one.get("name") or ""
            if name and name in names:
                out.append(f.duplicate(f"{here}.name", name))
            names.add(name)
            if key == "containers":
                out += _host_ports(here, one, host_ports)
            if (
                one.get("restartPolicy")
                and key == "containers"
                and one["restartPolicy"] not in RESTART
            ):
                out.append(f.unsupported(f"{here}.restartPolicy", one["restartPolicy"], RESTART))
    return out


def _container(at: str, one: Part, volumes: set[str]) -> Causes:
    out: Causes = []
    name, image = one.get("name") or "", one.get("image") or ""
    out += f.each(f"{at}.name", name, f.dns_label(name)) if name else [f.required(f"{at}.name")]
    if not image:
        out.append(f.required(f"{at}.image"))
    elif image != image.strip():
        text = "must not have leading or trailing whitespace"
        out.append(f.invalid(f"{at}.image", image, text))
    out += f.one_of(f"{at}.terminationMessagePolicy", one.get("terminationMessagePolicy"), MESSAGES)
    out += f.one_of(f"{at}.imagePullPolicy", one.get("imagePullPolicy"), PULL)
    if one.get("ports"):
        out += _container_ports(f"{at}.ports", one["ports"])
    for i, env in enumerate(one.get("env") or ()):
        out += _env(f"{at}.env[{i}]", env)
    for i, env in enumerate(one.get("envFrom") or ()):
        out += _env_from(f"{at}.envFrom[{i}]", env)
    out += _mounts(f"{at}.volumeMounts", one.get("volumeMounts") or (), volumes)
    if one.get("resources"):
        out += _resources(f"{at}.resources", one["resources"])
    for key in ("livenessProbe", "readinessProbe", "startupProbe"):
        if one.get(key) is not None:
            out += _probe(f"{at}.{key}", one[key], single=key != "readinessProbe")
    for key in ("postStart", "preStop"):
        hook = (one.get("lifecycle") or {}).get(key)
        if hook is not None:
            out += _handler(
                f"{at}.lifecycle.{key}", hook, ("exec", "httpGet", "tcpSocket", "sleep")
            )
    return out


def _container_ports(at: str, ports: Sequence[Part]) -> Causes:
    out: Causes = []
    names: set[str] = set()
    for i, port in enumerate(ports):
        name, number, host = port.get("name"), port.get("containerPort") or 0, port.get("hostPort")
        if name:
            problems = f.port_name(name)
            out += f.each(f"{at}[{i}].name", name, problems)
            if not problems and name in names:
                out.append(f.duplicate(f"{at}[{i}].name", name))
            names.add(name)
        if not number:
            out.append(f.required(f"{at}[{i}].containerPort"))
        else:
            out += f.each(f"{at}[{i}].containerPort", number, f.port_number(number))
        if host:
            out += f.each(f"{at}[{i}].hostPort", host, f.port_number(host))
        out += f.one_of(f"{at}[{i}].protocol", port.get("protocol"), f.PROTOCOLS)
        if port.get("hostIP"):
            out += f.each(f"{at}[{i}].hostIP", port["hostIP"], f.address(port["hostIP"]))
    return out


def _host_ports(at: str, container: Part, seen: set[str]) -> Causes:
    out: Causes = []
    for i, port in enumerate(container.get("ports") or ()):
        if not port.get("hostPort"):
            continue
        key = f"{port.get('protocol')}/{port.get('hostIP') or ''}/{port['hostPort']}"
        if key in seen:
            out.append(f.duplicate(f"{at}.ports[{i}].hostPort", key))
        seen.add(key)
    return out


def _env(at: str, env: Part) -> Causes:
    name = env.get("name") or ""
    out = f.each(f"{at}.name", name, f.env_name(name)) if name else [f.required(f"{at}.name")]
    source = env.get("valueFrom")
    if source is None:
        return out
    held = [key for key in SOURCES if source.get(key) is not None]
    at = f"{at}.valueFrom"
    if not held:
        text = (
            "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or"
            " `secretKeyRef`"
        )
        out.append(f.invalid(at, "", text))
    elif env.get("value"):
        out.append(f.invalid(at, "", "may not be specified when `value` is not empty"))
    elif len(held) > 1:
        out.append(f.invalid(at, "", "may not have more than one field specified at a time"))
    for key in ("configMapKeyRef", "secretKeyRef"):
        ref = source.get(key)
        if ref is not None:
            wanted = ref.get("key") or ""
            out += (
                f.each(f"{at}.{key}.key", wanted, f.config_key(wanted))
                if wanted
                else [f.required(f"{at}.{key}.key")]
            )
    field = source.get("fieldRef")
    if field is not None and not field.get("fieldPath"):
        out.append(f.required(f"{at}.fieldRef.fieldPath"))
    return out


def _env_from(at: str, env: Part) -> Causes:
    held = [key for key in ("configMapRef", "secretRef") if env.get(key) is not None]
    if not held:
        return [f.invalid(at, "", "must specify one of: `configMapRef` or `secretRef`")]
    if len(held) > 1:
        return [f.invalid(at, "", "may not have more than one field specified at a time")]
    name = env[held[0]].get("name") or ""
    return (
        f.each(f"{at}.{held[0]}.name", name, f.subdomain(name))
        if name
        else [f.required(f"{at}.{held[0]}.name")]
    )


def _mounts(at: str, mounts: Sequence[Part], volumes: set[str]) -> Causes:
    out: Causes = []
    paths: set[str] = set()
    for i, mount in enumerate(mounts):
        name, path = mount.get("name") or "", mount.get("mountPath") or ""
        if not name:
            out.append(f.required(f"{at}[{i}].name"))
        if name not in volumes:
            out.append(f.not_found(f"{at}[{i}].name", name))
        if not path:
            out.append(f.required(f"{at}[{i}].mountPath"))
        if path in paths:
            out.append(f.invalid(f"{at}[{i}].mountPath", path, "must be unique"))
        paths.add(path)
    return out


def _resources(at: str, resources: Part) -> Causes:
    out: Causes = []
    limits = resources.get("limits") or {}
    for key in ("limits", "requests"):
        for name, text in (resources.get(key) or {}).items():
            amount = parse_quantity(text)
            here = f"{at}.{key}[{name}]"
            out += f.each(here, name, f.qualified_name(name))
            if amount is None or amount < 0:
                out.append(f.invalid(here, text, f.NEGATIVE))
                continue
            most = parse_quantity(limits.get(name)) if key == "requests" else None
            if most is not None and amount > most:
                why = f"must be less than or equal to {name} limit of {limits[name]}"
                out.append(f.invalid(f"{at}.requests", text, why))
    return out


def _probe(at: str, probe: Part, *, single: bool) -> Causes:
    out = _handler(at, probe, ("exec", "httpGet", "tcpSocket", "grpc"))
    for key in (
        "initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold",
        "failureThreshold",
    ):  # fmt: skip
        out += f.not_negative(f"{at}.{key}", probe.get(key))
    if single and probe.get("successThreshold", 1) != 1:
        out.append(f.invalid(f"{at}.successThreshold", probe["successThreshold"], "must be 1"))
    return out


def _handler(at: str, one: Part, kinds: Sequence[str]) -> Causes:
    held = [key for key in kinds if one.get(key) is not None]
    if not held:
        return [f.required(at, "must specify a handler type")]
    out: Causes = [
        f.forbidden(f"{at}.{key}", "may not specify more than 1 handler type") for key in held[1:]
    ]
    kind = held[0]
    what = one[kind]
    if kind == "exec" and not what.get("command"):
        out.append(f.required(f"{at}.exec.command"))
    if kind in ("httpGet", "tcpSocket"):
        out += f.port_or_name(f"{at}.{kind}.port", what.get("port"))
    if kind == "grpc":
        number = what.get("port") or 0
        out += f.each(f"{at}.grpc.port", number, f.port_number(number))
    if kind == "httpGet":
        out += f.one_of(f"{at}.httpGet.scheme", what.get("scheme"), ("HTTP", "HTTPS"))
    return out


_VOLUME_NEEDS: Final = (
    ("secret", "secretName"),
    ("configMap", "name"),
    ("hostPath", "path"),
    ("persistentVolumeClaim", "claimName"),
    ("nfs", "server"),
    ("nfs", "path"),
    ("csi", "driver"),
)


def _volumes(at: str, volumes: Sequence[Part], names: set[str]) -> Causes:
    out: Causes = []
    seen: set[str] = set()
    for i, volume in enumerate(volumes):
        name = volume.get("name") or ""
        here = f"{at}[{i}]"
        if not name:
            out.append(f.required(f"{here}.name"))
        else:
            out += f.each(f"{here}.name", name, f.dns_label(name))
        if name in seen:
            out.append(f.duplicate(f"{here}.name", name))
        seen.add(name)
        sources = [key for key, value in volume.items() if key != "name" and value is not None]
        if not sources:
            out.append(f.required(here, "must specify a volume type"))
        out += [
            f.forbidden(f"{here}.{key}", "may not specify more than 1 volume type")
            for key in sources[1:]
        ]
        for key, needed in _VOLUME_NEEDS:
            if volume.get(key) is not None and not volume[key].get(needed):
                out.append(f.required(f"{here}.{key}.{needed}"))
    names |= seen
    return out


def _dns_config(at: str, spec: Part) -> Causes:
    config, policy = spec.get("dnsConfig"), spec.get("dnsPolicy")
    if policy == "None":
        if config is None:
            return [f.required(at, "must provide `dnsConfig` when `dnsPolicy` is None")]
        if not config.get("nameservers"):
            text = "must provide at least one DNS nameserver when `dnsPolicy` is None"
            return [f.required(f"{at}.nameservers", text)]
    out: Causes = []
    config = config or {}
    servers, searches = config.get("nameservers") or (), config.get("searches") or ()
    if len(servers) > MAX_NAMESERVERS:
        text = f"must not have more than {MAX_NAMESERVERS} nameservers"
        out.append(f.invalid(f"{at}.nameservers", list(servers), text))
    for i, text in enumerate(servers):
        out += f.each(f"{at}.nameservers[{i}]", text, f.address(text))
    if len(searches) > MAX_SEARCHES:
        text = f"must not have more than {MAX_SEARCHES} search paths"
        out.append(f.invalid(f"{at}.searches", list(searches), text))
    if len(" ".join(searches)) > MAX_SEARCH_TEXT:
        text = (
            f"must not have more than {MAX_SEARCH_TEXT} characters (including spaces) in the"
            " search list"
        )
        out.append(f.invalid(f"{at}.searches", list(searches), text))
    for i, text in enumerate(searches):
        if text != ".":  # underscores are allowed here since 1.34
            name = text.removesuffix(".").replace("_", "a")
            out += f.each(f"{at}.searches[{i}]", text, f.subdomain(name))
    for i, option in enumerate(config.get("options") or ()):
        if not option.get("name"):
            out.append(f.required(f"{at}.options[{i}]", "must not be empty"))
    return out


def _tolerations(at: str, tolerations: Sequence[Part]) -> Causes:
    out: Causes = []
    for i, one in enumerate(tolerations):
        here = f"{at}[{i}]"
        key, operator = one.get("key") or "", one.get("operator") or ""
        if key:
            out += f.each(f"{here}.key", key, f.qualified_name(key))
        elif operator != "Exists":
            text = (
                'operator must be Exists when `key` is empty, which means "match all values and'
                ' all keys"'
            )
            out.append(f.invalid(f"{here}.operator", operator, text))
        if one.get("tolerationSeconds") is not None and one.get("effect") != "NoExecute":
            text = "effect must be 'NoExecute' when `tolerationSeconds` is set"
            out.append(f.invalid(f"{here}.effect", one.get("effect") or "", text))
        if operator == "Exists" and one.get("value"):
            text = "value must be empty when `operator` is 'Exists'"
            out.append(f.invalid(f"{here}.operator", one["value"], text))
        elif operator not in ("", "Equal", "Exists", "Lt", "Gt"):
            out.append(f.unsupported(f"{here}.operator", operator, ("Equal", "Exists")))
        effect = one.get("effect")
        if effect and effect not in EFFECTS:
            out.append(f.unsupported(f"{here}.effect", effect, EFFECTS))
    return out


def _host_aliases(at: str, aliases: Sequence[Part]) -> Causes:
    out: Causes = []
    for i, alias in enumerate(aliases):
        ip = alias.get("ip") or ""
        out += f.each(f"{at}[{i}].ip", ip, f.address(ip))
        for j, name in enumerate(alias.get("hostnames") or ()):
            out += f.each(f"{at}[{i}].hostnames[{j}]", name, f.subdomain(name))
    return out


# --- a Pod's change -------------------------------------------------------------------------------


def _pod_change(spec: Part, before: Part) -> Causes:
    """Refuse all but the few things that may change while a Pod lives."""
    if spec == before:
        return []
    out: Causes = []
    for key, what in (("containers", "containers"), ("initContainers", "initContainers")):
        if len(spec.get(key) or ()) != len(before.get(key) or ()):
            return [f.forbidden(f"spec.{key}", f"pod updates may not add or remove {what}")]
        for i, one in enumerate(spec.get(key) or ()):
            image = one.get("image") or ""
            if not image:
                out.append(f.required(f"spec.{key}[{i}].image"))
            elif image != image.strip():
                text = "must not have leading or trailing whitespace"
                out.append(f.invalid(f"spec.{key}[{i}].image", image, text))
    out += _deadline_change(spec.get("activeDeadlineSeconds"), before.get("activeDeadlineSeconds"))
    out += _toleration_change(spec.get("tolerations") or (), before.get("tolerations") or ())
    if out:
        return out
    allowed = _fixed_part(spec, before)
    if allowed != before:
        told = "\n".join(_differences("spec", before, allowed))
        text = f"pod updates may not change fields other than {UPDATABLE}\n{told}"
        out.append(f.forbidden("spec", text))
    return out


def _fixed_part(spec: Part, before: Part) -> Part:
    """Return the new spec with what may change as it was before."""
    out = dict(spec)
    for key in ("containers", "initContainers"):
        if spec.get(key):
            out[key] = [
                {**new, "image": old.get("image")}
                for new, old in zip(spec[key], before[key], strict=True)
            ]
    for key in ("activeDeadlineSeconds", "tolerations"):
        out.pop(key, None)
        if key in before:
            out[key] = before[key]
    seconds = before.get("terminationGracePeriodSeconds") or 0
    if seconds < 0 and spec.get("terminationGracePeriodSeconds") == 1:
        out["terminationGracePeriodSeconds"] = seconds
    gates = before.get("schedulingGates") or []
    if gates and all(one in gates for one in spec.get("schedulingGates") or ()):
        out["schedulingGates"] = gates
    return out


def _deadline_change(new: int | None, old: int | None) -> Causes:
    at = "spec.activeDeadlineSeconds"
    if new is not None:
        if not 0 <= new <= MOST_SECONDS:
            text = f"must be between 0 and {MOST_SECONDS}, inclusive"
            return [f.invalid(at, new, text)]
        if old is not None and old < new:
            return [f.invalid(at, new, "must be less than or equal to previous value")]
    elif old is not None:
        return [f.invalid(at, new, "must not update from a positive integer to nil value")]
    return []


def _toleration_change(new: Sequence[Part], old: Sequence[Part]) -> Causes:
    def without_seconds(one: Part) -> Part:
        return {key: value for key, value in one.items() if key != "tolerationSeconds"}

    held = [without_seconds(one) for one in new]
    if not all(without_seconds(one) in held for one in old):
        text = "existing toleration can not be modified except its tolerationSeconds"
        return [f.forbidden("spec.tolerations", text)]
    return _tolerations("spec.tolerations", new)


def _differences(at: str, old: object, new: object) -> Iterator[str]:
    """Yield up to LONGEST_DIFF lines that say where two values differ."""
    for count, line in enumerate(_each_difference(at, old, new)):
        if count == LONGEST_DIFF:
            yield "  ..."
            return
        yield line


def _each_difference(at: str, old: object, new: object) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                yield from _each_difference(f"{at}.{key}", old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (one, other) in enumerate(zip(old, new, strict=True)):
            if one != other:
                yield from _each_difference(f"{at}[{i}]", one, other)
    else:
        yield f"- {at}: {json.dumps(old, ensure_ascii=False)}"
        yield f"+ {at}: {json.dumps(new, ensure_ascii=False)}"


# --- workloads ------------------------------------------------------------------------------------


def deployment(new: Obj, old: Obj | None) -> Causes:
    """Check a Deployment without its metadata."""
    spec: Part = new.get("spec") or {}
    if old is not None and spec == old.get("spec"):
        return []
    out = f.not_negative("spec.replicas", spec.get("replicas"))
    out += _selector(spec, "deployment")
    out += _template(spec, "ReplicaSet")
    out += _strategy(spec.get("strategy") or {})
    for key in ("minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds"):
        out += f.not_negative(f"spec.{key}", spec.get(key))
    deadline = spec.get("progressDeadlineSeconds")
    if deadline is not None and deadline <= (spec.get("minReadySeconds") or 0):
        text = "must be greater than minReadySeconds"
        out.append(f.invalid("spec.progressDeadlineSeconds", deadline, text))
    return out + _selector_change(spec, old)


def replica_set(new: Obj, old: Obj | None) -> Causes:
    """Check a ReplicaSet without its metadata."""
    spec: Part = new.get("spec") or {}
    if old is not None and spec == old.get("spec"):
        return []
    out = f.not_negative("spec.replicas", spec.get("replicas"))
    out += f.not_negative("spec.minReadySeconds", spec.get("minReadySeconds"))
    out += _selector(spec, "deployment")  # so upstream says it
    out += _template(spec, "ReplicaSet")
    return out + _selector_change(spec, old)


def stateful_set(new: Obj, old: Obj | None) -> Causes:
    """Check a StatefulSet without its metadata."""
    spec: Part = new.get("spec") or {}
    if old is not None and spec == old.get("spec"):
        return []
    out: Causes = []
    policy = spec.get("podManagementPolicy")
    if policy not in ("OrderedReady", "Parallel"):
        text = "must be 'OrderedReady' or 'Parallel'"
        out.append(f.invalid("spec.podManagementPolicy", policy, text))
    out += _update_strategy(spec.get("updateStrategy") or {})
    for key, value in (spec.get("persistentVolumeClaimRetentionPolicy") or {}).items():
        at = f"spec.persistentVolumeClaimRetentionPolicy.{key}"
        if value not in ("Retain", "Delete"):
            out.append(f.unsupported(at, value, ("Retain", "Delete")))
    for key in ("replicas", "minReadySeconds"):
        out += f.not_negative(f"spec.{key}", spec.get(key))
    out += f.not_negative("spec.ordinals.start", (spec.get("ordinals") or {}).get("start"))
    out += _selector(spec, "statefulset")
    claims = [
        (one.get("metadata") or {}).get("name") or ""
        for one in spec.get("volumeClaimTemplates") or ()
    ]
    out += _template(spec, "StatefulSet", claims)
    if old is not None:
        before = old.get("spec") or {}
        if any(
            spec.get(key) != before.get(key)
            for key in {*spec, *before}
            if key not in STATEFUL_UPDATABLE
        ):
            listed = ", ".join(f"'{key}'" for key in STATEFUL_UPDATABLE[:-1])
            text = (
                f"updates to statefulset spec for fields other than {listed} and"
                f" '{STATEFUL_UPDATABLE[-1]}' are forbidden"
            )
            out.append(f.forbidden("spec", text))
    return out


def _selector(spec: Part, kind: str) -> Causes:
    selector = spec.get("selector")
    if selector is None:
        return [f.required("spec.selector")]
    out = f.label_selector("spec.selector", selector)
    if not selector.get("matchLabels") and not selector.get("matchExpressions"):
        text = f"empty selector is invalid for {kind}"
        out.append(f.invalid("spec.selector", _shown(selector), text))
    return out


def _shown(selector: Part) -> dict[str, Any]:
    """Return a selector as upstream writes it."""
    out: dict[str, Any] = {}
    if selector.get("matchLabels"):
        out["matchLabels"] = dict(sorted(selector["matchLabels"].items()))
    if selector.get("matchExpressions"):
        out["matchExpressions"] = selector["matchExpressions"]
    return out


def _selector_change(spec: Part, old: Obj | None) -> Causes:
    if old is None or spec.get("selector") == (old.get("spec") or {}).get("selector"):
        return []
    return [f.invalid("spec.selector", _shown(spec.get("selector") or {}), f.IMMUTABLE)]


def _template(spec: Part, maker: str, claims: Sequence[str] = ()) -> Causes:
    selector = spec.get("selector")
    template: Part = spec.get("template") or {}
    meta: Part = template.get("metadata") or {}
    inner: Part = template.get("spec") or {}
    held = meta.get("labels")
    out: Causes = []
    if selector is None or not f.selects(selector, held or {}):
        shown = dict(sorted(held.items())) if held else None
        text = "`selector` does not match template `labels`"
        out.append(f.invalid("spec.template.metadata.labels", shown, text))
    out += f.label_map("spec.template.labels", held)
    out += f.annotation_map("spec.template.annotations", meta.get("annotations"))
    out += pod_spec("spec.template.spec", inner, claims)
    if inner.get("ephemeralContainers"):
        text = "ephemeral containers not allowed in pod template"
        out.append(f.forbidden("spec.template.spec.ephemeralContainers", text))
    if inner.get("restartPolicy") != "Always":
        at = "spec.template.spec.restartPolicy"
        out.append(f.unsupported(at, inner.get("restartPolicy"), ("Always",)))
    if inner.get("activeDeadlineSeconds") is not None:
        at = "spec.template.spec.activeDeadlineSeconds"
        out.append(f.forbidden(at, f"activeDeadlineSeconds in {maker} is not Supported"))
    return out


def _strategy(strategy: Part) -> Causes:
    at, kind, rolling = "spec.strategy", strategy.get("type"), strategy.get("rollingUpdate")
    if kind == "Recreate":
        if rolling is None:
            return []
        text = "may not be specified when strategy `type` is 'Recreate'"
        return [f.forbidden(f"{at}.rollingUpdate", text)]
    if kind != "RollingUpdate":
        shown = {"Type": kind, "RollingUpdate": rolling}
        return [f.unsupported(at, shown, ("Recreate", "RollingUpdate"))]
    if rolling is None:
        return [f.required(f"{at}.rollingUpdate", "this should be defaulted and never be nil")]
    at = f"{at}.rollingUpdate"
    away, more = rolling.get("maxUnavailable"), rolling.get("maxSurge")
    out = f.count_or_percent(f"{at}.maxUnavailable", away)
    out += f.count_or_percent(f"{at}.maxSurge", more)
    if f.is_zero(away) and f.is_zero(more):
        text = "may not be 0 when `maxSurge` is 0"
        out.append(f.invalid(f"{at}.maxUnavailable", away, text))
    return out + f.not_over_all(f"{at}.maxUnavailable", away)


def _update_strategy(strategy: Part) -> Causes:
    at, kind, rolling = "spec.updateStrategy", strategy.get("type"), strategy.get("rollingUpdate")
    if kind == "OnDelete":
        if rolling is None:
            return []
        text = "only allowed for updateStrategy 'RollingUpdate'"
        return [f.invalid(f"{at}.rollingUpdate", rolling, text)]
    if kind != "RollingUpdate":
        shown = {"Type": kind, "RollingUpdate": rolling}
        return [f.invalid(at, shown, "must be 'RollingUpdate' or 'OnDelete'")]
    rolling = rolling or {}
    at = f"{at}.rollingUpdate"
    out = f.not_negative(f"{at}.partition", rolling.get("partition"))
    away = rolling.get("maxUnavailable")
    if away is not None:
        out += f.count_or_percent(f"{at}.maxUnavailable", away)
        if f.is_zero(away):
            out.append(f.invalid(f"{at}.maxUnavailable", away, "cannot be 0"))
        out += f.not_over_all(f"{at}.maxUnavailable", away)
    return out
