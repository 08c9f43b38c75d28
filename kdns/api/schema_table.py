"""The fields of every type that the embedded API knows, as of Kubernetes 1.36.

One table for all who need it: JSON checks, protobuf, strategic merge patch, server-side apply
and OpenAPI. How it is read is schema.py's; what a value must be is validation.py's.

Notation. `[group/version]` opens a group, a word at the start of a line a type, indented words
are its fields:

    NAME[!][?][+]=NUMBER[:TYPE][@KEY][%KEYS][$][~][^]

NUMBER  protobuf field number; 0: the field is not in protobuf
!       OpenAPI requires it; it is kept when it is empty
?       a pointer in Go: an empty value (0, false, "", {}) is a value and is kept
+       OpenAPI does not require it, and it is kept all the same when it is empty
TYPE    nothing is string; a scalar of schema.py; a type of the same group, with `m.` of meta/v1,
        with `c.` of core/v1; `[]T` list, `{}T` map of string to T
@KEY    strategic merge patch merges the list by that key; `@-` merges a list of scalars
%KEYS   server-side apply: list type map with those keys; a bare `%` list type set
$       strategic merge patch with retainKeys
~       server-side apply owns it as a whole; after a type's name: all of that type
^       embedded: its fields stand one level up in JSON
"""

from __future__ import annotations

from typing import Final

TABLE: Final = """
[meta/v1]
ObjectMeta
  name=1 generateName=2 namespace=3 selfLink=4 uid=5 resourceVersion=6 generation=7:int64
  creationTimestamp=8:time deletionTimestamp?=9:time deletionGracePeriodSeconds?=10:int64
  labels=11:{}string annotations=12:{}string ownerReferences=13:[]OwnerReference@uid%uid
  finalizers=14:[]string@-% managedFields=17:[]ManagedFieldsEntry
OwnerReference ~
  kind!=1 name!=3 uid!=4 apiVersion!=5 controller?=6:bool blockOwnerDeletion?=7:bool
ManagedFieldsEntry
  manager=1 operation=2 apiVersion=3 time?=4:time fieldsType=6 fieldsV1?=7:fieldsv1 subresource=8
ListMeta
  selfLink=1 resourceVersion=2 continue=3 remainingItemCount?=4:int64 shardInfo?=5:ShardInfo
ShardInfo
  selector!=1
LabelSelector ~
  matchLabels=1:{}string matchExpressions=2:[]LabelSelectorRequirement
LabelSelectorRequirement
  key!=1 operator!=2 values=3:[]string
FieldSelectorRequirement
  key!=1 operator!=2 values=3:[]string
Condition
  type!=1 status!=2 observedGeneration=3:int64 lastTransitionTime!=4:time reason!=5 message!=6
DeleteOptions
  apiVersion=0 kind=0 gracePeriodSeconds?=1:int64 preconditions?=2:Preconditions
  orphanDependents?=3:bool propagationPolicy?=4 dryRun=5:[]string
  ignoreStoreReadErrorWithClusterBreakingPotential?=6:bool
Preconditions
  uid?=1 resourceVersion?=2
CreateOptions
  apiVersion=0 kind=0 dryRun=1:[]string fieldManager=3 fieldValidation=4
UpdateOptions
  apiVersion=0 kind=0 dryRun=1:[]string fieldManager=2 fieldValidation=3
PatchOptions
  apiVersion=0 kind=0 dryRun=1:[]string force?=2:bool fieldManager=3 fieldValidation=4
GetOptions
  apiVersion=0 kind=0 resourceVersion=1
ListOptions
  apiVersion=0 kind=0 labelSelector=1 fieldSelector=2 watch=3:bool resourceVersion=4
  timeoutSeconds?=5:int64 limit=7:int64 continue=8 allowWatchBookmarks=9:bool
  resourceVersionMatch=10 sendInitialEvents?=11:bool shardSelector=15
Status
  apiVersion=0 kind=0 metadata=1:ListMeta status=2 message=3 reason=4 details?=5:StatusDetails
  code=6:int32
StatusDetails
  name=1 group=2 kind=3 causes=4:[]StatusCause retryAfterSeconds=5:int32 uid=6
StatusCause
  reason=1 message=2 field=3

[core/v1]
Namespace
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:NamespaceSpec status=3:NamespaceStatus
NamespaceSpec
  finalizers=1:[]string
NamespaceStatus
  phase=1 conditions=2:[]NamespaceCondition@type%type
NamespaceCondition
  type!=1 status!=2 lastTransitionTime=4:time reason=5 message=6

Node
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:NodeSpec status=3:NodeStatus
NodeSpec
  podCIDR=1 externalID=2 providerID=3 unschedulable=4:bool taints=5:[]Taint
  configSource?=6:NodeConfigSource podCIDRs=7:[]string@-%
Taint
  key!=1 value=2 effect!=3 timeAdded?=4:time
NodeConfigSource
  configMap?=2:ConfigMapNodeConfigSource
ConfigMapNodeConfigSource
  namespace!=1 name!=2 uid=3 resourceVersion=4 kubeletConfigKey!=5
NodeStatus
  capacity=1:{}quantity allocatable=2:{}quantity phase=3 conditions=4:[]NodeCondition@type%type
  addresses=5:[]NodeAddress@type%type daemonEndpoints=6:NodeDaemonEndpoints
  nodeInfo=7:NodeSystemInfo images=8:[]ContainerImage volumesInUse=9:[]string
  volumesAttached=10:[]AttachedVolume config?=11:NodeConfigStatus
  runtimeHandlers=12:[]NodeRuntimeHandler features?=13:NodeFeatures declaredFeatures=14:[]string
NodeCondition
  type!=1 status!=2 lastHeartbeatTime=3:time lastTransitionTime=4:time reason=5 message=6
NodeAddress
  type!=1 address!=2
NodeDaemonEndpoints
  kubeletEndpoint=1:DaemonEndpoint
DaemonEndpoint
  Port!=1:int32
NodeSystemInfo
  machineID!=1 systemUUID!=2 bootID!=3 kernelVersion!=4 osImage!=5 containerRuntimeVersion!=6
  kubeletVersion!=7 kubeProxyVersion!=8 operatingSystem!=9 architecture!=10 swap?=11:NodeSwapStatus
NodeSwapStatus
  capacity?=1:int64
ContainerImage
  names+=1:[]string sizeBytes=2:int64
AttachedVolume
  name!=1 devicePath!=2
NodeConfigStatus
  assigned?=1:NodeConfigSource active?=2:NodeConfigSource lastKnownGood?=3:NodeConfigSource error=4
NodeRuntimeHandler
  name+=1 features?=2:NodeRuntimeHandlerFeatures
NodeRuntimeHandlerFeatures
  recursiveReadOnlyMounts?=1:bool userNamespaces?=2:bool
NodeFeatures
  supplementalGroupsPolicy?=1:bool

Service
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:ServiceSpec status=3:ServiceStatus
ServiceSpec
  ports=1:[]ServicePort@port%port,protocol selector=2:{}string~ clusterIP=3 type=4
  externalIPs=5:[]string sessionAffinity=7 loadBalancerIP=8 loadBalancerSourceRanges=9:[]string
  externalName=10 externalTrafficPolicy=11 healthCheckNodePort=12:int32
  publishNotReadyAddresses=13:bool sessionAffinityConfig?=14:SessionAffinityConfig
  ipFamilyPolicy?=17 clusterIPs=18:[]string ipFamilies=19:[]string
  allocateLoadBalancerNodePorts?=20:bool loadBalancerClass?=21 internalTrafficPolicy?=22
  trafficDistribution?=23
ServicePort
  name=1 protocol=2 port!=3:int32 targetPort=4:intorstring nodePort=5:int32 appProtocol?=6
SessionAffinityConfig
  clientIP?=1:ClientIPConfig
ClientIPConfig
  timeoutSeconds?=1:int32
ServiceStatus
  loadBalancer=1:LoadBalancerStatus conditions=2:[]m.Condition@type%type
LoadBalancerStatus
  ingress=1:[]LoadBalancerIngress
LoadBalancerIngress
  ip=1 hostname=2 ipMode?=3 ports=4:[]PortStatus
PortStatus
  port!=1:int32 protocol!=2 error?=3

Endpoints
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta subsets=2:[]EndpointSubset
EndpointSubset
  addresses=1:[]EndpointAddress notReadyAddresses=2:[]EndpointAddress ports=3:[]EndpointPort
EndpointAddress ~
  ip!=1 targetRef?=2:ObjectReference hostname=3 nodeName?=4
EndpointPort ~
  name=1 port!=2:int32 protocol=3 appProtocol?=4
ObjectReference ~
  kind=1 namespace=2 name=3 uid=4 apiVersion=5 resourceVersion=6 fieldPath=7
LocalObjectReference ~
  name=1
TypedLocalObjectReference ~
  apiGroup?+=1 kind!=2 name!=3
TypedObjectReference
  apiGroup?+=1 kind!=2 name!=3 namespace?=4

Event
  apiVersion=0 kind=0 metadata!=1:m.ObjectMeta involvedObject!=2:ObjectReference reason=3 message=4
  source=5:EventSource firstTimestamp=6:time lastTimestamp=7:time count=8:int32 type=9
  eventTime=10:microtime series?=11:EventSeries action=12 related?=13:ObjectReference
  reportingComponent+=14 reportingInstance+=15
EventSource
  component=1 host=2
EventSeries
  count=1:int32 lastObservedTime=2:microtime

ConfigMap
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta data=2:{}string binaryData=3:{}bytes
  immutable?=4:bool
Secret
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta data=2:{}bytes type=3 stringData=4:{}string
  immutable?=5:bool
ServiceAccount
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta secrets=2:[]ObjectReference@name%name
  imagePullSecrets=3:[]LocalObjectReference automountServiceAccountToken?=4:bool

Pod
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:PodSpec status=3:PodStatus
PodTemplateSpec
  metadata=1:m.ObjectMeta spec=2:PodSpec
PodSpec
  volumes=1:[]Volume@name%name$ containers!=2:[]Container@name%name restartPolicy=3
  terminationGracePeriodSeconds?=4:int64 activeDeadlineSeconds?=5:int64 dnsPolicy=6
  nodeSelector=7:{}string~ serviceAccountName=8 serviceAccount=9 nodeName=10 hostNetwork=11:bool
  hostPID=12:bool hostIPC=13:bool securityContext?=14:PodSecurityContext
  imagePullSecrets=15:[]LocalObjectReference@name%name hostname=16 subdomain=17
  affinity?=18:Affinity schedulerName=19 initContainers=20:[]Container@name%name
  automountServiceAccountToken?=21:bool tolerations=22:[]Toleration
  hostAliases=23:[]HostAlias@ip%ip priorityClassName=24 priority?=25:int32
  dnsConfig?=26:PodDNSConfig shareProcessNamespace?=27:bool readinessGates=28:[]PodReadinessGate
  runtimeClassName?=29 enableServiceLinks?=30:bool preemptionPolicy?=31 overhead=32:{}quantity
  topologySpreadConstraints=33:[]TopologySpreadConstraint@topologyKey%topologyKey,whenUnsatisfiable
  ephemeralContainers=34:[]EphemeralContainer@name%name setHostnameAsFQDN?=35:bool os?=36:PodOS
  hostUsers?=37:bool schedulingGates=38:[]PodSchedulingGate@name%name
  resourceClaims=39:[]PodResourceClaim@name%name$ resources?=40:ResourceRequirements
  hostnameOverride?=41 schedulingGroup?=43:PodSchedulingGroup
Container
  name!=1 image=2 command=3:[]string args=4:[]string workingDir=5
  ports=6:[]ContainerPort@containerPort%containerPort,protocol env=7:[]EnvVar@name%name
  resources=8:ResourceRequirements volumeMounts=9:[]VolumeMount@mountPath%mountPath
  livenessProbe?=10:Probe readinessProbe?=11:Probe lifecycle?=12:Lifecycle
  terminationMessagePath=13 imagePullPolicy=14 securityContext?=15:SecurityContext stdin=16:bool
  stdinOnce=17:bool tty=18:bool envFrom=19:[]EnvFromSource terminationMessagePolicy=20
  volumeDevices=21:[]VolumeDevice@devicePath%devicePath startupProbe?=22:Probe
  resizePolicy=23:[]ContainerResizePolicy restartPolicy?=24
  restartPolicyRules=25:[]ContainerRestartRule
EphemeralContainer
  ephemeralContainerCommon=1:EphemeralContainerCommon^ targetContainerName=2
EphemeralContainerCommon
  name!=1 image=2 command=3:[]string args=4:[]string workingDir=5
  ports=6:[]ContainerPort@containerPort%containerPort,protocol env=7:[]EnvVar@name%name
  resources=8:ResourceRequirements volumeMounts=9:[]VolumeMount@mountPath%mountPath
  livenessProbe?=10:Probe readinessProbe?=11:Probe lifecycle?=12:Lifecycle
  terminationMessagePath=13 imagePullPolicy=14 securityContext?=15:SecurityContext stdin=16:bool
  stdinOnce=17:bool tty=18:bool envFrom=19:[]EnvFromSource terminationMessagePolicy=20
  volumeDevices=21:[]VolumeDevice@devicePath%devicePath startupProbe?=22:Probe
  resizePolicy=23:[]ContainerResizePolicy restartPolicy?=24
  restartPolicyRules=25:[]ContainerRestartRule
ContainerPort
  name=1 hostPort=2:int32 containerPort!=3:int32 protocol=4 hostIP=5
EnvVar
  name!=1 value=2 valueFrom?=3:EnvVarSource
EnvVarSource
  fieldRef?=1:ObjectFieldSelector resourceFieldRef?=2:ResourceFieldSelector
  configMapKeyRef?=3:ConfigMapKeySelector secretKeyRef?=4:SecretKeySelector
  fileKeyRef?=5:FileKeySelector
ObjectFieldSelector ~
  apiVersion=1 fieldPath!=2
ResourceFieldSelector ~
  containerName=1 resource!=2 divisor=3:quantity
ConfigMapKeySelector ~
  localObjectReference=1:LocalObjectReference^ key!=2 optional?=3:bool
SecretKeySelector ~
  localObjectReference=1:LocalObjectReference^ key!=2 optional?=3:bool
FileKeySelector ~
  volumeName!=1 path!=2 key!=3 optional?=4:bool
EnvFromSource
  prefix=1 configMapRef?=2:ConfigMapEnvSource secretRef?=3:SecretEnvSource
ConfigMapEnvSource
  localObjectReference=1:LocalObjectReference^ optional?=2:bool
SecretEnvSource
  localObjectReference=1:LocalObjectReference^ optional?=2:bool
ResourceRequirements
  limits=1:{}quantity requests=2:{}quantity claims=3:[]ResourceClaim%name
ResourceClaim
  name!=1 request=2
ContainerResizePolicy
  resourceName!=1 restartPolicy!=2
ContainerRestartRule
  action!=1 exitCodes?=2:ContainerRestartRuleOnExitCodes
ContainerRestartRuleOnExitCodes
  operator!=1 values=2:[]int32%
VolumeMount
  name!=1 readOnly=2:bool mountPath!=3 subPath=4 mountPropagation?=5 subPathExpr=6
  recursiveReadOnly?=7
VolumeDevice
  name!=1 devicePath!=2
Probe
  handler=1:ProbeHandler^ initialDelaySeconds=2:int32 timeoutSeconds=3:int32 periodSeconds=4:int32
  successThreshold=5:int32 failureThreshold=6:int32 terminationGracePeriodSeconds?=7:int64
ProbeHandler
  exec?=1:ExecAction httpGet?=2:HTTPGetAction tcpSocket?=3:TCPSocketAction grpc?=4:GRPCAction
ExecAction
  command=1:[]string
HTTPGetAction
  path=1 port!=2:intorstring host=3 scheme=4 httpHeaders=5:[]HTTPHeader
HTTPHeader
  name!=1 value!=2
TCPSocketAction
  port!=1:intorstring host=2
GRPCAction
  port!=1:int32 service?+=2
Lifecycle
  postStart?=1:LifecycleHandler preStop?=2:LifecycleHandler stopSignal?=3
LifecycleHandler
  exec?=1:ExecAction httpGet?=2:HTTPGetAction tcpSocket?=3:TCPSocketAction sleep?=4:SleepAction
SleepAction
  seconds!=1:int64
SecurityContext
  capabilities?=1:Capabilities privileged?=2:bool seLinuxOptions?=3:SELinuxOptions
  runAsUser?=4:int64 runAsNonRoot?=5:bool readOnlyRootFilesystem?=6:bool
  allowPrivilegeEscalation?=7:bool runAsGroup?=8:int64 procMount?=9
  windowsOptions?=10:WindowsSecurityContextOptions seccompProfile?=11:SeccompProfile
  appArmorProfile?=12:AppArmorProfile
Capabilities
  add=1:[]string drop=2:[]string
SELinuxOptions
  user=1 role=2 type=3 level=4
WindowsSecurityContextOptions
  gmsaCredentialSpecName?=1 gmsaCredentialSpec?=2 runAsUserName?=3 hostProcess?=4:bool
SeccompProfile
  type!=1 localhostProfile?=2
AppArmorProfile
  type!=1 localhostProfile?=2
PodSecurityContext
  seLinuxOptions?=1:SELinuxOptions runAsUser?=2:int64 runAsNonRoot?=3:bool
  supplementalGroups=4:[]int64 fsGroup?=5:int64 runAsGroup?=6:int64 sysctls=7:[]Sysctl
  windowsOptions?=8:WindowsSecurityContextOptions fsGroupChangePolicy?=9
  seccompProfile?=10:SeccompProfile appArmorProfile?=11:AppArmorProfile
  supplementalGroupsPolicy?=12 seLinuxChangePolicy?=13
Sysctl
  name!=1 value!=2
Affinity
  nodeAffinity?=1:NodeAffinity podAffinity?=2:PodAffinity podAntiAffinity?=3:PodAntiAffinity
NodeAffinity
  requiredDuringSchedulingIgnoredDuringExecution?=1:NodeSelector
  preferredDuringSchedulingIgnoredDuringExecution=2:[]PreferredSchedulingTerm
NodeSelector ~
  nodeSelectorTerms!=1:[]NodeSelectorTerm
NodeSelectorTerm ~
  matchExpressions=1:[]NodeSelectorRequirement matchFields=2:[]NodeSelectorRequirement
NodeSelectorRequirement
  key!=1 operator!=2 values=3:[]string
PreferredSchedulingTerm
  weight!=1:int32 preference!=2:NodeSelectorTerm
PodAffinity
  requiredDuringSchedulingIgnoredDuringExecution=1:[]PodAffinityTerm
  preferredDuringSchedulingIgnoredDuringExecution=2:[]WeightedPodAffinityTerm
PodAntiAffinity
  requiredDuringSchedulingIgnoredDuringExecution=1:[]PodAffinityTerm
  preferredDuringSchedulingIgnoredDuringExecution=2:[]WeightedPodAffinityTerm
WeightedPodAffinityTerm
  weight!=1:int32 podAffinityTerm!=2:PodAffinityTerm
PodAffinityTerm
  labelSelector?=1:m.LabelSelector namespaces=2:[]string topologyKey!=3
  namespaceSelector?=4:m.LabelSelector matchLabelKeys=5:[]string mismatchLabelKeys=6:[]string
Toleration
  key=1 operator=2 value=3 effect=4 tolerationSeconds?=5:int64
HostAlias
  ip!=1 hostnames=2:[]string
PodDNSConfig
  nameservers=1:[]string searches=2:[]string options=3:[]PodDNSConfigOption
PodDNSConfigOption
  name=1 value?=2
PodReadinessGate
  conditionType!=1
TopologySpreadConstraint
  maxSkew!=1:int32 topologyKey!=2 whenUnsatisfiable!=3 labelSelector?=4:m.LabelSelector
  minDomains?=5:int32 nodeAffinityPolicy?=6 nodeTaintsPolicy?=7 matchLabelKeys=8:[]string
PodOS
  name!=1
PodSchedulingGate
  name!=1
PodResourceClaim
  name!=1 resourceClaimName?=3 resourceClaimTemplateName?=4
PodSchedulingGroup
  podGroupName?=1

Volume
  name!=1 volumeSource=2:VolumeSource^
VolumeSource
  hostPath?=1:HostPathVolumeSource emptyDir?=2:EmptyDirVolumeSource
  gcePersistentDisk?=3:GCEPersistentDiskVolumeSource
  awsElasticBlockStore?=4:AWSElasticBlockStoreVolumeSource gitRepo?=5:GitRepoVolumeSource
  secret?=6:SecretVolumeSource nfs?=7:NFSVolumeSource iscsi?=8:ISCSIVolumeSource
  glusterfs?=9:GlusterfsVolumeSource
  persistentVolumeClaim?=10:PersistentVolumeClaimVolumeSource rbd?=11:RBDVolumeSource
  flexVolume?=12:FlexVolumeSource cinder?=13:CinderVolumeSource cephfs?=14:CephFSVolumeSource
  flocker?=15:FlockerVolumeSource downwardAPI?=16:DownwardAPIVolumeSource fc?=17:FCVolumeSource
  azureFile?=18:AzureFileVolumeSource configMap?=19:ConfigMapVolumeSource
  vsphereVolume?=20:VsphereVirtualDiskVolumeSource quobyte?=21:QuobyteVolumeSource
  azureDisk?=22:AzureDiskVolumeSource photonPersistentDisk?=23:PhotonPersistentDiskVolumeSource
  portworxVolume?=24:PortworxVolumeSource scaleIO?=25:ScaleIOVolumeSource
  projected?=26:ProjectedVolumeSource storageos?=27:StorageOSVolumeSource csi?=28:CSIVolumeSource
  ephemeral?=29:EphemeralVolumeSource image?=30:ImageVolumeSource
HostPathVolumeSource
  path!=1 type?=2
EmptyDirVolumeSource
  medium=1 sizeLimit?=2:quantity
GCEPersistentDiskVolumeSource
  pdName!=1 fsType=2 partition=3:int32 readOnly=4:bool
AWSElasticBlockStoreVolumeSource
  volumeID!=1 fsType=2 partition=3:int32 readOnly=4:bool
GitRepoVolumeSource
  repository!=1 revision=2 directory=3
SecretVolumeSource
  secretName=1 items=2:[]KeyToPath defaultMode?=3:int32 optional?=4:bool
KeyToPath
  key!=1 path!=2 mode?=3:int32
NFSVolumeSource
  server!=1 path!=2 readOnly=3:bool
ISCSIVolumeSource
  targetPortal!=1 iqn!=2 lun!=3:int32 iscsiInterface=4 fsType=5 readOnly=6:bool portals=7:[]string
  chapAuthDiscovery=8:bool secretRef?=10:LocalObjectReference chapAuthSession=11:bool
  initiatorName?=12
GlusterfsVolumeSource
  endpoints!=1 path!=2 readOnly=3:bool
PersistentVolumeClaimVolumeSource
  claimName!=1 readOnly=2:bool
RBDVolumeSource
  monitors!=1:[]string image!=2 fsType=3 pool=4 user=5 keyring=6
  secretRef?=7:LocalObjectReference readOnly=8:bool
FlexVolumeSource
  driver!=1 fsType=2 secretRef?=3:LocalObjectReference readOnly=4:bool options=5:{}string
CinderVolumeSource
  volumeID!=1 fsType=2 readOnly=3:bool secretRef?=4:LocalObjectReference
CephFSVolumeSource
  monitors!=1:[]string path=2 user=3 secretFile=4 secretRef?=5:LocalObjectReference readOnly=6:bool
FlockerVolumeSource
  datasetName=1 datasetUUID=2
DownwardAPIVolumeSource
  items=1:[]DownwardAPIVolumeFile defaultMode?=2:int32
DownwardAPIVolumeFile
  path!=1 fieldRef?=2:ObjectFieldSelector resourceFieldRef?=3:ResourceFieldSelector mode?=4:int32
FCVolumeSource
  targetWWNs=1:[]string lun?=2:int32 fsType=3 readOnly=4:bool wwids=5:[]string
AzureFileVolumeSource
  secretName!=1 shareName!=2 readOnly=3:bool
ConfigMapVolumeSource
  localObjectReference=1:LocalObjectReference^ items=2:[]KeyToPath defaultMode?=3:int32
  optional?=4:bool
VsphereVirtualDiskVolumeSource
  volumePath!=1 fsType=2 storagePolicyName=3 storagePolicyID=4
QuobyteVolumeSource
  registry!=1 volume!=2 readOnly=3:bool user=4 group=5 tenant=6
AzureDiskVolumeSource
  diskName!=1 diskURI!=2 cachingMode?=3 fsType?=4 readOnly?=5:bool kind?=6
PhotonPersistentDiskVolumeSource
  pdID!=1 fsType=2
PortworxVolumeSource
  volumeID!=1 fsType=2 readOnly=3:bool
ScaleIOVolumeSource
  gateway!=1 system!=2 secretRef!?=3:LocalObjectReference sslEnabled=4:bool protectionDomain=5
  storagePool=6 storageMode=7 volumeName=8 fsType=9 readOnly=10:bool
ProjectedVolumeSource
  sources+=1:[]VolumeProjection defaultMode?=2:int32
VolumeProjection
  secret?=1:SecretProjection downwardAPI?=2:DownwardAPIProjection configMap?=3:ConfigMapProjection
  serviceAccountToken?=4:ServiceAccountTokenProjection
  clusterTrustBundle?=5:ClusterTrustBundleProjection
  podCertificate?=6:PodCertificateProjection
SecretProjection
  localObjectReference=1:LocalObjectReference^ items=2:[]KeyToPath optional?=4:bool
ConfigMapProjection
  localObjectReference=1:LocalObjectReference^ items=2:[]KeyToPath optional?=4:bool
DownwardAPIProjection
  items=1:[]DownwardAPIVolumeFile
ServiceAccountTokenProjection
  audience=1 expirationSeconds?=2:int64 path!=3
ClusterTrustBundleProjection
  name?=1 signerName?=2 labelSelector?=3:m.LabelSelector path!=4 optional?=5:bool
PodCertificateProjection
  signerName!=1 keyType!=2 maxExpirationSeconds?=3:int32 credentialBundlePath=4 keyPath=5
  certificateChainPath=6 userAnnotations=7:{}string
StorageOSVolumeSource
  volumeName=1 volumeNamespace=2 fsType=3 readOnly=4:bool secretRef?=5:LocalObjectReference
CSIVolumeSource
  driver!=1 readOnly?=2:bool fsType?=3 volumeAttributes=4:{}string
  nodePublishSecretRef?=5:LocalObjectReference
EphemeralVolumeSource
  volumeClaimTemplate?=1:PersistentVolumeClaimTemplate
ImageVolumeSource
  reference=1 pullPolicy=2
PersistentVolumeClaimTemplate
  metadata=1:m.ObjectMeta spec!=2:PersistentVolumeClaimSpec
PersistentVolumeClaim
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:PersistentVolumeClaimSpec
  status=3:PersistentVolumeClaimStatus
PersistentVolumeClaimSpec
  accessModes=1:[]string resources=2:VolumeResourceRequirements volumeName=3
  selector?=4:m.LabelSelector storageClassName?=5 volumeMode?=6
  dataSource?=7:TypedLocalObjectReference dataSourceRef?=8:TypedObjectReference
  volumeAttributesClassName?=9
VolumeResourceRequirements
  limits=1:{}quantity requests=2:{}quantity
PersistentVolumeClaimStatus
  phase=1 accessModes=2:[]string capacity=3:{}quantity
  conditions=4:[]PersistentVolumeClaimCondition@type%type allocatedResources=5:{}quantity
  allocatedResourceStatuses=7:{}string currentVolumeAttributesClassName?=8
  modifyVolumeStatus?=9:ModifyVolumeStatus
PersistentVolumeClaimCondition
  type!=1 status!=2 lastProbeTime=3:time lastTransitionTime=4:time reason=5 message=6
ModifyVolumeStatus
  targetVolumeAttributesClassName=1 status!=2

PodStatus
  phase=1 conditions=2:[]PodCondition@type%type message=3 reason=4 hostIP=5 podIP=6
  startTime?=7:time containerStatuses=8:[]ContainerStatus qosClass=9
  initContainerStatuses=10:[]ContainerStatus nominatedNodeName=11
  podIPs=12:[]PodIP@ip%ip ephemeralContainerStatuses=13:[]ContainerStatus resize=14
  resourceClaimStatuses=15:[]PodResourceClaimStatus@name%name$ hostIPs=16:[]HostIP@ip
  observedGeneration=17:int64
  extendedResourceClaimStatus?=18:PodExtendedResourceClaimStatus allocatedResources=19:{}quantity
  resources?=20:ResourceRequirements
  nodeAllocatableResourceClaimStatuses=21:[]NodeAllocatableResourceClaimStatus
NodeAllocatableResourceClaimStatus
  resourceClaimName!=1 containers=2:[]string% resources!=3:{}quantity
PodCondition
  type!=1 status!=2 lastProbeTime=3:time lastTransitionTime=4:time reason=5 message=6
  observedGeneration=7:int64
PodIP
  ip!=1
HostIP
  ip!=1
PodResourceClaimStatus
  name!=1 resourceClaimName?=2
PodExtendedResourceClaimStatus
  requestMappings!=1:[]ContainerExtendedResourceRequest resourceClaimName!=2
ContainerExtendedResourceRequest
  containerName!=1 resourceName!=2 requestName!=3
ContainerStatus
  name!=1 state=2:ContainerState lastState=3:ContainerState ready!=4:bool restartCount!=5:int32
  image!=6 imageID!=7 containerID=8 started?=9:bool allocatedResources=10:{}quantity
  resources?=11:ResourceRequirements volumeMounts=12:[]VolumeMountStatus@mountPath%mountPath
  user?=13:ContainerUser allocatedResourcesStatus=14:[]ResourceStatus@name%name stopSignal?=15
ContainerState
  waiting?=1:ContainerStateWaiting running?=2:ContainerStateRunning
  terminated?=3:ContainerStateTerminated
ContainerStateWaiting
  reason=1 message=2
ContainerStateRunning
  startedAt=1:time
ContainerStateTerminated
  exitCode!=1:int32 signal=2:int32 reason=3 message=4 startedAt=5:time finishedAt=6:time
  containerID=7
VolumeMountStatus
  name!=1 mountPath!=2 readOnly=3:bool recursiveReadOnly?=4 volumeStatus?=5:VolumeStatus
VolumeStatus
  image?=1:ImageVolumeStatus
ImageVolumeStatus
  imageRef!=1
ContainerUser
  linux?=1:LinuxContainerUser
LinuxContainerUser
  uid!=1:int64 gid!=2:int64 supplementalGroups=3:[]int64
ResourceStatus
  name!=1 resources=2:[]ResourceHealth%resourceID
ResourceHealth
  resourceID!=1 health=2 message?=6

NamespaceList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]Namespace
NodeList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]Node
ServiceList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]Service
EndpointsList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]Endpoints
PodList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]Pod
EventList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]Event
ConfigMapList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]ConfigMap
SecretList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]Secret
ServiceAccountList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]ServiceAccount

[apps/v1]
Deployment
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:DeploymentSpec status=3:DeploymentStatus
DeploymentSpec
  replicas?=1:int32 selector!?=2:m.LabelSelector template!=3:c.PodTemplateSpec
  strategy=4:DeploymentStrategy$ minReadySeconds=5:int32 revisionHistoryLimit?=6:int32
  paused=7:bool progressDeadlineSeconds?=9:int32
DeploymentStrategy
  type=1 rollingUpdate?=2:RollingUpdateDeployment
RollingUpdateDeployment
  maxUnavailable?=1:intorstring maxSurge?=2:intorstring
DeploymentStatus
  observedGeneration=1:int64 replicas=2:int32 updatedReplicas=3:int32 availableReplicas=4:int32
  unavailableReplicas=5:int32 conditions=6:[]DeploymentCondition@type%type readyReplicas=7:int32
  collisionCount?=8:int32 terminatingReplicas?=9:int32
DeploymentCondition
  type!=1 status!=2 reason=4 message=5 lastUpdateTime=6:time lastTransitionTime=7:time
ReplicaSet
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:ReplicaSetSpec status=3:ReplicaSetStatus
ReplicaSetSpec
  replicas?=1:int32 selector!?=2:m.LabelSelector template=3:c.PodTemplateSpec
  minReadySeconds=4:int32
ReplicaSetStatus
  replicas!=1:int32 fullyLabeledReplicas=2:int32 observedGeneration=3:int64 readyReplicas=4:int32
  availableReplicas=5:int32 conditions=6:[]ReplicaSetCondition@type%type
  terminatingReplicas?=7:int32
ReplicaSetCondition
  type!=1 status!=2 lastTransitionTime=3:time reason=4 message=5
StatefulSet
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:StatefulSetSpec status=3:StatefulSetStatus
StatefulSetSpec
  replicas?=1:int32 selector!?=2:m.LabelSelector template!=3:c.PodTemplateSpec
  volumeClaimTemplates=4:[]c.PersistentVolumeClaim serviceName+=5 podManagementPolicy=6
  updateStrategy=7:StatefulSetUpdateStrategy revisionHistoryLimit?=8:int32 minReadySeconds=9:int32
  persistentVolumeClaimRetentionPolicy?=10:StatefulSetPersistentVolumeClaimRetentionPolicy
  ordinals?=11:StatefulSetOrdinals
StatefulSetUpdateStrategy
  type=1 rollingUpdate?=2:RollingUpdateStatefulSetStrategy
RollingUpdateStatefulSetStrategy
  partition?=1:int32 maxUnavailable?=2:intorstring
StatefulSetPersistentVolumeClaimRetentionPolicy
  whenDeleted=1 whenScaled=2
StatefulSetOrdinals
  start+=1:int32
StatefulSetStatus
  observedGeneration=1:int64 replicas!=2:int32 readyReplicas=3:int32 currentReplicas=4:int32
  updatedReplicas=5:int32 currentRevision=6 updateRevision=7 collisionCount?=9:int32
  conditions=10:[]StatefulSetCondition@type%type availableReplicas+=11:int32
StatefulSetCondition
  type!=1 status!=2 lastTransitionTime=3:time reason=4 message=5
DeploymentList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]Deployment
ReplicaSetList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]ReplicaSet
StatefulSetList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]StatefulSet

[discovery.k8s.io/v1]
EndpointSlice
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta endpoints+=2:[]Endpoint ports+=3:[]EndpointPort
  addressType!=4
Endpoint
  addresses!=1:[]string% conditions=2:EndpointConditions hostname?=3 targetRef?=4:c.ObjectReference
  deprecatedTopology=5:{}string nodeName?=6 zone?=7 hints?=8:EndpointHints
EndpointConditions
  ready?=1:bool serving?=2:bool terminating?=3:bool
EndpointHints
  forZones=1:[]ForZone forNodes=2:[]ForNode
ForZone
  name!=1
ForNode
  name!=1
EndpointPort ~
  name?=1 protocol?=2 port?=3:int32 appProtocol?=4
EndpointSliceList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]EndpointSlice

[events.k8s.io/v1]
Event
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta eventTime!=2:microtime series?=3:EventSeries
  reportingController=4 reportingInstance=5 action=6 reason=7 regarding=8:c.ObjectReference
  related?=9:c.ObjectReference note=10 type=11 deprecatedSource=12:c.EventSource
  deprecatedFirstTimestamp=13:time deprecatedLastTimestamp=14:time deprecatedCount=15:int32
EventSeries
  count!=1:int32 lastObservedTime!=2:microtime

[coordination.k8s.io/v1]
Lease
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:LeaseSpec
LeaseSpec
  holderIdentity?=1 leaseDurationSeconds?=2:int32 acquireTime?=3:microtime renewTime?=4:microtime
  leaseTransitions?=5:int32 strategy?=6 preferredHolder?=7
LeaseList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]Lease

[networking.k8s.io/v1]
ServiceCIDR
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:ServiceCIDRSpec status=3:ServiceCIDRStatus
ServiceCIDRSpec
  cidrs=1:[]string~
ServiceCIDRStatus
  conditions=1:[]m.Condition@type%type
ServiceCIDRList
  apiVersion=0 kind=0 metadata=1:m.ListMeta items!=2:[]ServiceCIDR

[autoscaling/v1]
Scale
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec=2:ScaleSpec status=3:ScaleStatus
ScaleSpec
  replicas=1:int32
ScaleStatus
  replicas!=1:int32 selector=2

[policy/v1]
Eviction
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta deleteOptions?=2:m.DeleteOptions

[authentication.k8s.io/v1]
SelfSubjectReview
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta status=2:SelfSubjectReviewStatus
SelfSubjectReviewStatus
  userInfo=1:UserInfo
UserInfo
  username=1 uid=2 groups=3:[]string extra=4:{}strings

[authorization.k8s.io/v1]
SelfSubjectAccessReview
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec!=2:SelfSubjectAccessReviewSpec
  status=3:SubjectAccessReviewStatus
SelfSubjectAccessReviewSpec
  resourceAttributes?=1:ResourceAttributes nonResourceAttributes?=2:NonResourceAttributes
ResourceAttributes
  namespace=1 verb=2 group=3 version=4 resource=5 subresource=6 name=7
  fieldSelector?=8:FieldSelectorAttributes labelSelector?=9:LabelSelectorAttributes
FieldSelectorAttributes
  rawSelector=1 requirements=2:[]m.FieldSelectorRequirement
LabelSelectorAttributes
  rawSelector=1 requirements=2:[]m.LabelSelectorRequirement
NonResourceAttributes
  path=1 verb=2
SubjectAccessReviewStatus
  allowed!=1:bool reason=2 evaluationError=3 denied=4:bool
SelfSubjectRulesReview
  apiVersion=0 kind=0 metadata=1:m.ObjectMeta spec!=2:SelfSubjectRulesReviewSpec
  status=3:SubjectRulesReviewStatus
SelfSubjectRulesReviewSpec
  namespace=1
SubjectRulesReviewStatus
  resourceRules!=1:[]ResourceRule nonResourceRules!=2:[]NonResourceRule incomplete!=3:bool
  evaluationError=4
ResourceRule
  verbs!=1:[]string apiGroups=2:[]string resources=3:[]string resourceNames=4:[]string
NonResourceRule
  verbs!=1:[]string nonResourceURLs=2:[]string
"""
