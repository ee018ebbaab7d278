//! Nodes and pods in the API, with the status that a kubelet would report.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result};
use k8s_openapi::api::core::v1;
use serde_json::{Value, json};

use super::{ControlPlane, Objects};
use crate::{Cluster, Netns, Node, Pod};

/// The start time of all pods in the API.
const STARTED: &str = "2026-01-01T00:00:00Z";

/// The last octet of the address of a node's first pod. Pods that are not in the API have lower addresses.
const FIRST_ADDRESS: u8 = 20;

/// The specification of a pod.
#[derive(Debug, Clone, Default)]
pub struct PodTemplate {
    labels: BTreeMap<String, String>,
    ports: Vec<Value>,
    gates: Vec<String>,
    host_network: bool,
}

impl PodTemplate {
    /// Creates the specification of a pod with the label `app`.
    #[must_use]
    pub fn app(name: &str) -> Self {
        Self::default().label("app", name)
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Adds a named port, which a Service can use as its target port.
    #[must_use]
    pub fn port(mut self, name: &str, port: u16, protocol: &str) -> Self {
        let port = json!({"name": name, "containerPort": port, "protocol": protocol});
        self.ports.push(port);
        self
    }

    /// Adds a readiness gate: a condition that another controller sets on the pod.
    #[must_use]
    pub fn gate(mut self, condition: &str) -> Self {
        self.gates.push(condition.to_owned());
        self
    }

    /// Gives the pod the node's network namespace and addresses.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }
}

/// A pod of the cluster and its object in the API, with the status that a kubelet would report. Dropping this changes
/// neither.
#[derive(Debug)]
pub struct KubeletPod<'a> {
    objects: &'a Objects,
    namespace: String,
    name: String,
    node: String,
    node_addresses: [IpAddr; 2],
    gates: Vec<String>,
    /// The conditions that decide whether the pod is ready: `ContainersReady` and the readiness gates.
    conditions: Mutex<BTreeMap<String, bool>>,
    netns: Netns,
    /// `None` if the pod has the node's network.
    pod: Option<Pod>,
}

impl<'a> KubeletPod<'a> {
    pub(super) fn start(
        control_plane: &'a ControlPlane,
        namespace: &str,
        cluster: &Cluster,
        node: &str,
        name: &str,
        template: &PodTemplate,
    ) -> Result<Self> {
        let objects = control_plane.objects();
        let node = cluster.node(node);
        let pod = if template.host_network {
            None
        } else {
            // Two namespaces of the API may have pods of the same name on one node.
            let name = format!("{namespace}-{name}");
            Some(cluster.add_pod_at(node.name(), &name, control_plane.next_address(node)?)?)
        };
        let netns = pod.as_ref().map_or_else(|| Netns::clone(node), |pod| Netns::clone(pod));
        let gates: Vec<_> = template
            .gates
            .iter()
            .map(|gate| json!({"conditionType": gate}))
            .collect();
        let object = json!({
            "metadata": {"name": name, "labels": template.labels},
            "spec": {
                "nodeName": node.name(),
                "hostNetwork": template.host_network,
                "readinessGates": gates,
                "terminationGracePeriodSeconds": 30,
                "containers": [{"name": "server", "image": "none", "ports": template.ports}],
            },
        });
        objects
            .create::<v1::Pod>(namespace, object)
            .with_context(|| format!("creating pod {name}"))?;
        let new = Self {
            objects,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            node: node.name().to_owned(),
            node_addresses: [node.address().into(), node.address6().into()],
            gates: template.gates.clone(),
            conditions: Mutex::default(),
            netns,
            pod,
        };
        new.report()?;
        Ok(new)
    }

    /// The pod's name in the API.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name of the pod's node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The network namespace of the pod's processes.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Returns the pod's addresses, IPv4 first.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        self.pod
            .as_ref()
            .map_or(self.node_addresses, |pod| [pod.address().into(), pod.address6().into()])
    }

    /// Reports whether the pod's containers pass their readiness probes.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn set_ready(&self, ready: bool) -> Result<()> {
        self.set_condition("ContainersReady", ready)
    }

    /// Sets a condition of the pod; the condition of a readiness gate decides whether the pod is ready.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn set_condition(&self, condition: &str, holds: bool) -> Result<()> {
        let mut conditions = self.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        conditions.insert(condition.to_owned(), holds);
        drop(conditions);
        self.report()
    }

    /// Deletes the pod with a grace period. It is terminating until [`Self::finish`].
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn terminate(&self) -> Result<()> {
        self.objects
            .delete::<v1::Pod>(&self.namespace, &self.name, Some(30))
            .with_context(|| format!("deleting pod {}", self.name))
    }

    /// Ends the pod: removes the object, the network namespace and all processes in it.
    ///
    /// # Errors
    /// If one of them cannot be removed.
    pub fn finish(self, cluster: &Cluster) -> Result<()> {
        self.objects
            .delete::<v1::Pod>(&self.namespace, &self.name, Some(0))
            .with_context(|| format!("removing pod {}", self.name))?;
        self.pod.map_or(Ok(()), |pod| cluster.remove_pod(&pod))
    }

    /// Writes the pod's status to the API.
    fn report(&self) -> Result<()> {
        let current = self.conditions.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let holds = |condition: &str| current.get(condition).copied().unwrap_or(false);
        let containers = holds("ContainersReady");
        let ready = containers && self.gates.iter().all(|gate| holds(gate));
        let mut conditions = vec![condition("Initialized", true), condition("PodScheduled", true)];
        conditions.push(condition("ContainersReady", containers));
        conditions.push(condition("Ready", ready));
        let gates = self.gates.iter().map(|gate| condition(gate, holds(gate)));
        conditions.extend(gates);
        let addresses = |addresses: [IpAddr; 2]| addresses.map(|address| json!({"ip": address})).to_vec();
        let status = json!({
            "phase": "Running",
            "startTime": STARTED,
            "conditions": conditions,
            "hostIP": self.node_addresses[0],
            "hostIPs": addresses(self.node_addresses),
            "podIP": self.addresses()[0],
            "podIPs": addresses(self.addresses()),
            "containerStatuses": [{
                "name": "server", "image": "none", "imageID": "", "restartCount": 0,
                "ready": containers, "started": true, "state": {"running": {"startedAt": STARTED}},
            }],
        });
        self.objects
            .patch_status::<v1::Pod>(&self.namespace, &self.name, json!({"status": status}))
            .with_context(|| format!("reporting the status of pod {}", self.name))?;
        Ok(())
    }
}

impl ControlPlane {
    /// Returns an address of a node that no pod has had before. Addresses are not used again, because the test bed does not
    /// announce the hardware address of a new pod to its neighbors, as a CNI plugin does.
    fn next_address(&self, node: &Node) -> Result<Ipv4Addr> {
        let mut last = self.last_address.lock().unwrap_or_else(PoisonError::into_inner);
        let last = last.entry(node.name().to_owned()).or_insert(FIRST_ADDRESS - 1);
        *last = last
            .checked_add(1)
            .with_context(|| format!("{} has no address left", node.name()))?;
        let [a, b, c, _] = node.pod_network().octets();
        Ok(Ipv4Addr::new(a, b, c, *last))
    }

    /// Creates the Node object of a node, with its addresses and the networks of its pods.
    pub(super) fn add_node(&self, node: &Node) -> Result<()> {
        let pods = [
            format!("{}/24", node.pod_network()),
            format!("{}/64", node.pod_network6()),
        ];
        let object = json!({
            "metadata": {"name": node.name(), "labels": {"kubernetes.io/hostname": node.name(), "kubernetes.io/os": "linux"}},
            "spec": {"podCIDR": pods[0], "podCIDRs": pods},
        });
        self.objects()
            .create_global::<v1::Node>(object)
            .with_context(|| format!("creating node {}", node.name()))?;
        let addresses = json!([
            {"type": "InternalIP", "address": node.address()},
            {"type": "InternalIP", "address": node.address6()},
            {"type": "Hostname", "address": node.name()},
        ]);
        let ready = condition("Ready", true);
        // Hints in topology mode Auto depend on the share of each zone in the processors of all nodes.
        let room = json!({"cpu": "4", "memory": "8Gi", "pods": "110"});
        let status = json!({"addresses": addresses, "conditions": [ready], "capacity": room, "allocatable": room});
        self.objects()
            .patch_global::<v1::Node>(node.name(), json!({"status": status}), true)
            .with_context(|| format!("reporting the status of node {}", node.name()))?;
        Ok(())
    }

    /// Sets or removes the zone label of a node.
    ///
    /// # Errors
    /// If the API server refuses it.
    pub fn set_zone(&self, node: &str, zone: Option<&str>) -> Result<()> {
        let labels = json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}});
        self.objects()
            .patch_global::<v1::Node>(node, labels, false)
            .with_context(|| format!("labeling node {node}"))?;
        Ok(())
    }
}

fn condition(kind: &str, holds: bool) -> Value {
    let status = if holds { "True" } else { "False" };
    json!({"type": kind, "status": status, "lastTransitionTime": STARTED, "reason": "Test", "message": ""})
}
