//! The objects, related to each other: which slices belong to which Service, and what a change concerns.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::model::{Change, EndpointSlice, Kind, Node, Object, ObjectKey, Service};

/// All objects, by key. Synchronous, no IO.
#[derive(Debug, Default)]
pub(crate) struct Index {
    services: HashMap<ObjectKey, Arc<Service>>,
    /// By Service, then in the order of the slices' own keys. Most Services have one: a tree for each would be half empty.
    slices: HashMap<ObjectKey, Vec<Arc<EndpointSlice>>>,
    /// Which Service a slice belongs to.
    owners: HashMap<ObjectKey, ObjectKey>,
    nodes: BTreeMap<Arc<str>, Arc<Node>>,
}

impl Index {
    /// Takes changes over; returns the Services that they concern.
    pub(crate) fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> BTreeSet<ObjectKey> {
        let mut dirty = BTreeSet::new();
        for change in changes {
            match change {
                Change::Set(Object::Service(service)) => {
                    dirty.insert(service.key.clone());
                    self.services.insert(service.key.clone(), service);
                }
                Change::Set(Object::EndpointSlice(slice)) => {
                    let owner = slice.service_key();
                    // A slice may change hands: the label can be edited.
                    if let Some(before) = self.owners.insert(slice.key.clone(), owner.clone())
                        && before != owner
                    {
                        self.remove_slice(&before, &slice.key);
                        dirty.insert(before);
                    }
                    let slices = self.slices.entry(owner.clone()).or_default();
                    match slices.binary_search_by(|known| known.key.cmp(&slice.key)) {
                        Ok(at) => slices[at] = slice,
                        Err(at) => {
                            slices.reserve_exact(1);
                            slices.insert(at, slice);
                        }
                    }
                    dirty.insert(owner);
                }
                Change::Set(Object::Node(node)) => {
                    self.nodes.insert(Arc::clone(&node.name), node);
                }
                Change::Remove(id) => match id.kind {
                    Kind::Service => {
                        if self.services.remove(&id.key).is_some() {
                            dirty.insert(id.key);
                        }
                    }
                    Kind::EndpointSlice => {
                        if let Some(owner) = self.owners.remove(&id.key) {
                            self.remove_slice(&owner, &id.key);
                            dirty.insert(owner);
                        }
                    }
                    Kind::Node => {
                        self.nodes.remove(&id.key.name);
                    }
                },
            }
        }
        dirty
    }

    fn remove_slice(&mut self, owner: &ObjectKey, slice: &ObjectKey) {
        if let Some(slices) = self.slices.get_mut(owner) {
            slices.retain(|known| known.key != *slice);
            if slices.is_empty() {
                self.slices.remove(owner);
            }
        }
    }

    /// A Service.
    #[must_use]
    pub(crate) fn service(&self, key: &ObjectKey) -> Option<&Service> {
        self.services.get(key).map(Arc::as_ref)
    }

    /// The slices of a Service, in the order of their names.
    pub(crate) fn slices(&self, service: &ObjectKey) -> impl Iterator<Item = &EndpointSlice> + Clone {
        self.slices.get(service).into_iter().flatten().map(Arc::as_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ObjectId;

    fn slice(name: &str, service: &str) -> Change {
        Change::Set(Object::EndpointSlice(Arc::new(EndpointSlice {
            key: ObjectKey::new("ns", name),
            service: service.into(),
            ipv6: false,
            endpoints: Box::default(),
            ports: Box::default(),
        })))
    }

    fn keys(names: &[&str]) -> BTreeSet<ObjectKey> {
        names.iter().map(|name| ObjectKey::new("ns", name)).collect()
    }

    fn names(index: &Index, service: &str) -> Vec<String> {
        index
            .slices(&ObjectKey::new("ns", service))
            .map(|s| s.key.name.to_string())
            .collect()
    }

    #[test]
    fn slices_concern_their_service_also_when_they_change_hands() {
        let mut index = Index::default();
        assert_eq!(index.apply([slice("b", "web"), slice("a", "web")]), keys(&["web"]));
        assert_eq!(names(&index, "web"), ["a", "b"]);
        assert_eq!(index.apply([slice("a", "db")]), keys(&["web", "db"]));
        assert_eq!(
            (names(&index, "web"), names(&index, "db")),
            (vec!["b".into()], vec!["a".into()])
        );
        let removed = Change::Remove(ObjectId {
            kind: Kind::EndpointSlice,
            key: ObjectKey::new("ns", "a"),
        });
        assert_eq!(index.apply([removed.clone()]), keys(&["db"]));
        assert_eq!(index.apply([removed]), keys(&[]), "removed twice");
        assert!(names(&index, "db").is_empty());
    }
}
