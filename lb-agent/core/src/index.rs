//! Index of the objects. It relates EndpointSlices to their Services and returns the Services and Nodes that a change
//! touches.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::by_key::{ByKey, Keyed};
use crate::model::{Change, EndpointSlice, Kind, Node, Object, ObjectKey, Service};

/// Nodes that changed, as they were before the change.
pub(crate) type NodesBefore = BTreeMap<Arc<str>, Option<Arc<Node>>>;

/// Services and Nodes that changes of objects touched.
#[derive(Debug, Default)]
pub(crate) struct TouchedObjects {
    pub(crate) services: BTreeSet<ObjectKey>,
    pub(crate) nodes: NodesBefore,
}

/// All objects, by key. Synchronous, no IO.
#[derive(Debug, Default)]
pub(crate) struct Index {
    related: HashSet<ByKey<Box<Related>>>,
    /// EndpointSlices by their own keys.
    slices: HashSet<ByKey<Arc<EndpointSlice>>>,
    nodes: BTreeMap<Arc<str>, Arc<Node>>,
}

/// A Service and its slices; either may exist without the other.
#[derive(Debug)]
struct Related {
    key: ObjectKey,
    service: Option<Arc<Service>>,
    slices: Slices,
}

/// The slices of a Service, in the order of their own keys.
#[derive(Debug)]
enum Slices {
    /// Of most Services. One slice needs no list.
    One(Arc<EndpointSlice>),
    List(Box<[Arc<EndpointSlice>]>),
}

impl FromIterator<Arc<EndpointSlice>> for Slices {
    fn from_iter<I: IntoIterator<Item = Arc<EndpointSlice>>>(slices: I) -> Self {
        let mut slices: Vec<_> = slices.into_iter().collect();
        match slices.pop() {
            Some(only) if slices.is_empty() => Self::One(only),
            last => Self::List(slices.into_iter().chain(last).collect()),
        }
    }
}

impl Deref for Slices {
    type Target = [Arc<EndpointSlice>];

    fn deref(&self) -> &Self::Target {
        match self {
            Self::One(slice) => std::slice::from_ref(slice),
            Self::List(slices) => slices,
        }
    }
}

impl DerefMut for Slices {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match self {
            Self::One(slice) => std::slice::from_mut(slice),
            Self::List(slices) => slices,
        }
    }
}

impl Keyed for Related {
    fn key(&self) -> &ObjectKey {
        &self.key
    }
}

impl Keyed for EndpointSlice {
    fn key(&self) -> &ObjectKey {
        &self.key
    }
}

impl Index {
    /// Applies changes and returns the Services and Nodes that they touch.
    pub(crate) fn apply(&mut self, changes: impl IntoIterator<Item = Change>) -> TouchedObjects {
        let TouchedObjects {
            mut services,
            mut nodes,
        } = TouchedObjects::default();
        for change in changes {
            match change {
                Change::Set(Object::Service(mut service)) => {
                    let key = self.shared_key(&service.key);
                    if let Some(service) = Arc::get_mut(&mut service) {
                        service.key = key.clone();
                    }
                    self.relate(&key, |related| related.service = Some(service));
                    services.insert(key);
                }
                Change::Set(Object::EndpointSlice(mut slice)) => {
                    let owner = self.shared_key(&slice.service_key());
                    if let Some(slice) = Arc::get_mut(&mut slice) {
                        slice.service = Arc::clone(&owner.name);
                    }
                    let before = self.slices.replace(ByKey(Arc::clone(&slice)));
                    // A slice may move to another Service: the label can be edited.
                    if let Some(ByKey(before)) = before.filter(|before| before.0.service != slice.service) {
                        services.insert(self.remove_slice(&before));
                    }
                    self.relate(&owner, |Related { slices, .. }| {
                        match slices.binary_search_by(|known| known.key.cmp(&slice.key)) {
                            Ok(at) => slices[at] = slice,
                            Err(at) => {
                                let (before, after) = slices.split_at(at);
                                *slices = before.iter().chain([&slice]).chain(after).cloned().collect();
                            }
                        }
                    });
                    services.insert(owner);
                }
                Change::Set(Object::Node(node)) => {
                    let name = Arc::clone(&node.name);
                    let before = self.nodes.insert(Arc::clone(&name), node);
                    nodes.entry(name).or_insert(before);
                }
                Change::Remove(id) => match id.kind {
                    Kind::Service => {
                        if self.service(&id.key).is_some() {
                            self.relate(&id.key, |related| related.service = None);
                            services.insert(id.key);
                        }
                    }
                    Kind::EndpointSlice => {
                        if let Some(ByKey(slice)) = self.slices.take(&id.key) {
                            services.insert(self.remove_slice(&slice));
                        }
                    }
                    Kind::Node => {
                        let before = self.nodes.remove(&id.key.name);
                        nodes.entry(id.key.name).or_insert(before);
                    }
                },
            }
        }
        TouchedObjects { services, nodes }
    }

    /// Returns the copy of the key of a Service that its entry has. The objects that the source does not hold get it too: a Service
    /// and its slices then have its name in one place.
    fn shared_key(&self, service: &ObjectKey) -> ObjectKey {
        let known = self.related.get(service);
        known.map_or(service, |known| known.0.key()).clone()
    }

    /// Changes the entry of a Service, and removes the entry if it becomes empty.
    fn relate(&mut self, service: &ObjectKey, change: impl FnOnce(&mut Related)) {
        let new = || {
            Box::new(Related {
                key: service.clone(),
                service: None,
                slices: Slices::List(Box::default()),
            })
        };
        let mut related = self.related.take(service).map_or_else(new, |known| known.0);
        change(&mut related);
        if related.service.is_some() || !related.slices.is_empty() {
            self.related.insert(ByKey(related));
        }
    }

    /// Removes a slice from its Service, and returns the key of the Service.
    fn remove_slice(&mut self, slice: &EndpointSlice) -> ObjectKey {
        let owner = slice.service_key();
        self.relate(&owner, |Related { slices, .. }| {
            *slices = slices.iter().filter(|known| known.key != slice.key).cloned().collect();
        });
        owner
    }

    /// Returns a Service.
    #[must_use]
    pub(crate) fn service(&self, key: &ObjectKey) -> Option<&Service> {
        self.related.get(key)?.0.service.as_deref()
    }

    /// Returns all Services.
    pub(crate) fn services(&self) -> impl Iterator<Item = &Service> {
        self.related.iter().filter_map(|related| related.0.service.as_deref())
    }

    /// Returns a Node.
    #[must_use]
    pub(crate) fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name).map(Arc::as_ref)
    }

    /// Returns the slices of a Service, in the order of their names.
    pub(crate) fn slices(&self, service: &ObjectKey) -> impl Iterator<Item = &EndpointSlice> + Clone {
        let related = self.related.get(service).into_iter();
        related.flat_map(|related| &*related.0.slices).map(Arc::as_ref)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Endpoints, ObjectId};

    fn slice(name: &str, service: &str) -> Change {
        Change::Set(Object::EndpointSlice(Arc::new(EndpointSlice {
            key: ObjectKey::new("ns", name),
            service: service.into(),
            ipv6: false,
            endpoints: Endpoints::default(),
            ports: Arc::default(),
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
    fn slices_touch_their_service_and_its_former_one() {
        let mut index = Index::default();
        assert_eq!(
            index.apply([slice("b", "web"), slice("a", "web")]).services,
            keys(&["web"])
        );
        assert_eq!(names(&index, "web"), ["a", "b"]);
        assert_eq!(index.apply([slice("a", "db")]).services, keys(&["web", "db"]));
        assert_eq!(
            (names(&index, "web"), names(&index, "db")),
            (vec!["b".into()], vec!["a".into()])
        );
        let removed = Change::Remove(ObjectId {
            kind: Kind::EndpointSlice,
            key: ObjectKey::new("ns", "a"),
        });
        assert_eq!(index.apply([removed.clone()]).services, keys(&["db"]));
        assert_eq!(index.apply([removed]).services, keys(&[]), "removed twice");
        assert!(names(&index, "db").is_empty());
    }
}
