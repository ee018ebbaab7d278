//! Hash tables of values that contain their own keys.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};
use std::ops::Deref;

use crate::model::ObjectKey;

/// A value that contains its key.
pub(crate) trait Keyed {
    fn key(&self) -> &ObjectKey;
}

/// An entry of a hash set that is looked up by its key. Entries are pointers, since half of a hash table may be empty,
/// and the key is stored only once, in the value.
#[derive(Debug)]
pub(crate) struct ByKey<P>(pub(crate) P);

impl<P: Deref<Target: Keyed>> Borrow<ObjectKey> for ByKey<P> {
    fn borrow(&self) -> &ObjectKey {
        self.0.key()
    }
}

impl<P: Deref<Target: Keyed>> Hash for ByKey<P> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.key().hash(state);
    }
}

impl<P: Deref<Target: Keyed>> PartialEq for ByKey<P> {
    fn eq(&self, other: &Self) -> bool {
        self.0.key() == other.0.key()
    }
}

impl<P: Deref<Target: Keyed>> Eq for ByKey<P> {}
