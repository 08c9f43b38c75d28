"""What `kubectl explain` says of types and fields, in kdns' own words: one table, for openapi.py.

Notation. A word at the start of a line is a type of schema.py, an indented word a field of it,
what follows its sentence. `{A|B}` before the sentence: the only values there are.
What has no words here has none in explain.
"""

from __future__ import annotations

from typing import Final

WORDS: Final = """
meta/v1.ObjectMeta What every object has: its name, its labels, and what the server keeps about it.
  name The object's name, which no other object of its kind in its namespace has.
  generateName The start of a name that the server completes, where no name is given.
  namespace The namespace that the name is unique in.
  uid The server's own identifier, which is never given twice.
  resourceVersion The version of the object, which changes with every write.
  generation A number that goes up when what is wanted of the object changes.
  creationTimestamp When the object was made.
  deletionTimestamp When the object is to be gone; set once somebody asks for its deletion.
  deletionGracePeriodSeconds Seconds the object may live after its deletion was asked for.
  labels Names and values by which selectors choose objects.
  annotations Names and values for tools; nothing selects by them.
  ownerReferences Objects that this one belongs to; when all are gone it is deleted.
  finalizers Who must be heard before the object is gone for good.
  managedFields Which client owns which fields, for server-side apply.
  selfLink No longer filled in.
meta/v1.OwnerReference An object that another one belongs to.
  apiVersion Group and version of the owner.
  kind Kind of the owner.
  name Name of the owner.
  uid Identifier of the owner.
  controller Whether the owner is the one that steers the object; at most one may be.
  blockOwnerDeletion Whether an owner deleted in the foreground waits for this object.
meta/v1.ManagedFieldsEntry The fields one client owns.
  manager The client's name.
  operation {Apply|Update} How the client wrote them.
  apiVersion Group and version that the fields are named by.
  time When the client last changed its set of fields.
  fieldsType The form of fieldsV1.
  fieldsV1 The fields, as a tree of their names.
  subresource The part of the object that was written through; empty for the object itself.
meta/v1.ListMeta What every list has.
  resourceVersion The version of the collection, from which a watch can go on.
  continue The token that the next page is asked for with.
  remainingItemCount How many objects follow on later pages.
meta/v1.LabelSelector Which objects are meant: those that all of its requirements hold for.
  matchLabels Labels that must have exactly these values.
  matchExpressions Requirements that say more than that a label has one value.
meta/v1.LabelSelectorRequirement One requirement of a selector.
  key The label it is about.
  operator In, NotIn, Exists or DoesNotExist.
  values The values that In and NotIn compare with.
meta/v1.Condition One statement about an object's state, and since when it holds.
  type What is stated.
  status {False|True|Unknown} Whether it holds.
  observedGeneration The generation of the object that the statement is about.
  lastTransitionTime When it last changed.
  reason One word for why.
  message A sentence for people.
meta/v1.DeleteOptions How an object is to be deleted.
  gracePeriodSeconds Seconds the object may live on; 0 is at once.
  preconditions What must hold of the object, or it is not deleted.
  propagationPolicy Background, Foreground or Orphan: what becomes of what belongs to the object.
  dryRun All: say what would happen and change nothing.
meta/v1.Preconditions What must hold of an object.
  uid Its identifier.
  resourceVersion Its version.
meta/v1.Status The answer to a request that has no object to return, or that failed.
  status Success or Failure.
  message What happened, for people.
  reason One word for why it failed.
  details More about it, for programs.
  code The HTTP status.

core/v1.Namespace A space of names: objects in two namespaces may have the same name.
  spec What is wanted of the namespace.
  status What is known about it.
core/v1.NamespaceSpec What is wanted of a namespace.
  finalizers Who must be heard before the namespace is gone for good.
core/v1.NamespaceStatus The state of a namespace.
  phase {Active|Terminating} Terminating while what is in it is deleted.
  conditions Statements about how its deletion goes on.

core/v1.Node A machine that Pods run on.
  spec What is wanted of the node.
  status What is known about it.
core/v1.NodeSpec What is wanted of a node.
  podCIDR The range that the node's Pods get their addresses from.
  podCIDRs The same for each address family.
  providerID The machine's identifier at its provider.
  unschedulable Whether new Pods are kept off the node.
  taints What keeps Pods off that do not tolerate it.
core/v1.NodeStatus The state of a node.
  capacity All the node has to give.
  allocatable What of it Pods can have.
  conditions Statements about the node, Ready among them.
  addresses The node's addresses and names.
  nodeInfo Which system and versions run on it.

core/v1.Service A name and an address for a set of endpoints that come and go.
  spec What is wanted of the service.
  status What is known about it.
core/v1.ServiceSpec What is wanted of a service.
  ports The ports that the service listens on.
  selector Labels of the Pods behind the service; without it others name the endpoints.
  clusterIP The service's address, given by the server; "None" makes it headless.
  clusterIPs The service's addresses, one a family; the first is clusterIP.
  type {ClusterIP|ExternalName|LoadBalancer|NodePort} From where the service can be reached.
  externalIPs Addresses outside the cluster's care at which nodes accept traffic for the service.
  sessionAffinity {ClientIP|None} Whether a client is sent to the same endpoint each time.
  sessionAffinityConfig How long a client keeps its endpoint.
  loadBalancerIP The address that is asked of the load balancer; deprecated.
  loadBalancerSourceRanges From which addresses the load balancer may be used.
  loadBalancerClass Which implementation of a load balancer is meant.
  allocateLoadBalancerNodePorts Whether a service of type LoadBalancer gets node ports.
  externalName The name that a service of type ExternalName stands for: answered as a CNAME.
  externalTrafficPolicy {Cluster|Local} Whether traffic from outside may go to other nodes.
  internalTrafficPolicy {Cluster|Local} Whether traffic from inside may go to other nodes.
  healthCheckNodePort The node port that tells a load balancer whether a node has endpoints.
  publishNotReadyAddresses Whether endpoints count that are not ready.
  ipFamilyPolicy {PreferDualStack|RequireDualStack|SingleStack} How many families it has.
  ipFamilies The address families, IPv4 and IPv6; the first is that of clusterIP.
  trafficDistribution Which endpoints are preferred: PreferSameZone or PreferSameNode.
core/v1.ServicePort One port of a service.
  name The port's name, in SRV records too; needed where there are several ports.
  protocol {SCTP|TCP|UDP} The transport protocol.
  port The port that the service listens on.
  targetPort The endpoints' port, by number or by name; the same as port if not given.
  nodePort The port on every node that leads to the service, for types NodePort and LoadBalancer.
  appProtocol Which protocol is spoken above the transport.
core/v1.SessionAffinityConfig How a client keeps its endpoint.
  clientIP For affinity by the client's address.
core/v1.ClientIPConfig For affinity by the client's address.
  timeoutSeconds Seconds after which a silent client may get another endpoint.
core/v1.ServiceStatus The state of a service.
  loadBalancer What the load balancer was given.
  conditions Statements about the service.
core/v1.LoadBalancerStatus What a load balancer was given.
  ingress Where it takes traffic.
core/v1.LoadBalancerIngress One place where a load balancer takes traffic.
  ip Its address.
  hostname Its name, where it has no fixed address.
  ipMode VIP: the address is seen on the node; Proxy: it is not.
  ports What became of each port.
core/v1.PortStatus What became of a load balancer's port.
  port The port.
  protocol {SCTP|TCP|UDP} Its protocol.
  error Why it is not served.

core/v1.Endpoints The addresses behind a service, all in one object; superseded by EndpointSlice.
  subsets The addresses, in groups that have the same ports.
core/v1.EndpointSubset Addresses that have the same ports.
  addresses Addresses that are ready.
  notReadyAddresses Addresses that are not ready yet, or no more.
  ports The ports at each of them.
core/v1.EndpointAddress One address behind a service.
  ip The address.
  hostname The name of the endpoint below the service's name.
  nodeName The node it is on.
  targetRef The object it belongs to, mostly a Pod.
core/v1.EndpointPort One port of endpoints.
  name As the service's port is called.
  port The number.
  protocol {SCTP|TCP|UDP} The transport protocol.
  appProtocol Which protocol is spoken above the transport.
core/v1.ObjectReference Which object is meant.
  kind Its kind.
  namespace Its namespace.
  name Its name.
  uid Its identifier.
  apiVersion Its group and version.
  resourceVersion Its version.
  fieldPath The part of it that is meant.

discovery.k8s.io/v1.EndpointSlice Some of the endpoints behind a service, of one address family.
  addressType {FQDN|IPv4|IPv6} What the addresses are.
  endpoints The endpoints.
  ports The ports of each of them.
discovery.k8s.io/v1.Endpoint One endpoint behind a service.
  addresses Its addresses; only the first counts.
  conditions Whether it takes traffic.
  hostname Its name below the service's name.
  targetRef The object it belongs to, mostly a Pod.
  nodeName The node it is on.
  zone The zone it is in.
  hints For which zones and nodes it is meant.
  deprecatedTopology Topology as the API's first version had it.
discovery.k8s.io/v1.EndpointConditions Whether an endpoint takes traffic.
  ready Whether it is serving and not terminating; not given counts as true.
  serving Whether it can take traffic, terminating or not.
  terminating Whether it is about to go.
discovery.k8s.io/v1.EndpointHints For whom an endpoint is meant.
  forZones Zones whose clients should use it.
  forNodes Nodes whose clients should use it.
discovery.k8s.io/v1.ForZone A zone.
  name Its name.
discovery.k8s.io/v1.ForNode A node.
  name Its name.
discovery.k8s.io/v1.EndpointPort One port of endpoints.
  name As the service's port is called.
  port The number; not given: all ports.
  protocol The transport protocol: TCP, UDP or SCTP.
  appProtocol Which protocol is spoken above the transport.

core/v1.Pod Containers that run together on one node and share an address.
  spec What is wanted of the Pod.
  status What is known about it.
core/v1.PodTemplateSpec What Pods are made from.
  spec What is wanted of each Pod.
core/v1.PodSpec What is wanted of a Pod.
  containers The containers; at least one.
  initContainers Containers that run to their end, one after the other, before the others start.
  volumes File systems that the containers can mount.
  restartPolicy {Always|Never|OnFailure} When a container that ended is started again.
  terminationGracePeriodSeconds Seconds the Pod has to end by itself.
  dnsPolicy {ClusterFirst|ClusterFirstWithHostNet|Default|None} Where the Pod's names are looked up.
  dnsConfig Name servers and search domains besides those of dnsPolicy.
  nodeSelector Labels of the nodes that the Pod may run on.
  nodeName The node the Pod runs on.
  serviceAccountName As whom the Pod speaks to the API.
  hostNetwork Whether the Pod has the node's own addresses.
  hostname The Pod's host name; with subdomain also its name in DNS.
  subdomain The headless service that the Pod has a name below.
  hostAliases Lines for the Pod's hosts file.
  readinessGates Conditions that must hold besides those of the containers.
  tolerations Taints of nodes that do not keep the Pod off.
  affinity Which nodes, and which Pods' neighbourhood, are wanted or shunned.
  schedulerName Who finds a node for the Pod.
core/v1.PodDNSConfig Name servers and search domains.
  nameservers Addresses of name servers.
  searches Domains that short names are tried in.
  options Options of the resolver.
core/v1.HostAlias A line for a hosts file.
  ip The address.
  hostnames The names it has.
core/v1.Container One container of a Pod.
  name The container's name, which no other container of the Pod has.
  image What it runs.
  command The program, in place of the image's own.
  args The program's arguments.
  workingDir The folder it starts in.
  ports The ports it listens on; others are reachable as well.
  env Environment variables.
  envFrom Where more environment variables come from.
  resources What it needs, and what it may use at most.
  volumeMounts Which volumes it sees, and where.
  livenessProbe What tells that it must be started anew.
  readinessProbe What tells that it takes traffic.
  startupProbe What tells that it has started.
  imagePullPolicy {Always|IfNotPresent|Never} When the image is fetched.
core/v1.ContainerPort One port of a container.
  name The port's name, which a service's targetPort can say.
  containerPort The number.
  hostPort The port of the node that leads to it.
  hostIP The node's address that hostPort is on.
  protocol {SCTP|TCP|UDP} The transport protocol.
core/v1.EnvVar An environment variable.
  name Its name.
  value Its value.
  valueFrom Where its value comes from.
core/v1.PodStatus The state of a Pod.
  phase {Failed|Pending|Running|Succeeded|Unknown} How far its life has come.
  conditions Statements about the Pod, Ready among them.
  podIP The Pod's address.
  podIPs The Pod's addresses, at most one a family.
  hostIP The address of its node.
  hostIPs The addresses of its node.
  startTime When its node took it up.
  message A sentence about its state.
  reason One word about its state.
  containerStatuses The state of each container.
  qosClass How it fares when its node runs short.
core/v1.PodCondition One statement about a Pod.
  type What is stated.
  status Whether it holds: True, False or Unknown.

core/v1.Event What happened to an object, told for people.
  involvedObject The object it is about.
  reason One word for what happened.
  message A sentence about it.
  source Who tells it.
  firstTimestamp When it was first seen.
  lastTimestamp When it was last seen.
  count How often it was seen.
  type Normal or Warning.
  reportingComponent The program that tells it.
core/v1.ConfigMap Settings, by name.
  data The settings that are text.
  binaryData The settings that are not text.
  immutable Whether they can no longer be changed.
core/v1.Secret Settings that are not for everybody to see.
  data The values, in base64.
  stringData The values as text; written into data, never read.
  type What kind of secret it is.
  immutable Whether it can no longer be changed.
core/v1.ServiceAccount As whom programs in the cluster speak to the API.
  secrets Secrets that its Pods may use.
  imagePullSecrets Secrets that images are fetched with.
  automountServiceAccountToken Whether its Pods find its token in a file.

apps/v1.Deployment A number of equal Pods, and how they are replaced when their template changes.
  spec What is wanted of the deployment.
  status What is known about it.
apps/v1.DeploymentSpec What is wanted of a deployment.
  replicas How many Pods there are to be.
  selector Labels of the Pods that belong to it; not to be changed.
  template What its Pods are made from.
  strategy How old Pods are replaced by new ones.
  minReadySeconds Seconds a new Pod must be ready before it counts as available.
  revisionHistoryLimit How many old ReplicaSets are kept.
  paused Whether changes of the template wait.
  progressDeadlineSeconds Seconds without progress after which a roll-out counts as failed.
apps/v1.DeploymentStrategy The way from old Pods to new ones.
  type {Recreate|RollingUpdate} All at once, or some at a time.
  rollingUpdate How many at a time.
apps/v1.RollingUpdateDeployment How many Pods are replaced at a time.
  maxUnavailable How many may be missing, as a number or in per cent.
  maxSurge How many there may be too many, as a number or in per cent.
apps/v1.ReplicaSet A number of equal Pods.
  spec What is wanted of the set.
  status What is known about it.
apps/v1.ReplicaSetSpec What is wanted of a set of Pods.
  replicas How many Pods there are to be.
  selector Labels of the Pods that belong to it.
  template What its Pods are made from.
  minReadySeconds Seconds a new Pod must be ready before it counts as available.
apps/v1.StatefulSet Pods with fixed names, one after the other.
  spec What is wanted of the set.
  status What is known about it.
apps/v1.StatefulSetSpec What is wanted of a set of named Pods.
  replicas How many Pods there are to be.
  selector Labels of the Pods that belong to it.
  serviceName The headless service that its Pods have their names below.
  template What its Pods are made from.
  podManagementPolicy {OrderedReady|Parallel} Whether Pods are made one after the other.
  updateStrategy How Pods are replaced when the template changes.
  ordinals From which number Pods are counted.
coordination.k8s.io/v1.Lease Who holds something that only one can hold, and until when.
  spec Who holds it, and since when.
coordination.k8s.io/v1.LeaseSpec The holder of a lease, and for how long.
  holderIdentity Its holder.
  leaseDurationSeconds Seconds after renewTime that others must wait.
  acquireTime When the holder got it.
  renewTime When the holder last said that it is alive.
  leaseTransitions How often it changed hands.
networking.k8s.io/v1.ServiceCIDR Where Services get their addresses from.
  spec The ranges.
  status Whether they are in use.
networking.k8s.io/v1.ServiceCIDRSpec Ranges of addresses.
  cidrs One range, or one of IPv4 and one of IPv6.
networking.k8s.io/v1.ServiceCIDRStatus What is known of the ranges.
  conditions Whether addresses are taken from them.
autoscaling/v1.Scale The number of Pods of an object that has some.
  spec How many there are to be.
  status How many there are.
autoscaling/v1.ScaleSpec How many Pods there are to be.
  replicas The number.
autoscaling/v1.ScaleStatus How many Pods there are.
  replicas The number.
  selector The labels that they have, as a selector's text.
policy/v1.Eviction The wish that a Pod leaves its node.
  deleteOptions How it is to be deleted.
authorization.k8s.io/v1.SelfSubjectAccessReview The question whether one may do something.
authorization.k8s.io/v1.SelfSubjectRulesReview The question what one may do in a namespace.
authentication.k8s.io/v1.SelfSubjectReview The question who one is.
"""
